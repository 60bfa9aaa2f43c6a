"""Strangers' tokenizers and templates in real helper processes: equal answers, and nothing they do hurts anybody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tests import hostile, toys
from tests.processes import helpers
from tests.waiting import until
from tokenizers import AddedToken, Tokenizer

from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument, ResourceExhausted
from graftwork_server.text import IncrementalDetokenizer, TextProcessor
from graftwork_server.text.strangers.adapter_text import AdapterTexts
from graftwork_server.text.strangers.helper import NICENESS
from graftwork_server.text.strangers.helper_pool import QUEUE_PER_MARKED_KEY, HelperPool
from graftwork_server.text.strangers.isolated_text import LARGE_TEXT_CHARACTERS, IsolatedTexts

MEBIBYTE = 1 << 20
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "the fox"}]
VOCABULARY = 320


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toys.save_tokenizer(folder)
    return folder


@pytest_asyncio.fixture
async def texts(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[IsolatedTexts]:
    monkeypatch.setattr("graftwork_server.text.strangers.isolated_text.SECONDS", 1.0)
    pool = HelperPool("adapters' texts", [str(VOCABULARY), str(base_dir)], count=3)
    yield IsolatedTexts(AdapterTexts(TextProcessor.from_dir(base_dir), str(base_dir), VOCABULARY), pool)
    await asyncio.to_thread(pool.close)
    assert helpers(base_dir) == []


def brings(folder: Path, template: str | None = None, document: dict[str, Any] | None = None) -> Path:
    """An adapter's folder with a chat template or tokenizer.json of its own."""
    folder.mkdir(exist_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if document is not None:
        (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


async def chat(texts: IsolatedTexts, folder: Path, content: str = "the fox") -> list[int]:
    text = await texts.of(str(folder), folder)
    assert text is not None
    messages = [{"role": "user", "content": content}]
    return await texts.run(text, len(content), lambda text: text.encode_chat(messages), "messages")


async def test_a_tokenizer_of_its_own_says_here_what_it_says_there(
    texts: IsolatedTexts, base_dir: Path, tmp_path: Path
) -> None:
    """Compared with the same files read in this process."""
    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|tool|>", special=True)])
    tokenizer.add_tokens([AddedToken("fox", lstrip=True)])
    folder = brings(tmp_path, "{% for m in messages %}[{{ m.content }}{% endfor %}{{ eos_token }}")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|tool|>"}))
    there = AdapterTexts(texts.base, str(base_dir), VOCABULARY).read(folder)
    here = await texts.of("a", folder)
    assert here is not None
    assert there is not None
    sample = "the quick <|tool|> fox\n\u00e9\u4e16\U0001f98a  and so on</s>"
    messages = [*MESSAGES, {"role": "assistant", "content": "so"}]
    for method, arguments in (
        ("encode", [sample]),
        ("encode_plain", [sample]),
        ("encode_pair", [sample, "b"]),
        ("render_chat", [messages, True]),
        ("encode_chat", [messages]),
    ):

        def call(text: TextProcessor, method: str = method, arguments: list[Any] = arguments) -> Any:
            return getattr(text, method)(*arguments)

        assert await texts.run(here, 0, call) == call(there), method
    ids = there.encode(sample)
    for skip in (True, False):
        assert here.decode(ids, skip) == there.decode(ids, skip)
        ours, theirs = IncrementalDetokenizer(here, ["so"], skip), IncrementalDetokenizer(there, ["so"], skip)
        assert [ours.feed([id]) for id in ids] == [theirs.feed([id]) for id in ids]
        assert ours.finish() == theirs.finish()
    known = range(there.greatest_id + 2)
    assert [here.token_text(id) for id in known] == [there.token_text(id) for id in known]
    for name in ("special_ids", "named_tokens", "eos_token_id", "greatest_id", "vocab_size", "has_chat_template"):
        assert getattr(here, name) == getattr(there, name), name
    with pytest.raises(RuntimeError, match="helper"):
        here.encode(sample)


async def test_what_says_the_same_is_the_base(texts: IsolatedTexts, base_dir: Path, tmp_path: Path) -> None:
    assert await texts.of("nothing", tmp_path) is texts.base
    brings(tmp_path, document=json.loads((base_dir / "tokenizer.json").read_text()))
    assert helpers(base_dir) == [], "equal bytes are compared here"
    own = await texts.of("formatted", tmp_path)
    helper = helpers(base_dir)[0]
    assert helper.nice() == NICENESS
    assert os.getsid(helper.pid) == helper.pid, "niceness counts within a session only"
    assert own is not None
    assert texts.base is not None
    assert await texts.run(own, 0, lambda text: text.encode("the fox")) == texts.base.encode("the fox")


async def test_a_long_text_is_tokenised_in_a_helper(texts: IsolatedTexts) -> None:
    """The library holds the interpreter's lock for as long as that takes."""
    assert texts.base is not None
    text = "the quick brown fox " * (LARGE_TEXT_CHARACTERS // 20 + 1)
    seen: list[TextProcessor] = []

    def encode(processor: TextProcessor) -> list[int]:
        seen.append(processor)
        return processor.encode(text)

    assert await texts.run(texts.base, len(text), encode) == texts.base.encode(text)
    assert seen[0] is not texts.base


@pytest.mark.parametrize("what", hostile.TOKENIZERS)
async def test_a_hostile_tokenizer_is_refused_and_nobody_notices(
    texts: IsolatedTexts, base_dir: Path, tmp_path: Path, what: str
) -> None:
    good = brings(tmp_path / "good", hostile.HARMLESS)
    expected = await chat(texts, good)
    document = json.loads((base_dir / "tokenizer.json").read_text())
    bad = brings(tmp_path / "bad", document=hostile.TOKENIZERS[what](document))
    before = psutil.Process().memory_info().rss
    with pytest.raises(FailedPrecondition) as caught:
        await texts.read(bad)
    assert caught.value.reason in ("TOKENIZER_INVALID", "TOKENIZER_MISMATCH")
    assert str(tmp_path) not in caught.value.message
    assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE
    assert await chat(texts, good) == expected


@pytest.mark.parametrize("what", ["spaced_added_token", "one_token_twice"])
async def test_added_tokens_cost_no_more_than_a_request_may(
    texts: IsolatedTexts, base_dir: Path, tmp_path: Path, what: str
) -> None:
    document = json.loads((base_dir / "tokenizer.json").read_text())
    folder = brings(tmp_path, document=getattr(hostile, what)(document))
    with contextlib.suppress(FailedPrecondition, InvalidArgument):  # or it is within the limits
        text = await texts.of("own", folder)
        assert text is not None
        await texts.run(text, 0, lambda text: text.encode(" ~" * 500_000))
    assert len(await chat(texts, brings(tmp_path / "good", hostile.HARMLESS))) > 0


@pytest.mark.parametrize("what", hostile.TEMPLATES)
async def test_a_hostile_template_is_stopped_and_the_next_one_renders(
    texts: IsolatedTexts, tmp_path: Path, what: str
) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(InvalidArgument) as caught:
        await chat(texts, brings(tmp_path / "bad", hostile.TEMPLATES[what]))
    assert caught.value.reason in ("CHAT_TEMPLATE_REJECTED", "TEXT_INVALID")
    assert caught.value.message.isprintable()
    assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE
    assert len(await chat(texts, brings(tmp_path / "good", hostile.HARMLESS))) > 0


async def test_a_template_sees_nothing_of_the_server(texts: IsolatedTexts, tmp_path: Path) -> None:
    for index, source in enumerate(
        ("{{ ''.__class__.__mro__ }}", "{{ dict.__globals__ }}", "{{ raise_exception.__globals__ }}")
    ):
        text = await texts.of(str(index), brings(tmp_path / str(index), source))
        assert text is not None
        try:
            rendered = await texts.run(text, 0, lambda text: text.render_chat(MESSAGES, True), "messages")
        except InvalidArgument:
            continue
        assert rendered == ""
    for source in ("{% for %}", "x" * 300_000):
        broken = await texts.of(source, brings(tmp_path / f"broken{len(source)}", source))
        assert broken is not None
        with pytest.raises(FailedPrecondition) as caught:
            await texts.run(broken, 0, lambda text: text.encode_chat(MESSAGES), "messages")
        assert caught.value.reason == "CHAT_TEMPLATE_BROKEN"
        assert await texts.run(broken, 0, lambda text: text.encode("the fox")), "everything but chat works"
    with pytest.raises(InvalidArgument, match="no such role"):
        await chat(texts, brings(tmp_path / "refusing", "{{ raise_exception('no such role') }}"))


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_looping_template_holds_one_helper(
    texts: IsolatedTexts, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten clients of it at once: others go on while the first of the ten still runs."""
    looping = brings(tmp_path / "looping", hostile.LOOPING)
    await texts.of(str(looping), looping)
    monkeypatch.setattr("graftwork_server.text.strangers.isolated_text.SECONDS", 600.0)
    clients = [asyncio.create_task(chat(texts, looping)) for _ in range(10)]
    for number in range(20):
        assert await chat(texts, brings(tmp_path / f"good{number % 3}", hostile.HARMLESS))
        assert len(helpers(base_dir)) <= 3
    assert not any(client.done() for client in clients)
    await end(clients)


async def test_an_offenders_queue_is_short_and_says_why(texts: IsolatedTexts, tmp_path: Path) -> None:
    looping = brings(tmp_path / "looping", hostile.LOOPING)
    await texts.of(str(looping), looping)
    clients = [asyncio.create_task(chat(texts, looping)) for _ in range(10)]
    await until(lambda: sum(client.done() for client in clients) >= 10 - QUEUE_PER_MARKED_KEY, 120)
    errors = [client.exception() for client in clients if client.done()]
    assert isinstance(errors[0], InvalidArgument), "it was the first"
    full = [error for error in errors if isinstance(error, ResourceExhausted)]
    assert len(full) == 10 - 1 - QUEUE_PER_MARKED_KEY
    assert {error.reason for error in full} == {"QUEUE_FULL"}
    assert "more time or memory than they may" in full[0].message
    await end(clients)


async def test_many_offenders_leave_a_helper_to_others(
    texts: IsolatedTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = brings(tmp_path / "good", hostile.HARMLESS)
    assert await chat(texts, good)
    folders = [brings(tmp_path / f"bad{number}", hostile.LOOPING) for number in range(4)]
    await asyncio.gather(*(chat(texts, folder) for folder in folders), return_exceptions=True)
    monkeypatch.setattr("graftwork_server.text.strangers.isolated_text.SECONDS", 600.0)
    again = [asyncio.create_task(chat(texts, folder)) for folder in folders]
    for _ in range(20):
        assert await chat(texts, good)
    assert not any(task.done() for task in again), "they are marked, and take turns with one helper"
    await end(again)


async def test_a_helper_that_is_killed_fails_its_request_and_no_other(
    texts: IsolatedTexts, base_dir: Path, tmp_path: Path
) -> None:
    looping, good = (
        brings(tmp_path / "looping", hostile.LOOPING),
        brings(tmp_path / "good", hostile.HARMLESS),
    )
    expected = await chat(texts, good)
    await texts.of(str(looping), looping)
    running = asyncio.create_task(chat(texts, looping))
    await asyncio.sleep(0.5)
    for helper in helpers(base_dir):
        helper.send_signal(signal.SIGKILL)
    with pytest.raises(GraftworkServerError) as caught:
        await running
    assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "HELPER_DIED")
    assert await chat(texts, good) == expected


async def test_helpers_that_are_not_used_are_ended(
    texts: IsolatedTexts, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftwork_server.text.strangers.helper_pool.IDLE_SECONDS", 0.2)
    good = brings(tmp_path / "good", hostile.HARMLESS)
    expected = await chat(texts, good)
    await until(lambda: not helpers(base_dir), 120)
    assert await chat(texts, good) == expected


async def test_a_helper_ends_with_the_process_that_started_it(base_dir: Path, tmp_path: Path) -> None:
    """Even in the middle of an endless loop."""
    folder = brings(tmp_path, hostile.LOOPING)
    code = (
        "import sys, os, json, threading, time\n"
        "from graftwork_server.text.strangers.helper import CallText, Helper\n"
        f"helper = Helper(['{VOCABULARY}', {str(base_dir)!r}])\n"
        "helper.limit(60)\n"
        f"request = CallText({str(folder)!r}, 'encode_chat', json.dumps({{'messages': {MESSAGES!r}}}))\n"
        "threading.Thread(target=helper.ask, args=(request,), daemon=True).start()\n"
        "time.sleep(1)\n"
        "print(helper._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    front = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert front.stdout is not None
    helper = psutil.Process(int(await front.stdout.readline()))
    assert helper.is_running()
    front.kill()
    await front.wait()
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [helper], 30)
    assert gone == [helper]
