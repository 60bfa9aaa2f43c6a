"""Settings: where they come from, which wins, and what is refused."""

from __future__ import annotations

import ast
import inspect
import tomllib

import pytest

from graftwork_server import config as config_module
from graftwork_server.config import ServerConfig, parse_listen
from graftwork_server.config_sources import ConfigError, load_config


def load(*argv, environ=None):
    return load_config(list(argv), environ or {})


def test_flag_wins_over_environment_over_file_over_default(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('max_queue = 1\nmax_sequences = 1\nthreads = 1\nlog_level = "debug"\n')
    environ = {"GRAFTWORK_CONFIG": str(file), "GRAFTWORK_MAX_QUEUE": "2", "GRAFTWORK_MAX_SEQUENCES": "2"}
    loaded = load("--max-queue", "3", environ=environ)
    config = loaded.config
    assert (config.max_queue, config.max_sequences, config.threads, config.max_step_tokens) == (3, 2, 1, 1024)
    assert loaded.sources["max_queue"] == "flag --max-queue"
    assert loaded.sources["max_sequences"] == "environment GRAFTWORK_MAX_SEQUENCES"
    assert loaded.sources["threads"] == f"file {file}"
    assert loaded.sources["max_step_tokens"] == "default"


def test_config_flag_wins_over_its_variable(tmp_path):
    (tmp_path / "a.toml").write_text("threads = 1\n")
    (tmp_path / "b.toml").write_text("threads = 2\n")
    environ = {"GRAFTWORK_CONFIG": str(tmp_path / "a.toml")}
    assert load("--config", str(tmp_path / "b.toml"), environ=environ).config.threads == 2


def test_printed_settings_are_toml_that_gives_the_same_settings(tmp_path):
    loaded = load("--model", 'a "quoted" \\ model é', "--insecure", "--drain-seconds", "2.5", "--print-config")
    assert loaded.print_only
    text = loaded.to_toml()
    assert "# flag --insecure" in text
    (tmp_path / "printed.toml").write_text(text)
    assert load("--config", str(tmp_path / "printed.toml")).config == loaded.config
    assert "model" not in tomllib.loads(load().to_toml())
    assert "# model is not set" in load().to_toml()


@pytest.mark.parametrize(
    ("argv", "environ", "file", "words"),
    [
        ([], {"GRAFTWORK_MAX_QUEU": "1"}, None, ["GRAFTWORK_MAX_QUEU", "no such setting"]),
        ([], {"GRAFTWORK_max_queue": "1"}, None, ["GRAFTWORK_max_queue"]),
        ([], {}, "max_queu = 1", ["settings.toml: max_queu", "no such setting; did you mean max_queue?"]),
        (["--max-que", "1"], {}, None, ["flag --max-que: there is no such setting; did you mean --max-queue?"]),
        (["--nonsense"], {}, None, ["flag --nonsense: there is no such setting; graftwork serve --help"]),
        (["stray"], {}, None, ["stray"]),
        (["--threads"], {}, None, ["flag --threads", "expected one argument"]),
        (["--port", "80", "--listen", "127.0.0.1:81"], {}, None, ["--port", "--listen names a port already"]),
        (["--port", "many"], {}, None, ["flag --port: a port from 0 to 65535 is accepted (got 'many')"]),
        (["--kv-memory-bytes", "2 potatoes"], {}, None, ["flag --kv-memory-bytes", "2GiB", "2 potatoes"]),
        (["--kv-memory-bytes", "-1"], {}, None, ["flag --kv-memory-bytes", "2GiB"]),
        ([], {}, 'max_upload_bytes = "0GiB"', ["max_upload_bytes: at least 1 is accepted"]),
        ([], {}, "[server]\nthreads = 1", ["server"]),
        ([], {}, "max_queue = ", ["not TOML"]),
        ([], {}, "threads = true", ["threads: a number is accepted, not true or false (got True)", "settings.toml"]),
        ([], {}, "kv_memory_bytes = false", ["kv_memory_bytes: a number is accepted"]),
        ([], {}, "drain_seconds = true", ["drain_seconds: a number is accepted"]),
        ([], {}, "insecure = 1", ["insecure: true or false is accepted, not a number"]),
        (["--max-queue", "0"], {}, None, ["flag --max-queue: at least 1 is accepted (got '0')"]),
        (["--max-queue", "many"], {}, None, ["flag --max-queue", "whole number"]),
        ([], {"GRAFTWORK_DTYPE": "float16"}, None, ["GRAFTWORK_DTYPE", "float32"]),
        (["--drain-seconds", "nan"], {}, None, ["--drain-seconds"]),
        (["--drain-seconds", "inf"], {}, None, ["--drain-seconds"]),
        (["--listen", "8470"], {}, None, ["HOST:PORT"]),
        (["--listen", "::1:8470"], {}, None, ["brackets"]),
        (["--listen", "localhost:99999"], {}, None, ["65535"]),
        (["--model", ""], {}, None, ["model", "empty"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(argv, environ, file, words, tmp_path):
    if file is not None:
        (tmp_path / "settings.toml").write_text(file)
        argv = [*argv, "--config", str(tmp_path / "settings.toml")]
    with pytest.raises(ConfigError) as caught:
        load(*argv, environ=environ)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load("--config", str(tmp_path / "none.toml"))


def test_all_that_is_wrong_is_said_at_once_and_each_once(tmp_path):
    (tmp_path / "settings.toml").write_text('max_queue = 0\nmodell = "x"\ndtype = "float16"\n')
    environ = {
        "GRAFTWORK_THREADS": "many",
        "GRAFTWORK_TREADS": "1",
        "GRAFTWORK_CONFIG": str(tmp_path / "settings.toml"),
    }
    with pytest.raises(ConfigError) as caught:
        load("--nonsense", "--max-sequences", "0", environ=environ)
    problems = caught.value.problems
    assert len(problems) == len(set(problems)) == 7
    for name in (
        "--nonsense",
        "--max-sequences",
        "GRAFTWORK_THREADS",
        "GRAFTWORK_TREADS",
        "max_queue",
        "modell",
        "dtype",
    ):
        assert sum(f"{name}:" in problem for problem in problems) == 1, problems


def test_sizes_have_units(tmp_path):
    sizes = {"2GiB": 2 << 30, "1.5 GB": 1_500_000_000, "512mib": 512 << 20, "10KB": 10_000, "7": 7, "3B": 3}
    for text, size in sizes.items():
        assert load("--kv-memory-bytes", text).config.kv_memory_bytes == size
        assert load(environ={"GRAFTWORK_MAX_UPLOAD_BYTES": text}).config.max_upload_bytes == size
        (tmp_path / "settings.toml").write_text(f'max_dataset_bytes = "{text}"')
        assert load("--config", str(tmp_path / "settings.toml")).config.max_dataset_bytes == size


def test_every_size_takes_units():
    names = [name for name in ServerConfig.model_fields if name.endswith("_bytes")]
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", "1MiB")]
    config = load(*flags).config
    assert len(names) >= 5
    assert {getattr(config, name) for name in names} == {1 << 20}


def test_a_port_keeps_the_host():
    assert load("--port", "9").config.listen == "127.0.0.1:9"
    assert load("--port", "9", environ={"GRAFTWORK_LISTEN": "[::1]:8"}).config.listen == "[::1]:9"
    assert load("--port", "9").sources["listen"] == "flag --port"


def test_client_variables_are_no_settings():
    load(
        environ={
            "GRAFTWORK_ADDRESS": "x:1",
            "GRAFTWORK_FAILPOINT": "x",
            "GRAFTWORK_KERNELS_MARCH": "znver4",
            "PATH": "/bin",
        }
    )


def test_every_field_says_what_it_is_and_its_default():
    for name, field in ServerConfig.model_fields.items():
        assert field.description, name
        assert "Default: " in field.description, name


def test_docstrings_of_fields_are_read_from_the_source():
    """use_attribute_docstrings needs a literal under each field."""
    tree = ast.parse(inspect.getsource(config_module))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ServerConfig").body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert all(isinstance(body[i + 1], ast.Expr) for i in fields)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:8470", ("::1", 8470)), ("localhost:1", ("localhost", 1))],
)
def test_listen_addresses(listen, expected):
    assert parse_listen(listen) == expected


def test_data_dir_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load().config.data_dir == str(tmp_path / "graftwork")
