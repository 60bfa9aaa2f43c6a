"""stream.py against `decode` of everything at once."""

from __future__ import annotations

from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.text.text_harness import BYTE_LEVEL, SENTENCEPIECE

from graftwork_server.text import IncrementalDetokenizer, StopMatcher, TextProcessor

processors = st.sampled_from([BYTE_LEVEL, SENTENCEPIECE])


@st.composite
def sequences(draw: st.DrawFn) -> tuple[TextProcessor, list[list[int]]]:
    """A processor and a token stream in chunks: text in any script, or any ids at all."""
    text = draw(processors)
    any_ids = st.lists(st.integers(0, text.vocab_size - 1), max_size=30)
    some_text = st.text(alphabet=st.sampled_from("the quick é你世👩\u200d👧🎉\ufffd\n"), max_size=20)
    ids = draw(st.one_of(any_ids, some_text.map(text.encode)))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=10)))
    return text, [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@given(sequences(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole(sequence: tuple[TextProcessor, list[list[int]]], skip: bool) -> None:
    text, chunks = sequence
    whole = text.decode([*chain(*chunks)], skip_special_tokens=skip)
    for stream in (chunks, [[id] for id in [*chain(*chunks)]]):
        detokenizer = IncrementalDetokenizer(text, skip_special_tokens=skip)
        joined = ""
        for chunk in stream:
            joined += detokenizer.feed(chunk).text
            assert whole.startswith(joined)
        assert joined + detokenizer.finish().text == whole


@given(sequences(), st.lists(st.text(alphabet="the q🎉é你", min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_stop_texts_end_the_stream_where_they_first_complete(
    sequence: tuple[TextProcessor, list[list[int]]], stops: list[str]
) -> None:
    text, chunks = sequence
    whole = text.decode([*chain(*chunks)])
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    detokenizer = IncrementalDetokenizer(text, stops)
    pieces = [*(detokenizer.feed(chunk) for chunk in chunks), detokenizer.finish()]
    joined = "".join(piece.text for piece in pieces)
    if not ends:
        assert (joined, pieces[-1].stop) == (whole, None)
        return
    end, _, stop = min(ends)
    assert pieces[-1].stop == stop
    assert joined == whole[: end - len(stop)]


def test_an_emoji_comes_whole() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert [detokenizer.feed([id]).text for id in BYTE_LEVEL.encode("a𐍈b")] == ["a", "", "", "", "𐍈", "b"]


def test_text_that_may_become_a_stop_is_held_back_and_released() -> None:
    matcher = StopMatcher(["END", "ND!"])
    assert [matcher.feed(piece).text for piece in ("xE", "N", "E", "N", "x")] == ["x", "", "EN", "", "ENx"]
    assert (matcher.feed("EN").text, matcher.flush()) == ("", "EN")
    matcher = StopMatcher(["END", "ND!"])
    assert [matcher.feed(piece).stop for piece in ("E", "N", "D")] == [None, None, "END"]


def test_rubbish_bytes_cost_a_bounded_time_each() -> None:
    continuation = BYTE_LEVEL.encode("𐍈")[-1]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    joined = ""
    for _ in range(500):
        joined += detokenizer.feed([continuation]).text
        assert len(detokenizer._window) <= 17
    assert joined + detokenizer.finish().text == "\ufffd" * 500
