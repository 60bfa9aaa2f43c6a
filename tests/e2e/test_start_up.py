"""What keeps a server from starting is one plain line and an exit code; settings come from three places."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from tests import toys
from tests.e2e.serving import START_SECONDS, Server, environment, serve_command

from graftwork import FailedPreconditionError


def failure(*flags: str, **variables: str) -> tuple[int, str]:
    """Exit code and the last line on stderr of a server that does not start; all else must be log lines."""
    done = subprocess.run(
        serve_command(*flags), capture_output=True, text=True, timeout=START_SECONDS, env=environment(**variables)
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("graftwork: ")]
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0]


def test_a_data_directory_has_one_server(server: Server, model_dir: Path) -> None:
    code, line = failure("--model", str(model_dir), "--data-dir", str(server.data_dir))
    assert code == 1
    assert "another graftwork server uses this data directory" in line


def test_a_port_has_one_server(server: Server, model_dir: Path, tmp_path: Path) -> None:
    code, line = failure("--model", str(model_dir), "--data-dir", str(tmp_path), "--listen", server.address)
    assert code == 1
    assert "port is in use" in line
    assert server.address in line


@pytest.mark.parametrize(("name", "what"), [("no-such-model", "it is not a directory"), ("", "it has no config.json")])
def test_a_missing_model_is_named_before_anything_is_started(tmp_path: Path, name: str, what: str) -> None:
    missing = tmp_path / name
    code, line = failure("--model", str(missing), "--data-dir", str(tmp_path / "data"))
    assert code == 1
    assert f"--model '{missing}': {what}; accepted are a directory with config.json" in line
    assert list(tmp_path.iterdir()) == []


def test_a_kv_cache_that_holds_nothing_useful_is_refused(model_dir: Path, tmp_path: Path) -> None:
    code, line = failure("--model", str(model_dir), "--data-dir", str(tmp_path / "data"), "--kv-memory-bytes", "4096")
    assert code == 1
    assert "--kv-memory-bytes: the KV cache holds 16 tokens" in line


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        serve_command("--model", "graftwork-toys/none", "--data-dir", str(tmp_path / "data"), "--log-level", "warning"),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        env=environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("graftwork: --model 'graftwork-toys/none': its files are not in the local cache")
    assert done.stderr.count("\n") == 1, done.stderr  # nothing of the library's own attempts
    assert "accepted are a directory" in done.stderr


def test_a_hub_id_whose_files_are_cached_is_served_from_there(model_dir: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--graftwork-toys--llama"
    shutil.copytree(model_dir, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    server = Server(
        Path("graftwork-toys/llama"), tmp_path / "data", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    try:
        assert "serving base 'llama'" in server.greeting
        with server.client() as client:
            assert client.generate("base", "Hello", max_tokens=3, ignore_eos=True).text
    finally:
        server.close()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_an_address_that_others_can_reach_needs_insecure(tmp_path: Path, address: str) -> None:
    code, line = failure("--listen", address, "--data-dir", str(tmp_path))
    assert code == 2
    assert "--insecure" in line


def test_an_unknown_setting_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "graftwork.toml"
    file.write_text("max_sequencse = 3\n")
    code, line = failure("--config", str(file))
    assert code == 2
    assert "max_sequencse" in line
    assert str(file) in line
    code, line = failure(GRAFTWORK_MAX_SEQUENCSE="3")
    assert code == 2
    assert "GRAFTWORK_MAX_SEQUENCSE" in line
    flag = subprocess.run(serve_command("--max-sequencse", "3"), capture_output=True, text=True, env=environment())
    assert flag.returncode == 2
    assert "--max-sequencse" in flag.stderr
    assert "Traceback" not in flag.stderr


def test_print_config_shows_what_wins_and_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "graftwork.toml"
    file.write_text("threads = 3\nmax_sequences = 5\nmax_queue = 7\n")
    done = subprocess.run(
        serve_command("--config", str(file), "--threads", "1", "--print-config"),
        capture_output=True,
        text=True,
        env=environment(GRAFTWORK_MAX_SEQUENCES="6", GRAFTWORK_THREADS="2"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    settings = tomllib.loads(done.stdout)
    assert (settings["threads"], settings["max_sequences"], settings["max_queue"]) == (1, 6, 7)
    lines = {line.split(" = ")[0]: line for line in done.stdout.splitlines()}
    assert lines["threads"].endswith("# flag --threads")
    assert lines["max_sequences"].endswith("# environment GRAFTWORK_MAX_SEQUENCES")
    assert lines["max_queue"].endswith(f"# file {file}")
    assert lines["dtype"].endswith("# default")
    again = tmp_path / "printed.toml"
    again.write_text(done.stdout)
    reprinted = subprocess.run(
        serve_command("--config", str(again), "--print-config"), capture_output=True, text=True, env=environment()
    )
    assert tomllib.loads(reprinted.stdout) == settings


def test_a_model_without_a_tokenizer_takes_token_ids_and_says_so_about_text(tmp_path: Path) -> None:
    model = toys.make_model("llama", tmp_path / "model")
    server = Server(model, tmp_path / "data")
    try:
        with server.client() as client:
            assert len(client.generate("base", [1, 5, 9], max_tokens=3, ignore_eos=True).token_ids) == 3
            with pytest.raises(FailedPreconditionError) as refused:
                client.generate("base", "Hello", max_tokens=3)
        assert refused.value.reason == "TOKENIZER_MISSING"
    finally:
        server.close()
