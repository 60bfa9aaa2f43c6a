"""What the tests of texts share: two kinds of tokenizers, their files, and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graftwork_server.text import TextProcessor

SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln, naïve café", "你好 世界 👩‍👩‍👧 🎉🎉"] * 20

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = """{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    <|{{ m.role }}|>
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ m.content }}{{ eos_token }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """The shape of Llama 2, Mistral and Phi-3: byte fallback, spaces as U+2581, the first one stripped."""
    pieces = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz你", "▁t", "he", "▁the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


BYTE_LEVEL = TextProcessor(byte_level(), {}, None)
SENTENCEPIECE = TextProcessor(sentencepiece(), {}, None)


def save(folder: Path, template: str | None, **kwargs: Any) -> TextProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", **kwargs
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return TextProcessor.from_dir(folder)


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"]
    return [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
