"""Write the demo base model's card from what the run recorded and from what the exported model says.

python tools/demo_card.py --model server/graftwork_server/demo_model --machine "a 2-core x86-64 virtual machine"
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from demo_model.sources import SOURCES
from transformers import AutoTokenizer, LlamaForCausalLM

PROMPTS = (
    "The first step is to",
    "A database is",
    "If you want to install a package,",
    "She was not at all",
    "The year 1987 was",
)
QUESTIONS = ("What is a file system?", "Tell me about Python.", "What is 12 plus 7?")

# ruff: noqa: E501 - a table row of Markdown is one line.
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Graftwork demo base model

A very small Llama-architecture language model, trained from scratch, that ships with Graftwork so that
`graftwork serve` has something real to host, and something to tune, with no download. It is a test bed for serving
and tuning. It is not an assistant and not a source of facts.

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`, {layers} layers, hidden size {hidden}, {heads} attention heads and {kv_heads} key/value heads, feed-forward size {intermediate}, tied embeddings |
| parameters | {parameters:,} |
| weights | bfloat16 safetensors, {megabytes:.1f} MB |
| tokenizer | byte-level BPE, {vocabulary} tokens, every digit a token of its own |
| longest context | {positions} tokens |
| trained on | {tokens_seen:,} tokens in {steps:,} steps of {step_tokens:,}, {passes:.2f} passes over a stream of {stream:,} |
| held-out loss | {loss:.3f} nats a token (perplexity {perplexity:.1f}; {bits:.3f} bits a byte) |

The held-out loss is measured with the exported bfloat16 weights, computed in float32, over windows of 512 tokens of
the 1 % of documents ({held_tokens:,} tokens) that were kept out of training and out of the tokenizer's training. They
come from the same packages as the training documents, so this is the loss on text of the same kind.

## How it was trained

`tools/build_demo_model.py` downloads the packages below, cleans them, trains the tokenizer and the model, and writes
this folder. It is seeded (seed {seed}). The run took {minutes:.0f} minutes on {machine}; matrix products in {compute},
weights and optimizer state in float32. Matrices are updated by Muon, the embedding and the norms by AdamW; the learning rate warms up over
{warmup} steps, holds, and falls linearly to zero over the last {decay:.0%} of the steps. Rows of 256, 512 and 1024
tokens are mixed. The same arithmetic gives the same weights; another processor or another version of PyTorch rounds differently and gives a
slightly different model. `training.json` has the recipe and the measurements.
{note}
## Data and licences

English prose of documentation packages of Debian 12 (main section, which holds free texts only), cleaned of code,
tables, navigation and duplicates, plus six novels of Jane Austen that the package `r-cran-janeaustenr` carries. About
4 % of the stream are seeded synthetic drills (copy, reverse or look up words and digits, never a date), and a part
is the same pages put as chats: a section's heading as the question, its first paragraph as the answer.

| package | version | licence of the texts | what it is |
| --- | --- | --- | --- |
{packages}

The weights are under the Apache License 2.0, as the rest of Graftwork. The texts keep their own licences; none of
them is in this folder. A model this small can repeat short phrases of its training texts, and such a phrase stays
under its text's licence.

## What it can and cannot do

It writes recognisable English in the manner of software manuals (and now and then of Jane Austen) whose sentences
are mostly well formed and seldom mean much, and it knows the shape of a chat turn and where a turn ends. It can be
tuned to a narrow task of copying and rewriting within minutes on a processor: `examples/dates` is one that it cannot
do untuned.

It states falsehoods with the same ease as anything else, does not calculate, does not reason, does not follow
instructions that it was not tuned for, repeats itself, and knows no language but English. It has had no safety
training of any kind. Do not show what it writes to anyone as information.

## Samples

Verbatim and unpicked: the first outputs for these prompts, 60 tokens at most, temperature 0.7, top-p 0.95, seed 0.

{samples}

Chats (system prompt: none), same settings:

{chats}

## Files

SHA-256 of what `tools/build_demo_model.py` wrote:

{checksums}
"""


def complete(model: Any, tokenizer: Any, ids: list[int]) -> str:
    """Sample up to 60 tokens after a prompt."""
    torch.manual_seed(0)
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        repetition_penalty=1.0,
    )
    return str(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))


def write_card(folder: Path, machine: str, note: str) -> None:
    """Write README.md into the model's folder."""
    record = json.loads((folder / "training.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, recipe, held = model.config, record["recipe"], record["held_out"]
    samples = [f"- **{prompt}**{quote(complete(model, tokenizer, tokenizer.encode(prompt)))}" for prompt in PROMPTS]
    chats = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        chats.append(f"- **{question}** {quote(complete(model, tokenizer, ids))}")
    weights = folder / "model.safetensors"
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    card = CARD.format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        positions=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        parameters=record["parameters"],
        megabytes=weights.stat().st_size / 1e6,
        tokens_seen=record["tokens_seen"],
        steps=record["steps_made"],
        compute=recipe["compute"],
        step_tokens=record["tokens_seen"] // record["steps_made"],
        stream=record["training_stream_tokens"],
        passes=record["tokens_seen"] / record["training_stream_tokens"],
        loss=held["loss"],
        perplexity=held["perplexity"],
        bits=held["bits_per_byte"],
        held_tokens=held["tokens"],
        seed=recipe["seed"],
        minutes=record["minutes"],
        warmup=recipe["warmup"],
        decay=recipe["decay_share"],
        machine=machine,
        note=f"\n{note}\n" if note else "",
        packages="\n".join(f"| {s.package} | {s.version} | {s.licence} | {s.about} |" for s in SOURCES),
        samples="\n".join(samples),
        chats="\n".join(chats),
        checksums="\n".join(
            f"- `{name}`: `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}`" for name in names
        ),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def quote(text: str) -> str:
    """A sample on one line of Markdown: line breaks shown as a pilcrow, marks of Markdown escaped."""
    for mark in "\\`*_<>|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ¶ ")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the exported model's folder")
    parser.add_argument("--machine", required=True, help="the kind of machine that the run was made on")
    parser.add_argument("--note", default="", help="a sentence about this run")
    args = parser.parse_args()
    write_card(args.model, args.machine, args.note)


if __name__ == "__main__":
    main()
