"""Regular expressions of clients: PEFT's answers, within limits of time and memory."""

from __future__ import annotations

import gc
import re
import time

import psutil
import pytest

from graftwork_plugins.peft_format.patterns import PatternError, PatternMatcher

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "q_proj", "a{e<=1}", "x\n"]


def helpers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "pattern_process.py" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.[01]\.self_attn\.(q|v)_proj",
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        "",
        ".*",
        r"(?i)LM_HEAD",
        r"model\.(?!layers\.0).*",
        "a{e<=1}",  # letters to `re`, errors that are allowed to other libraries
        "x$",
        r"^lm_head|^q_.*",
        "(?P<a>lm)_head",
    ],
)
def test_answers_are_those_of_re(pattern: str) -> None:
    matcher = PatternMatcher()
    for name in NAMES:
        assert matcher.fullmatch(pattern, name) == bool(re.fullmatch(pattern, name)), name
        expected = bool(re.fullmatch(rf"(.*\.)?({pattern})", name)) if not pattern.startswith("(?i)") else None
        if expected is not None:
            assert (matcher.first_match(["nothing", pattern], name) == pattern) == expected, name


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "(?R)",
        "(?1)(a)",
        r"\p{L}",
        "(?&x)",
        "[",
        "a**",
        "\ud800(",
        "(?P<n>a)(?P<n>b)",
        "(" * 2000,
        "a{99999999999}",
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_what_re_does_not_take_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="no regular expression"):
        PatternMatcher().fullmatch(pattern, "model.layers.0")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*b", "(.*)*x", "(a*)*(b*)*c", r"(.*\.?)*\1x", "(?:a?){60}a{60}"],
)
def test_what_takes_too_long_or_too_much_is_refused(pattern: str) -> None:
    """In bounded processor time of a process of its own, which ends."""
    matcher = PatternMatcher()
    own = time.process_time()
    with pytest.raises(PatternError, match="too long"):
        matcher.fullmatch(pattern, "a" * 60 + "!")
    with pytest.raises(PatternError, match="too long"):
        matcher.fullmatch("(b|c)", "b")
    assert time.process_time() - own < 1
    del matcher
    gc.collect()
    assert not helpers()


def test_memory_is_bounded() -> None:
    matcher = PatternMatcher()
    pattern = "(?:" * 3 + "x{0,65000}" + "){0,65000}" * 3 + "y"
    with pytest.raises(PatternError):
        matcher.fullmatch(pattern, "x" * 4000)


def test_a_matcher_leaves_no_process_and_asks_once() -> None:
    matcher = PatternMatcher()
    assert not helpers(), "plain names need none"
    assert matcher.first_match(["q_proj", "x.y"], "a.q_proj") == "q_proj"
    assert not helpers()
    for _ in range(3):
        assert matcher.first_match(["v_.*", "q_.*"], "a.q_proj") == "q_.*"
    assert len(helpers()) == 1
    assert len(matcher._answered) == 1
    del matcher
    gc.collect()
    assert not helpers()


def test_many_patterns_are_one_question() -> None:
    """PEFT writes a key for each module."""
    matcher = PatternMatcher()
    keys = [f"^model\\.layers\\.{layer}\\.q_proj" for layer in range(300)]
    for layer in range(0, 300, 30):
        assert matcher.first_match(keys, f"model.layers.{layer}.q_proj") == keys[layer]
    with pytest.raises(PatternError, match="together"):
        matcher.first_match(["(a)" * 1000 + str(number) for number in range(1000)], "x")
    with pytest.raises(PatternError, match="at most 4096"):
        matcher.first_match(["q_proj"] * 5000, "x")


@pytest.mark.parametrize(
    "key", ["q_proj", "self.q_proj", "q", "", ".", "a.b.q_proj", "xq_proj", "q-proj", "...", "proj"]
)
@pytest.mark.parametrize(
    "name", ["q_proj", "a.self.q_proj", "a.b.q_proj", "aself.q_proj", "a.", "", "b\n.q_proj", "a.\n"]
)
def test_plain_names_are_matched_as_expressions(key: str, name: str) -> None:
    assert PatternMatcher().fullmatch(key, name) == bool(re.fullmatch(key, name))
    assert (PatternMatcher().first_match([key], name) == key) == bool(re.fullmatch(rf"(.*\.)?({key})", name))


def test_many_plain_names_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 of them for each of a model's modules would be minutes in `re`, which keeps the interpreter meanwhile."""
    matcher, keys = PatternMatcher(), [f"layers.{number}.q_proj" for number in range(4096)]
    with monkeypatch.context() as patched:  # pytest's own reports compile some
        patched.setattr(re, "_compile", lambda *_: pytest.fail("an expression is compiled"))
        for number in range(0, 4096, 64):
            assert matcher.first_match(keys, f"model.layers.{number}.q_proj") == f"layers.{number}.q_proj"
