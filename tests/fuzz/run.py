"""A real server, many calls at once, and what must hold all the while."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2
from tests import toys
from tests.e2e.serving import Server
from tests.fuzz.files import ROWS, FileCase, Originals
from tests.fuzz.messages import Case, case_of

from graftwork.v1 import adapters_pb2, generation_pb2, tuning_pb2

ANSWER_SECONDS = 300.0
"""A call that has no answer by then has none; long, as the machine may have other things to do."""
WATCH_SECONDS = 0.3
"""Streams that never end by themselves are left after this."""
FRONT_GROWTH_BYTES = 512 << 20
AT_ONCE = 16
CHUNK = 1 << 20
BUSY_ATTEMPTS = 60
CLIENT_STATUS = "Internal error from Core"
"""grpc.aio's own status for a call that it could not write, made in the client: a server that refuses a stream while
requests are still written is answered so at times. It is not what the server said, so the call is made again."""
CLIENT_ATTEMPTS = 5
DEFECTS = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
WATCHES = {"/grpc.health.v1.Health/Watch", "/graftwork.v1.TuningService/WatchTuningJob"}
_SIGNS = re.compile(r"Traceback|never retrieved|panicked|CRITICAL|gave up")
_REQUEST = re.compile(r"\[(fuzz-[a-z]+-\d+)\]")
SERVICE = {"adapters": "/graftwork.v1.AdapterService", "text": "/graftwork.v1.GenerationService"}
TUNING = "/graftwork.v1.TuningService"


@dataclass
class Findings:
    """What came out."""

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    messages: int = 0
    """Cases that were sent."""
    files: int = 0
    calls: int = 0
    made_by_client: int = 0
    """Calls that were made again, as their status came from the client's own library."""
    front_bytes: int = 0
    front_peak_bytes: int = 0
    all_peak_bytes: int = 0

    def fail(self, case: str, what: str, **more: Any) -> None:
        """Notes what is wrong; of 200 on only that there is something."""
        if len(self.failures) < 200:
            self.failures.append({"case": case, "what": what, **more})
        else:
            self.failures[-1]["more"] = self.failures[-1].get("more", 0) + 1

    def note(self, case: str, method: str, status: str, reason: str, details: str) -> None:
        """One answer."""
        self.calls += 1
        self.statuses[method.rpartition("/")[2], status] += 1
        if status in DEFECTS:
            self.fail(case, status, method=method, reason=reason, details=details[:300])
        elif status not in ("OK", "LEFT", "CANCELLED") and not reason:
            self.fail(case, "a refusal without a reason", method=method, status=status, details=details[:300])


class Fuzzer:
    """One server under mutated calls."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.seed = seed
        self.findings = Findings()
        model = toys.make_text_model(scratch / "model")
        self.originals = Originals(model, scratch / "originals")
        self.server = Server(model, scratch / "data")
        self._log_read = 0
        self._dataset = ""

    def close(self) -> None:
        """Ends the server."""
        self.server.close()

    async def run(self, messages: range | list[int], files: range | list[int], seconds: float = math.inf) -> None:
        """Sends the cases with these numbers, many at once, each kind for at most so long, and looks at the server
        meanwhile and afterwards."""
        engine = self.server.engine()
        async with grpc.aio.insecure_channel(self.server.address) as self._channel:
            await self._prepare()
            front = psutil.Process(self.server.process.pid)
            self.findings.front_bytes = front.memory_info().rss
            watching = asyncio.create_task(self._watch(front))
            self.findings.messages = await self._all(messages, self._message, seconds)
            self.findings.files = await self._all(files, self._file, seconds)
            await asyncio.sleep(0.5)
            watching.cancel()
            await self._answers()
        self._look_at_log()
        after = self.server.engine()
        if self.server.process.poll() is not None:
            self.findings.fail("", "the server has ended", log=self.server.last_words()[-1000:])
        elif engine is None or after is None or engine.pid != after.pid:
            self.findings.fail("", "the engine was started again")
        growth = self.findings.front_peak_bytes - self.findings.front_bytes
        if growth > FRONT_GROWTH_BYTES:
            self.findings.fail("", f"the front grew by {growth} bytes")

    async def _all(self, numbers: range | list[int], one: Callable[[int], Awaitable[None]], seconds: float) -> int:
        waiting, end = iter(numbers), time.monotonic() + seconds

        async def worker() -> int:
            sent = 0
            while self.server.process.poll() is None and time.monotonic() < end:
                if (number := next(waiting, None)) is None:
                    break
                await one(number)
                sent += 1
            return sent

        return sum(await asyncio.gather(*(worker() for _ in range(AT_ONCE))))

    async def _watch(self, front: psutil.Process) -> None:
        """Memory, and the log, so that what is found has its place."""
        while True:
            with contextlib.suppress(psutil.Error):
                own = front.memory_info().rss
                everything = own + sum(child.memory_info().rss for child in front.children(recursive=True))
                self.findings.front_peak_bytes = max(self.findings.front_peak_bytes, own)
                self.findings.all_peak_bytes = max(self.findings.all_peak_bytes, everything)
            self._look_at_log()
            await asyncio.sleep(0.5)

    def _look_at_log(self) -> None:
        with self.server.log.open("rb") as log:
            log.seek(self._log_read)
            lines = log.read().decode("utf-8", "replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        self._log_read += sum(len(line.encode()) for line in lines)
        for number, line in enumerate(lines):
            if _SIGNS.search(line):
                around = "".join(lines[max(number - 1, 0) : number + 40])
                found = _REQUEST.search("".join(lines[max(number - 1, 0) : number + 1]))
                self.findings.fail(found[1] if found else "", "a word in the log", log=around[:3000])

    # ------------------------------------------------------------------------------------------ calls

    async def _prepare(self) -> None:
        """An adapter and a data set that cases name."""
        await self._upload("prepare", "good", self.originals.adapters["lora"] | self.originals.tokenizer)
        first = tuning_pb2.UploadDatasetRequest(upload=tuning_pb2.DatasetUpload())
        row = str(ROWS[1]).replace("'", '"')
        rows = tuning_pb2.UploadDatasetRequest(data=f"{row}\n".encode() * 4)
        case = Case(f"{TUNING}/UploadDataset", True, False, (first.SerializeToString(), rows.SerializeToString()))
        _, answer = await self._call("prepare", case)
        self._dataset = tuning_pb2.UploadDatasetResponse.FromString(answer or b"").dataset.dataset_id
        assert self._dataset, self.findings.failures

    async def _answers(self) -> None:
        """The server still answers."""
        request = generation_pb2.GenerateRequest(
            model="base", text="the", sampling=generation_pb2.SamplingParameters(max_tokens=1)
        )
        case = Case(f"{SERVICE['text']}/Generate", False, True, (request.SerializeToString(),))
        _, answer = await self._call("the end", case)
        if not answer:
            self.findings.fail("the end", "the server does not answer")

    async def _message(self, number: int) -> None:
        case = case_of(self.seed, number, self._dataset)
        await self._call(f"fuzz-messages-{number}", case)

    async def _file(self, number: int) -> None:
        name = f"fuzz-files-{number}"
        case = self.originals.case(self.seed, number)
        if "rows.jsonl" in case.files:
            await self._data_set(name, case)
            return
        adapter = f"f{number}"
        if await self._upload(name, adapter, case.files) is not None:
            for request, method, streams in _uses(adapter):
                made = Case(f"{SERVICE['text']}/{method}", False, streams, (request.SerializeToString(),))
                await self._call(name, made)
        gone = adapters_pb2.DeleteAdapterRequest(name=f"adapters/{adapter}").SerializeToString()
        await self._call(name, Case(f"{SERVICE['adapters']}/DeleteAdapter", False, False, (gone,)))

    async def _upload(self, name: str, adapter: str, files: dict[str, bytes]) -> bytes | None:
        infos = [adapters_pb2.FileInfo(name=file, size_bytes=len(data)) for file, data in files.items()]
        upload = adapters_pb2.AdapterUpload(adapter_id=adapter, files=infos, load=True, new_version=True)
        messages = [adapters_pb2.CreateAdapterRequest(upload=upload)]
        for file, data in files.items():
            chunks = [adapters_pb2.FileChunk(name=file, data=piece) for piece in _pieces(data)]
            messages += [adapters_pb2.CreateAdapterRequest(chunk=chunk) for chunk in chunks]
        sent = tuple(message.SerializeToString() for message in messages)
        return await self._sent_in_the_end(name, Case(f"{SERVICE['adapters']}/CreateAdapter", True, False, sent))

    async def _data_set(self, name: str, case: FileCase) -> None:
        data = case.files["rows.jsonl"]
        messages: list[Any]
        if case.stores:
            method, upload = "UploadDataset", tuning_pb2.DatasetUpload(size_bytes=len(data))
            messages = [tuning_pb2.UploadDatasetRequest(upload=upload)]
            messages += [tuning_pb2.UploadDatasetRequest(data=piece) for piece in _pieces(data)]
        else:
            method, check = "ValidateDataset", tuning_pb2.DatasetCheck()
            messages = [tuning_pb2.ValidateDatasetRequest(check=check)]
            messages += [tuning_pb2.ValidateDatasetRequest(data=piece) for piece in _pieces(data)]
        sent = tuple(message.SerializeToString() for message in messages)
        await self._sent_in_the_end(name, Case(f"{TUNING}/{method}", True, False, sent))

    async def _sent_in_the_end(self, name: str, case: Case) -> bytes | None:
        """The answer, None for a refusal other than that the server has too much to do: then it is sent again."""
        for attempt in range(BUSY_ATTEMPTS):
            status, answer = await self._call(name, case)
            if status != "RESOURCE_EXHAUSTED":
                return answer
            await asyncio.sleep(0.1 * (attempt + 1))
        self.findings.fail(name, f"refused {BUSY_ATTEMPTS} times as there was too much to do", method=case.method)
        return None

    async def _call(self, name: str, case: Case) -> tuple[str, bytes | None]:
        """The status that the server gave, noted, and the last answer, None for a refusal."""
        for _ in range(CLIENT_ATTEMPTS):
            status, answer, trailers, details = await self._called(name, case)
            if details != CLIENT_STATUS or trailers:
                break
            self.findings.made_by_client += 1
        self.findings.note(name, case.method, status, _reason(trailers), details)
        return status, answer if status == "OK" else None

    async def _called(self, name: str, case: Case) -> tuple[str, bytes, tuple[tuple[str, Any], ...], str]:
        """Status, last answer, trailers and details of one call."""
        metadata = (("x-request-id", name),)
        limits: dict[str, Any] = {"timeout": ANSWER_SECONDS, "metadata": metadata}
        kind = f"{'stream' if case.streams_requests else 'unary'}_{'stream' if case.streams_responses else 'unary'}"
        # No serialisers: bytes are sent and received as they are.
        make = getattr(self._channel, kind)(case.method)
        call = make(_sent(case), **limits) if case.streams_requests else make(case.messages[0], **limits)
        answer, status = b"", "OK"
        try:
            if case.cancel_after is not None:
                await asyncio.sleep(0.001 * case.cancel_after)
                call.cancel()
            if case.streams_responses:
                answer, status = await _read(call, leaves=case.method in WATCHES)
            else:
                answer = await call
        except asyncio.CancelledError:
            if case.cancel_after is None:
                raise
            status = "CANCELLED"
        except grpc.RpcError:
            pass
        if status == "OK":
            status = (await call.code()).name
        trailers = tuple(await call.trailing_metadata() or ()) if status not in ("LEFT", "CANCELLED") else ()
        details = str(await call.details() or "") if status not in ("OK", "LEFT", "CANCELLED") else ""
        return status, answer, trailers, details


def _pieces(data: bytes) -> list[bytes]:
    return [data[begin : begin + CHUNK] for begin in range(0, len(data), CHUNK)]


def _uses(adapter: str) -> list[tuple[Any, str, bool]]:
    """What a client does with an adapter: tokenise, chat, generate."""
    turn = generation_pb2.ChatMessage(role="user", content="the quick fox")
    sampling = generation_pb2.SamplingParameters(max_tokens=2)
    return [
        (generation_pb2.TokenizeRequest(model=adapter, text="the quick brown fox"), "Tokenize", False),
        (generation_pb2.ChatRequest(model=adapter, messages=[turn], sampling=sampling), "Chat", True),
        (generation_pb2.GenerateRequest(model=adapter, text="the quick", sampling=sampling), "Generate", True),
    ]


async def _sent(case: Case) -> AsyncIterator[bytes]:
    for message in case.messages:
        yield message


async def _read(call: Any, *, leaves: bool) -> tuple[bytes, str]:
    """The last message of a stream, and LEFT if it was left before its end."""
    last = b""
    try:
        async with asyncio.timeout(WATCH_SECONDS if leaves else None):
            while (message := await call.read()) is not grpc.aio.EOF:
                last = message or b"\n"
    except TimeoutError:
        call.cancel()
        return last, "LEFT"
    return last or b"\n", "OK"


def _reason(trailers: tuple[tuple[str, Any], ...]) -> str:
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""
