"""Train the small base language model that ships in the package, from scratch, and export it.

    python tools/build_demo_model.py --work /tmp/demo_model --out server/graftwork_server/demo_model

The defaults are what the shipped model used: about 40 minutes on two cores with bfloat16 instructions. The run is
seeded and its length is a number of steps, so it gives the same model wherever the arithmetic is the same;
``--max-minutes`` is a guard that shortens a run on a slow machine, and the number of steps really made is written to
``training.json``. A checkpoint with the optimizers' state is written every few minutes: ``--resume`` goes on from it,
with the same batches as a run that was never stopped, and ``--export-only`` exports it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpus import build as build_corpus
from demo_model.recipe import Recipe, make_model
from demo_model.tokenizer import CHAT_TEMPLATE, encode_stream, encode_texts, page_text, read_documents, train_tokenizer
from demo_model.training import held_out, train
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def prepare(work: Path, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray, int]:
    """The tokenizer, the training stream, the held-out stream, and the held-out text's size in bytes."""
    corpus = work / "corpus.jsonl"
    if not corpus.exists():
        build_corpus(work)
    train, held = read_documents(corpus)
    folder = work / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(page_text(document) for document in train).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    held_texts = [page_text(document) for document in held]
    held_ids = encode_texts(tokenizer, [f"<|bos|>{text}<|eos|>" for text in held_texts])
    stream_file = work / "train_tokens.npy"
    if not stream_file.exists():
        np.save(stream_file, encode_stream(tokenizer, train, recipe.seed), allow_pickle=False)
    stream = np.load(stream_file, allow_pickle=False)
    return tokenizer, stream, held_ids, sum(len(text.encode()) for text in held_texts)


def export(args: argparse.Namespace, recipe: Recipe) -> None:
    """Write the last checkpoint as bfloat16 with its tokenizer, and measure what was written."""
    torch.set_num_threads(args.threads)
    tokenizer, stream, held, held_bytes = prepare(args.work, recipe)
    model: Any = make_model(recipe)
    model.load_state_dict(load_file(args.work / "checkpoint.safetensors"), strict=False)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        repetition_penalty=1.1,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    # safetensors makes the file readable for its owner alone, which a package must not ship.
    (args.out / "model.safetensors").chmod(0o644)
    written = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    record = json.loads((args.work / "training.json").read_text())
    loss, count = held_out(written, held)
    record["parameters"] = sum(p.numel() for p in written.parameters())
    record["training_stream_tokens"] = len(stream)
    record["held_out"] = {
        "tokens": count,
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "bits_per_byte": round(loss / math.log(2) * len(held) / held_bytes, 4),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer so that transformers of the last years read it.

    Version 5 writes a class name of its own and keeps the chat template in a file beside it; older ones know neither.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["chat_template"] = CHAT_TEMPLATE
    path.write_text(json.dumps(config, indent=2) + "\n")


def keep_memory() -> None:
    """Start again with an allocator that keeps freed memory: fresh pages cost a fifth of the time otherwise."""
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.environ.update(MALLOC_MMAP_THRESHOLD_="1073741824", MALLOC_TRIM_THRESHOLD_="8589934592")
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: packages, corpus, checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-minutes", type=float, default=0.0, help="shorten the run to fit; 0: no limit")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint")
    args = parser.parse_args()
    keep_memory()
    recipe = Recipe(steps=args.steps, seed=args.seed)
    if not args.export_only:
        _, stream, held, held_bytes = prepare(args.work, recipe)
        print(f"{len(stream):,} training tokens, {len(held):,} held-out tokens of {held_bytes:,} bytes", flush=True)
        train(args.work, recipe, stream, held, args.threads, args.max_minutes, args.resume)
    export(args, recipe)


if __name__ == "__main__":
    main()
