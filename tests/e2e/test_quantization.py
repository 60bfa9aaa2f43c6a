"""`graftwork serve --quantization` as a user meets it: adapters, jobs, and what keeps the server from starting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests import toys
from tests.e2e.rows import prompt_rows
from tests.e2e.serving import Server
from tests.e2e.test_start_up import failure

from graftwork import Client, FailedPreconditionError

TEXT = "one two three > three two one"
CLOSE = 1.0
"""Bits may cost a random model this much of a mean log probability; a wrong adapter costs more."""


def mean_logprob(client: Client, name: str) -> float:
    scored = client.score(name, TEXT)
    return scored.total_logprob / (len(scored.tokens) - 1)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_and_jobs_on_a_quantised_base(kind: str, client: Client, model_dir: Path, tmp_path: Path) -> None:
    adapter = toys.make_adapter(model_dir, tmp_path / "adapter")
    client.adapters.create(f"plain-{kind}", adapter)
    server = Server(model_dir, tmp_path / "data", "--quantization", kind)
    try:
        assert f", float32 on cpu, {kind}) on" in server.greeting
        with server.client() as quantised:
            # Made for the base as it was, served on the quantised one.
            quantised.adapters.create("plain", adapter)
            for ours, theirs in (("base", "base"), ("plain", f"plain-{kind}")):
                assert mean_logprob(quantised, ours) == pytest.approx(mean_logprob(client, theirs), abs=CLOSE)
            assert abs(mean_logprob(quantised, "plain") - mean_logprob(quantised, "base")) > 1e-3

            dataset = quantised.datasets.upload(prompt_rows(24))
            settings = {"max_steps": 10, "batch_size": 8, "learning_rate": 5e-3, "r": 4}
            job = quantised.tuning.create(strategy="lora", dataset=dataset, adapter="tuned", config=settings, load=True)
            events = list(job.events(timeout=280))
            assert [event.state for event in events if event.kind == "state"][-1] == "succeeded"
            before, after = (quantised.score(name, TEXT).total_logprob for name in ("base", "tuned"))
            assert after > before

            with pytest.raises(FailedPreconditionError) as refused:
                quantised.tuning.create(strategy="full", dataset=dataset, adapter="whole")
            assert refused.value.reason == "NOT_TRAINABLE"
            assert "--quantization none" in str(refused.value)
            checkpoint = toys.make_checkpoint(model_dir, tmp_path / "checkpoint")
            with pytest.raises(FailedPreconditionError) as refused:
                quantised.adapters.create("whole", checkpoint)
            assert refused.value.reason == "ARTIFACT_REJECTED"
    finally:
        server.close()


def test_a_base_that_is_not_quantised_is_nothing_for_qlora(client: Client) -> None:
    dataset = client.datasets.upload(prompt_rows(8, start=90))
    with pytest.raises(FailedPreconditionError) as refused:
        client.tuning.create(strategy="qlora", dataset=dataset, adapter="q")
    assert refused.value.reason == "NOT_TRAINABLE"
    assert "--quantization nf4" in str(refused.value)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    code, line = failure("--quantization", "fp4", "--data-dir", str(tmp_path))
    assert code == 2
    assert "flag --quantization" in line
    assert "nf4" in line
    assert "int8" in line


def test_a_missing_library_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "bitsandbytes.py").write_text("raise ModuleNotFoundError('No module named bitsandbytes')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "shadow"), os.environ.get("PYTHONPATH", "")]))
    code, line = failure(
        "--model", str(model_dir), "--data-dir", str(tmp_path / "data"), "--quantization", "nf4", PYTHONPATH=path
    )
    assert code == 1
    assert "graftwork[quant]" in line
