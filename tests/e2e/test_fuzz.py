"""A short run of the fuzzer (tests/fuzz); `make fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.messages import METHODS, case_of
from tests.fuzz.run import Fuzzer


async def test_nothing_that_is_sent_is_a_defect(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path, seed=7)
    try:
        await fuzzer.run(range(2000), range(200))
    finally:
        fuzzer.close()
    assert not fuzzer.findings.failures
    met = {method for method, _ in fuzzer.findings.statuses}
    assert met == {method.name for method in METHODS}, "every method was called"
    good = {method for method, status in fuzzer.findings.statuses if status in ("OK", "LEFT")}
    assert {"Generate", "Chat", "Score", "CreateAdapter", "UploadDataset", "List", "ServerReflectionInfo"} <= good


def test_a_case_is_the_same_for_the_same_number() -> None:
    assert [case_of(3, number, "ds") for number in range(200)] == [case_of(3, number, "ds") for number in range(200)]
    assert case_of(3, 5, "ds") != case_of(4, 5, "ds")
