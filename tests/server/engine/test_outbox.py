"""Outputs on their way to the front, over a real socket pair."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from graftwork_server.engine import outbox as outbox_module
from graftwork_server.engine.outbox import Outbox, default_messages_per_second
from graftwork_server.errors import InvalidArgument
from graftwork_server.types import ArtifactInfo
from graftwork_server.wire.engine import (
    EngineMessage,
    HeadInfo,
    Inspect,
    InspectReply,
    Pinned,
    Pooled,
    Reply,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
    engine_decoder,
)
from graftwork_server.wire.frames import encode_frame, receive_frame

NEVER = 1e-9
"""Messages per second: what is held back does not come by itself while a test runs."""
ALWAYS = 1_000_000_000

Start = Callable[[float], tuple[Outbox, socket.socket]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes an outbox that sends, and the other end of its connection."""
    with ExitStack() as stack:

        def make(messages_per_second: float) -> tuple[Outbox, socket.socket]:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            theirs.settimeout(10)
            outbox = Outbox(ours, messages_per_second)
            thread = threading.Thread(target=outbox.run)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(outbox.close)
            return outbox, theirs

        yield make


def received(end: socket.socket) -> EngineMessage:
    return engine_decoder.decode(receive_frame(end))


def outputs(end: socket.socket) -> list[tuple[int, list[int], str]]:
    message = received(end)
    assert isinstance(message, StepOutputs)
    return [(output.id, output.token_ids, output.finish) for output in message.outputs]


def step(outbox: Outbox, *ids: int, token: int, finish: str = "") -> None:
    outbox.publish([SequenceOutput(id, [token], finish) for id in ids])


def test_first_outputs_are_sent_at_once_and_the_last_brings_what_was_held_back(start: Start) -> None:
    outbox, end = start(NEVER)
    step(outbox, 1, token=5)
    assert outputs(end) == [(1, [5], "")]
    step(outbox, 1, token=6)  # nothing was sent lately, so this one is too
    assert outputs(end) == [(1, [6], "")]
    step(outbox, 1, 2, token=7)
    assert outputs(end) == [(2, [7], "")]
    step(outbox, 1, 2, token=8)
    step(outbox, 1, token=9, finish="length")
    assert outputs(end) == [(1, [7, 8, 9], "length")]
    step(outbox, 2, token=9, finish="stop")
    assert outputs(end) == [(2, [8, 9], "stop")]


def test_what_was_held_back_comes_though_nothing_follows(start: Start) -> None:
    outbox, end = start(50)
    step(outbox, 1, token=5)
    assert outputs(end) == [(1, [5], "")]
    for token in (6, 7, 8):
        step(outbox, 1, token=token)
    seen: list[int] = []
    while len(seen) < 3:
        ((_, tokens, _),) = outputs(end)
        seen += tokens
    assert seen == [6, 7, 8]


def test_every_output_comes_at_once_where_messages_are_cheap(start: Start) -> None:
    outbox, end = start(ALWAYS)
    for token in range(20):
        step(outbox, 1, token=token)
        assert outputs(end) == [(1, [token], "")]


def test_a_cancelled_sequence_sends_nothing_more(start: Start) -> None:
    outbox, end = start(NEVER)
    for token in (5, 6):
        step(outbox, 1, 2, token=token)
        assert outputs(end) == [(1, [token], ""), (2, [token], "")]
    step(outbox, 1, 2, token=7)
    outbox.forget(1)
    outbox.close()
    assert outputs(end) == [(2, [7], "")]
    assert outbox._begun == {2}


def test_nothing_is_lost_when_it_closes(start: Start) -> None:
    outbox, end = start(NEVER)
    for token in (5, 6):
        step(outbox, 1, token=token)
        outputs(end)
    step(outbox, 1, token=7)
    step(outbox, 1, token=8)
    outbox.send(Reply(call_id=3, result=Pinned()))
    assert received(end) == Reply(call_id=3, result=Pinned())
    outbox.close()
    assert outputs(end) == [(1, [7, 8], "")]


def test_an_answer_does_not_overtake_the_end_of_a_sequence(start: Start) -> None:
    outbox, end = start(NEVER)
    for call_id in range(20):
        step(outbox, call_id, token=5, finish="stop")
        outbox.send(Reply(call_id=call_id, result=Pinned()))
    for call_id in range(20):
        assert outputs(end) == [(call_id, [5], "stop")]
        assert received(end) == Reply(call_id=call_id, result=Pinned())


def test_what_is_sent_as_one_keeps_its_log_probabilities(start: Start) -> None:
    outbox, end = start(NEVER)
    entries = [TokenLogprobs(token, -1.0, [(token, -1.0)]) for token in range(5)]
    for entry in entries[:-1]:
        outbox.publish([SequenceOutput(1, [entry.token_id], logprobs=[entry])])
    outbox.publish([SequenceOutput(1, [4], "length", logprobs=[entries[-1]])])
    found: list[TokenLogprobs] = []
    while len(found) < 5:
        message = received(end)
        assert isinstance(message, StepOutputs)
        (output,) = message.outputs
        assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids
        found += output.logprobs or ()
    assert found == entries


def test_the_default_grows_with_the_machine_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 250), (2, 500), (64, 5000)):
        monkeypatch.setattr(outbox_module.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_messages_per_second() == expected


def reply(call_id: int, strategy: str, rank: int = 1) -> Reply:
    info = ArtifactInfo(strategy=strategy, parameter_count=1, rank=rank, modules_bound=1)
    return Reply(call_id=call_id, result=InspectReply(info=info))


@pytest.mark.parametrize("bad", [reply(1, "\ud800"), reply(1, "lora", 1 << 64)], ids=["half a surrogate", "a number"])
def test_a_reply_that_cannot_be_sent_is_an_error_of_its_own_call(start: Start, bad: Reply) -> None:
    outbox, end = start(ALWAYS)
    outbox.send(bad)
    outbox.send(reply(2, "lora"))
    answer = received(end)
    assert isinstance(answer, Reply)
    assert (answer.call_id, answer.result) == (1, None)
    assert answer.error is not None
    assert answer.error.reason == "MESSAGE_NOT_SENDABLE"
    assert received(end) == reply(2, "lora")


def test_an_output_that_cannot_be_sent_ends_its_own_sequence() -> None:
    ours, theirs = socket.socketpair()
    broken: list[int] = []
    outbox = Outbox(ours, ALWAYS, broken.append)
    bad = SequenceOutput(2, [], "stop", pooled=Pooled(b"", HeadInfo(["\ud800"], "x")))
    outbox.publish([SequenceOutput(1, [5], "stop"), bad, SequenceOutput(3, [7], "stop")])
    outbox.close()
    with ours, theirs:
        outbox.run()
        assert [outputs(theirs) for _ in range(3)] == [[(1, [5], "stop")], [(2, [], "error")], [(3, [7], "stop")]]
    assert broken == [2]


def test_what_no_frame_can_hold_is_refused() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("\ud800", 1 << 64, nested, object()):
        with pytest.raises(InvalidArgument) as caught:
            encode_frame([value])
        assert caught.value.reason == "MESSAGE_NOT_SENDABLE"
    with pytest.raises(InvalidArgument, match="Inspect"):
        encode_frame(Inspect(call_id=1, path="\ud800"))
