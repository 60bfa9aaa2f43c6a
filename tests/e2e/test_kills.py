"""While a job trains: the base is in memory once, serving goes on, and no killed process takes anything with it.

The tests share one job where they can: it is killed in every way there is and still has to succeed.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests import toys
from tests.e2e.reference import PROMPT
from tests.e2e.rows import prompt_rows
from tests.e2e.serving import START_SECONDS, Server, eventually

from graftwork import Generation, TuningEvent, TuningJob, UnavailableError

pytestmark = pytest.mark.timeout(900)

MAPPING = "graftwork-base-weights"
STEPS = 100


class Life:
    """A data directory, the server on it, which is killed and started again, and a job that outlives it."""

    def __init__(self, model_dir: Path, data_dir: Path) -> None:
        self._model_dir, self._data_dir = model_dir, data_dir
        self._job_id = ""
        self._seen = 0
        self._start()

    def _start(self) -> None:
        self.server = Server(self._model_dir, self._data_dir, "--drain-seconds", "300")
        self.client = self.server.client()

    def restart(self) -> None:
        """A new server on the same data directory, once the old one is gone."""
        self.client.close()
        self.server.process.wait(START_SECONDS)
        self._start()

    def close(self) -> None:
        self.client.close()
        self.server.close()

    def job(self) -> TuningJob:
        """A running job whose tuner has just made a checkpoint: the one there is, or a new one."""
        if not self._job_id or self.client.tuning.get(self._job_id).done:
            config = {"max_steps": STEPS, "batch_size": 4, "checkpoint_steps": 2, "r": 4}
            rows = self.client.datasets.upload(prompt_rows(16))
            job = self.client.tuning.create(strategy="lora", dataset=rows, adapter="survivor", config=config)
            self._job_id, self._seen = job.id, 0
        self.next_event(lambda event: event.checkpoint_step is not None)
        return self.client.tuning.get(self._job_id)

    def next_event(self, wanted: Callable[[TuningEvent], object]) -> TuningEvent:
        """The job's next event of a kind. Fails the test if the job ends without it."""
        for event in self.client.tuning.get(self._job_id).events(self._seen, timeout=600):
            self._seen = event.sequence
            if wanted(event):
                return event
        info = self.client.tuning.get(self._job_id).info
        raise AssertionError(f"the job is {info.state}: {info.error}")

    def assert_job_goes_on(self) -> None:
        """The job must say which checkpoint it goes on from, and report the next step that it has not reported yet."""
        note = self.next_event(lambda event: event.message and "from the checkpoint of step" in event.message)
        step = int(re.findall(r"\d+", note.message or "")[-1])
        assert step >= 2
        progress = self.next_event(lambda event: event.progress).progress
        assert progress is not None
        assert progress.step >= step + 1

    def assert_every_step_is_reported_once(self) -> None:
        """However often the job was broken off."""
        events = list(self.client.tuning.get(self._job_id).events(0, timeout=600))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.progress.step for event in events if event.progress] == list(range(1, STEPS + 1))
        checkpoints = [event.checkpoint_step for event in events if event.checkpoint_step is not None]
        assert checkpoints == list(range(2, STEPS, 2))

    def answer(self, model: str = "base") -> Generation:
        """A short answer that depends on the weights alone."""
        return self.client.generate(model, PROMPT, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """A server over about 40 MB of weights, enough to tell a copy from noise, with the adapter `kept`."""
    folder = tmp_path_factory.mktemp("kills")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4}
    others = {"max_position_embeddings": 100_000, "initializer_range": 0.02}
    model_dir = toys.make_text_model(folder / "model", **sizes, **others)
    lived = Life(model_dir, folder / "data")
    lived.client.adapters.create("kept", toys.make_adapter(model_dir, folder / "adapter"))
    yield lived
    lived.close()


def weights_mapping(process: psutil.Process) -> dict[str, int]:
    """Bytes of the process's mappings of the base weights by kind: Size, Rss, Pss, Private_Dirty, ..."""
    totals: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = MAPPING in line
        elif inside and line.endswith(" kB"):
            kind, amount = line.split(":")
            totals[kind] = totals.get(kind, 0) + int(amount.split()[0]) * 1024
    return totals


def test_a_lora_job_shares_the_base_weights_and_serving_goes_on(life: Life) -> None:
    before = life.answer()
    engine = eventually(life.server.engine, "the engine")
    alone = weights_mapping(engine)
    size = alone["Size"]
    assert size > 20 << 20
    assert alone["Pss"] > 0.95 * alone["Rss"] > 0.9 * size

    life.job()
    tuner = eventually(life.server.tuner, "the tuner")
    for process in (engine, tuner):
        mapping = weights_mapping(process)
        assert mapping["Rss"] > 0.95 * size
        assert 0.45 * mapping["Rss"] < mapping["Pss"] < 0.55 * mapping["Rss"], mapping
        assert mapping["Private_Dirty"] < 0.01 * size
    assert sum(weights_mapping(process)["Pss"] for process in (engine, tuner)) < 1.05 * size

    assert life.answer().token_ids == before.token_ids
    assert life.answer("kept").token_ids != before.token_ids
    life.job()
    assert tuner.is_running()


def test_a_killed_tuner_goes_on_from_its_last_checkpoint(life: Life) -> None:
    life.job()
    before = life.answer()
    engine, tuner = life.server.engine(), eventually(life.server.tuner, "the tuner")
    tuner.kill()
    assert life.answer() == before
    died = life.next_event(lambda event: event.message)
    assert "signal 9" in (died.message or "")
    life.assert_job_goes_on()
    assert life.server.engine() == engine
    assert life.server.tuner() != tuner


def test_a_killed_engine_ends_its_streams_and_comes_back(life: Life) -> None:
    life.job()
    before = life.answer("kept")
    engine, tuner = eventually(life.server.engine, "the engine"), eventually(life.server.tuner, "the tuner")
    with life.client.generate("kept", PROMPT, max_tokens=90_000, ignore_eos=True, stream=True) as stream:
        next(stream)
        engine.kill()
        with pytest.raises(UnavailableError) as caught:
            list(stream)
    assert caught.value.reason == "ENGINE_RESTARTING"
    _, alive = psutil.wait_procs([engine, tuner], timeout=START_SECONDS)
    assert not alive

    def answers() -> Generation | None:
        try:
            return life.answer("kept")
        except UnavailableError:
            return None

    assert eventually(answers, "the new engine") == before
    life.assert_job_goes_on()


def test_a_killed_server_leaves_no_process_and_loses_nothing(life: Life) -> None:
    job = life.job()
    rows = life.client.datasets.upload(prompt_rows(16))
    waiting = life.client.tuning.create(strategy="lora", dataset=rows, adapter="never")
    assert waiting.cancel().state == "cancelled"
    before, adapters = life.answer("kept"), {adapter.digest for adapter in life.client.adapters.list()}
    started = life.server.descendants()
    assert len(started) >= 2

    life.server.process.kill()
    _, alive = psutil.wait_procs(started, timeout=START_SECONDS)
    assert not alive, "the engine or the tuner outlived the server"

    life.restart()
    assert life.answer("kept") == before
    assert {adapter.digest for adapter in life.client.adapters.list()} == adapters
    assert life.client.tuning.get(waiting.id).state == "cancelled"
    life.assert_job_goes_on()
    result = life.client.tuning.get(job.id).wait(timeout=600)
    assert result.adapter_version.startswith("adapters/survivor/versions/")
    assert life.answer("survivor").model == "survivor"
    life.assert_every_step_is_reported_once()
    # What it worked with is gone with it.
    assert not (life.server.data_dir / "jobs" / job.id).exists()


def is_refused(server: Server) -> bool:
    """Whether the server says UNAVAILABLE to a new call; any other error is raised."""
    with server.client() as client:
        try:
            client.tokenize("fox")
        except UnavailableError:
            return True
    return False


def test_a_terminated_server_finishes_its_streams_and_keeps_everything(life: Life) -> None:
    before = life.answer("kept")
    adapters = [replace(adapter, loaded=False) for adapter in life.client.adapters.list()]
    jobs = [job.info for job in life.client.tuning.list() if job.done]
    with life.client.generate("kept", PROMPT, max_tokens=600, ignore_eos=True, stream=True) as stream:
        tokens = list(next(stream).token_ids)
        life.server.process.send_signal(signal.SIGTERM)
        eventually(lambda: is_refused(life.server), "new calls to be refused")
        for chunk in stream:
            tokens += chunk.token_ids
    assert (len(tokens), chunk.finish_reason) == (600, "length")
    # To its last moment, and after it, the server is away and nothing else.
    while life.server.process.poll() is None:
        assert is_refused(life.server)
    assert is_refused(life.server)
    assert life.server.process.wait(START_SECONDS) == 0
    assert "Traceback" not in life.server.last_words()

    life.restart()
    assert life.answer("kept") == before
    assert [replace(adapter, loaded=False) for adapter in life.client.adapters.list()] == adapters
    assert [job.info for job in life.client.tuning.list() if job.done] == jobs
