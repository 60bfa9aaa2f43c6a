"""The prefix cache over gRPC: who finds what, what the usage says, and names that are made anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests import toys
from tests.e2e.reference import Reference
from tests.e2e.serving import Server, run_cli

from graftwork import Client

PROMPT = [3 + (7 * index) % 240 for index in range(50)]
GREEDY = {"max_tokens": 12, "ignore_eos": True}


def test_usage_says_what_was_cached_and_salts_share_nothing(client: Client, model_dir: Path) -> None:
    reference = Reference(model_dir)
    course = [("", 0), ("", 48), ("one", 0), ("two", 0), ("one", 48), ("x" * 256, 0)]
    for salt, cached in course:
        answer = client.generate("base", PROMPT, cache_salt=salt, **GREEDY)
        assert answer.usage.cached_tokens == cached, salt
        assert answer.usage.prompt_tokens == 50
        reference.assert_greedy(PROMPT, answer.token_ids)
    several = client.generate("base", PROMPT, n=3, **GREEDY)
    assert several.usage.cached_tokens == 48, "of the first completion alone"


def test_a_conversation_goes_on_where_it_was(client: Client) -> None:
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 3}]
    first = client.chat("base", messages, cache_salt="talk", priority=5, **GREEDY)
    again = client.chat("base", messages, cache_salt="talk", priority=-5, **GREEDY)
    other = client.chat("base", messages, cache_salt="other", **GREEDY)
    assert (first.usage.cached_tokens, other.usage.cached_tokens) == (0, 0)
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 16
    assert first.token_ids == again.token_ids == other.token_ids


def test_a_name_made_anew_meets_nothing_of_the_old_one(client: Client, model_dir: Path, tmp_path: Path) -> None:
    directories = [toys.make_adapter(model_dir, tmp_path / str(seed), seed) for seed in (60, 61)]
    answers = []
    for which in (0, 1, 0):
        client.adapters.create("anew", directories[which])
        answer = client.generate("anew", PROMPT, **GREEDY)
        Reference(model_dir, directories[which]).assert_greedy(PROMPT, answer.token_ids)
        assert client.generate("anew", PROMPT, **GREEDY).usage.cached_tokens == 48
        answers.append(answer)
        client.adapters.delete("anew")
    assert answers[0].token_ids != answers[1].token_ids
    assert [answer.usage.cached_tokens for answer in answers] == [0, 0, 48], "the same files are the same adapter"


@pytest.fixture
def without(model_dir: Path, tmp_path: Path) -> Server:
    return Server(model_dir, tmp_path / "data", "--no-prefix-cache", "--max-sequences", "1")


def test_the_command_line_shows_it_and_a_setting_turns_it_off(client: Client, server: Server, without: Server) -> None:
    arguments = ["generate", "base", "--token-ids", ",".join(map(str, PROMPT)), "--max-tokens", "2", "--json"]
    try:
        for running, cached in ((server, 48), (without, 0)):
            for expected in (0, cached):
                done = run_cli(*arguments, "--cache-salt", "cli", "--priority", "3", address=running.address)
                assert done.returncode == 0, done.stderr
                assert json.loads(done.stdout)["usage"]["cached_tokens"] == expected
    finally:
        without.close()
