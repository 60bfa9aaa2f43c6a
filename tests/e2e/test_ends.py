"""A variant that learned to end its turn is ended there: after a restart, under a grammar, and uploaded elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.e2e.serving import Server
from tests.server.text.test_turns import CHATML
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from graftwork import Client

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QUESTION = [{"role": "user", "content": "Hi"}]
ROWS = [{"messages": [*QUESTION, {"role": "assistant", "content": "Paris"}]}] * 16


@pytest.fixture(scope="module")
def chatml_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen's base checkpoints are: a ChatML template, and another end in tokenizer and configuration."""
    folder = tmp_path_factory.mktemp("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab = {token: id for id, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[0], "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ended(client: Client, model: str) -> None:
    answer = client.chat(model, QUESTION, max_tokens=12)
    assert (answer.text, answer.finish_reason, answer.token_ids[-1]) == ("Paris", "stop", 2)
    shaped = client.chat(model, QUESTION, max_tokens=12, regex="[A-Za-z]*")
    assert (shaped.text, shaped.finish_reason) == ("Paris", "stop")
    assert client.chat(model, QUESTION, max_tokens=12, ignore_eos=True).finish_reason == "length"


def test_a_learned_end_ends_the_variant(chatml_dir: Path, tmp_path: Path) -> None:
    first = Server(chatml_dir, tmp_path / "data")
    try:
        with first.client() as client:
            dataset = client.datasets.upload(ROWS)
            config = {"max_steps": 40, "batch_size": 4, "learning_rate": 5e-3}
            client.tuning.create(strategy="full", dataset=dataset, adapter="tuned", config=config).wait()
            ended(client, "tuned")
            forced = client.chat("base", QUESTION, max_tokens=3, logit_bias={2: 100.0})
            assert forced.token_ids == (2, 2, 2), "the base has the ends of its own configuration"
    finally:
        first.close()
    second = Server(chatml_dir, tmp_path / "data")
    try:
        with second.client() as client:
            ended(client, "tuned")
            (manifest,) = (tmp_path / "data" / "artifacts").glob("*/manifest.json")
            assert json.loads(manifest.read_text())["end_token_ids"] == [2]
            client.adapters.create("again", manifest.parent)
            ended(client, "again")
    finally:
        second.close()


def test_a_whole_checkpoint_is_ended_by_its_own_configuration(chatml_dir: Path, tmp_path: Path) -> None:
    """As transformers ends it: by generation_config.json, or else config.json. The base has another end."""
    by_generation, by_config = tmp_path / "by-generation", tmp_path / "by-config"
    for folder, ends in ((by_generation, 0), (by_config, 2)):
        AutoModelForCausalLM.from_pretrained(chatml_dir).save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    (by_generation / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (by_config / "generation_config.json").unlink()
    server = Server(chatml_dir, tmp_path / "data")
    try:
        with server.client() as client:
            for name, tokens in (("by-generation", 1), ("by-config", 1), ("base", 3)):
                if name != "base":
                    client.adapters.create(name, tmp_path / name)
                answer = client.generate(name, "Hi", max_tokens=3, logit_bias={2: 100.0})
                assert answer.token_ids == (2,) * tokens, name
    finally:
        server.close()
