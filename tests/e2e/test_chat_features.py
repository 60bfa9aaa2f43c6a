"""Chat over gRPC: tools, messages that are continued, and adapters that bring their own tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import toys
from tests.e2e.reference import Reference
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from graftwork import Client, FailedPreconditionError, InvalidArgumentError, NotFoundError

TEMPLATE = (
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] {{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.tool_call_id }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "quick", "parameters": {"type": "object", "n": 2, "x": 0.5}}}]
CALLS = [{"id": "c1", "function": {"name": "quick", "arguments": {"n": 1}}}]
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "how quick is the fox"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "five", "tool_call_id": "c1", "name": "quick"},
]


@pytest.fixture(scope="module")
def own_dir(client: Client, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that brings a token and a template, served as "own"."""
    directory = toys.make_adapter(model_dir, tmp_path_factory.mktemp("own") / "adapter", seed=4)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    # In the place of one that the model has already: this toy's vocabulary has no free rows.
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        if token["content"] == "<|system|>":
            token["content"] = "<|end|>"
    document["model"]["vocab"]["<|end|>"] = document["model"]["vocab"].pop("<|system|>")
    (directory / "tokenizer.json").write_text(json.dumps(document))
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config.pop("extra_special_tokens", None)
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|end|>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    client.adapters.create("own", directory)
    return directory


def test_tools_and_tool_calls_reach_the_template(client: Client, own_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(own_dir)
    expected = theirs.apply_chat_template(CONVERSATION, tools=TOOLS, add_generation_prompt=True)["input_ids"]
    seen = client.tokenize(CONVERSATION, model="own", tools=TOOLS)
    assert list(seen.token_ids) == expected
    assert "".join(seen.tokens).startswith('tools:[{"type": "function", "function": {"name": "quick"')
    answer = client.chat("own", CONVERSATION, tools=TOOLS, max_tokens=6)
    assert answer.usage.prompt_tokens == len(expected)
    assert client.chat("own", CONVERSATION, max_tokens=1).usage.prompt_tokens < len(expected)


def test_an_adapter_speaks_its_own_tokens(client: Client, model_dir: Path, own_dir: Path) -> None:
    reference = Reference(model_dir, own_dir)
    theirs = AutoTokenizer.from_pretrained(own_dir)
    prompt = theirs.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True)["input_ids"]
    assert 5 in prompt  # <|end|>
    answer = client.chat("own", CONVERSATION[:1], max_tokens=12, ignore_eos=True)
    reference.assert_greedy(prompt, answer.token_ids)
    assert answer.text == theirs.decode(answer.token_ids, skip_special_tokens=True)
    base = client.tokenize(CONVERSATION[:1])
    assert list(base.token_ids) != prompt, "the base still has its own"
    assert client.tokenize("<|end|>", model="own").token_ids == (5,)
    assert client.tokenize("<|end|>").token_ids != (5,)


def test_its_own_end_of_sequence_token_ends_it(client: Client, own_dir: Path) -> None:
    answer = client.chat("own", CONVERSATION[:1], max_tokens=12, logit_bias={5: 100.0})
    assert (answer.token_ids, answer.text, answer.finish_reason) == ((5,), "", "stop")
    ignored = client.chat("own", CONVERSATION[:1], max_tokens=3, logit_bias={5: 100.0}, ignore_eos=True)
    assert ignored.token_ids == (5, 5, 5)


def test_a_message_is_continued(client: Client, model_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(model_dir)
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the quick br"}]
    expected = theirs.apply_chat_template(messages, continue_final_message=True)["input_ids"]
    assert list(client.tokenize(messages, continue_final_message=True).token_ids) == expected
    answer = client.chat("base", messages, continue_final_message=True, max_tokens=8, ignore_eos=True)
    assert answer.token_ids == client.generate("base", expected, max_tokens=8, ignore_eos=True).token_ids
    echoed = client.chat("base", messages, continue_final_message=True, max_tokens=8, ignore_eos=True, echo=True)
    assert echoed.text == "the quick br" + answer.text
    begun_anew = client.chat("base", messages, max_tokens=8, ignore_eos=True)
    assert begun_anew.usage.prompt_tokens > answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"echo": True}, "sampling.echo"),
        ({"tools": [{"x": "y" * 300_000}]}, "tools_json"),
        ({"tools": [{}] * 129}, "tools_json"),
        ({"tools": ["no object"]}, "tools_json"),
        ({"tools": {"no": "list"}}, "tools_json"),
    ],
    ids=str,
)
def test_what_a_conversation_cannot_have_is_named(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.chat("base", [{"role": "user", "content": "x"}], max_tokens=1, **options)
    assert [violation.field for violation in caught.value.field_violations] == [field]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{", "TOKENIZER_INVALID"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"999": {"content": "<|x|>"}}}', "TOKENIZER_MISMATCH"),
        ("chat_template.jinja", "{% for %}", "CHAT_TEMPLATE_BROKEN"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    client: Client, model_dir: Path, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    directory = toys.make_adapter(model_dir, tmp_path / "adapter")
    (directory / name).write_text(content)
    if reason == "CHAT_TEMPLATE_BROKEN":
        # Everything but chat works with it, as with a base model whose template is broken.
        client.adapters.create("broken-template", directory)
        assert client.generate("broken-template", "the fox", max_tokens=1).token_ids
        with pytest.raises(FailedPreconditionError) as caught:
            client.chat("broken-template", [{"role": "user", "content": "x"}], max_tokens=1)
        assert caught.value.reason == reason
        return
    with pytest.raises(FailedPreconditionError) as caught:
        client.adapters.create("unfit", directory)
    assert caught.value.reason == reason
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(NotFoundError):
        client.adapters.get("unfit")


def test_a_template_that_never_ends_is_refused_and_others_go_on(
    client: Client, model_dir: Path, tmp_path: Path
) -> None:
    directory = toys.make_adapter(model_dir, tmp_path / "adapter")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (directory / "chat_template.jinja").write_text(loop)
    client.adapters.create("endless", directory)
    with pytest.raises(InvalidArgumentError) as caught:
        client.chat("endless", [{"role": "user", "content": "x"}], max_tokens=1)
    assert caught.value.reason == "CHAT_TEMPLATE_REJECTED"
    assert client.chat("base", [{"role": "user", "content": "x"}], max_tokens=1).token_ids
