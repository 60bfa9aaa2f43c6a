"""The demo base model's tokenizer, and the token stream that it is trained on.

The tokenizer is a byte-level BPE of 4096 tokens. Every digit is a token of its own, so that numbers can be copied and
rearranged. The stream mixes three kinds of document, each ``<|bos|> ... <|eos|>``:

- the pages of the corpus, as headings and paragraphs;
- chat documents made of those pages: a section's heading asked by the user, its first paragraph as the answer;
- drills: seeded few-shot blocks of copying, reordering and looking up words and digits. None of them has a date.
"""

from __future__ import annotations

import hashlib
import json
import random
from calendar import month_name
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Document = dict[str, Any]
"""A line of corpus.jsonl: the package, and sections, each a heading and its paragraphs."""

VOCABULARY = 4096
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
MONTHS = frozenset(name.lower() for name in month_name if name)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] in ('system', 'developer') %}
{{- '<|system|>' + message['content'] | trim + eos_token }}
{%- elif message['role'] == 'user' %}
{{- '<|user|>' + message['content'] | trim + eos_token }}
{%- elif message['role'] == 'assistant' %}
{{- '<|assistant|>' }}
{%- generation %}
{{- message['content'] | trim + eos_token }}
{%- endgeneration %}
{%- else %}
{{- raise_exception('this model knows the roles system, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""
QUESTIONS = (
    "{}",
    "{}",
    "What is {}?",
    "Tell me about {}.",
    "Explain {}.",
    "What can you say about {}?",
    "Describe {}.",
)
SYSTEMS = ("You are a helpful assistant.", "Answer the question.", "You answer briefly and clearly.")


def read_documents(corpus: Path) -> tuple[list[Document], list[Document]]:
    """The corpus in two parts: training documents and the held-out 1 %.

    Which part a document falls in depends on its own text alone, so a changed package moves no other document.
    """
    train: list[Document] = []
    held: list[Document] = []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            first = document["sections"][0][1][0]
            bucket = int.from_bytes(hashlib.blake2b(first.encode(), digest_size=4).digest(), "big") % 100
            (held if bucket == 0 else train).append(document)
    return train, held


def page_text(document: Document) -> str:
    """A page as plain text: headings on their own lines, paragraphs apart."""
    parts = []
    for heading, paragraphs in document["sections"]:
        if heading:
            parts.append(heading)
        parts.extend(paragraphs)
    return "\n\n".join(parts)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the BPE and wrap it with its special tokens and its chat template."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's word split, with a leading space kept on words alone and digits one by one.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(
                Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{N}"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id("<|bos|>")
    # A raw prompt begins as a training document does; a chat prompt gets its <|bos|> from the template instead.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )


def chats(document: Document, rng: random.Random, share: float) -> Iterator[list[dict[str, str]]]:
    """Chat documents of some of a page's sections."""
    for heading, paragraphs in document["sections"]:
        if len(heading) < 4 or not heading.isascii() or not 60 <= len(paragraphs[0]) <= 700 or rng.random() > share:
            continue
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []
        messages.append({"role": "user", "content": rng.choice(QUESTIONS).format(heading.rstrip("?"))})
        messages.append({"role": "assistant", "content": paragraphs[0]})
        yield messages


def drill(words: list[str], rng: random.Random) -> str:
    """One few-shot block: the same small task on two to six random inputs."""
    kind = rng.choice(("repeat", "reverse", "last", "digits", "swap", "lookup", "join", "capital"))
    label, answer = rng.choice((("Text", "Answer"), ("Input", "Output"), ("Words", "Result"), ("Given", "Then")))
    blocks = []
    for _ in range(rng.randint(2, 6)):
        some = rng.sample(words, rng.randint(2, 5))
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 8)))
        given, then = {
            "repeat": (" ".join(some), " ".join(some)),
            "reverse": (" ".join(some), " ".join(reversed(some))),
            "last": (" ".join(some), some[-1]),
            "digits": (f"{some[0]} {digits} {some[1]}", digits),
            "swap": (f"{some[0].title()} {some[1].title()}", f"{some[1].title()}, {some[0].title()}"),
            "lookup": (f"{some[0]} {digits}, {some[1]} {digits[::-1]}; {some[1]}?", digits[::-1]),
            "join": (" ".join(some), "-".join(some)),
            "capital": (" ".join(some), " ".join(some).upper()),
        }[kind]
        blocks.append(f"{label}: {given}\n{answer}: {then}")
    return "\n\n".join(blocks)


def common_words(documents: list[Document], count: int = 3000) -> list[str]:
    """The corpus's most frequent plain words, month names left out."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(
            word for word in page_text(document).split() if word.isascii() and word.isalpha() and word.islower()
        )
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return [word for word in ranked if len(word) > 2 and word not in MONTHS][:count]


def encode_stream(
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    seed: int,
    chat_share: float = 0.12,
    drill_share: float = 0.04,
) -> np.ndarray:
    """The shuffled training documents as one stream of token ids."""
    rng = random.Random(seed)
    words = common_words(documents)
    texts = ["<|bos|>" + page_text(document) + "<|eos|>" for document in documents]
    size = sum(len(text) for text in texts)
    for document in documents:
        for messages in chats(document, rng, chat_share):
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    drilled = 0
    while drilled < drill_share * size:
        texts.append("<|bos|>" + drill(words, rng) + "<|eos|>")
        drilled += len(texts[-1])
    rng.shuffle(texts)
    return encode_texts(tokenizer, texts)


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Texts that carry their own special tokens, one after another."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in encoded])
