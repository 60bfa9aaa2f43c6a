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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from demo_corpus import build as build_corpus
from demo_tokenizer import CHAT_TEMPLATE, encode_stream, encode_texts, page_text, read_documents, train_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the corpus."""

    seed: int = 20240607
    steps: int = 2400
    # Each entry is one micro-batch of packed rows that long; all have `micro_tokens` tokens. Short rows are the
    # cheapest, and the long ones teach the positions up to the stated limit.
    contexts: tuple[int, ...] = (1024, 512, 256, 256)
    micro_tokens: int = 1024
    muon_lr: float = 0.015
    adam_lr: float = 0.004
    weight_decay: float = 0.05
    warmup: int = 40
    decay_share: float = 0.6
    clip: float = 1.0
    # Matrix products of the forward and backward pass; weights, gradients and optimizer state stay float32.
    compute: str = "bfloat16"

    @property
    def step_tokens(self) -> int:
        """Tokens that one step learns from."""
        return len(self.contexts) * self.micro_tokens


def make_config() -> LlamaConfig:
    """The model's shape: 5.4 million parameters."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=688,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class Muon(torch.optim.Optimizer):
    """Muon (orthogonalised momentum) for stacks of same-shaped matrices.

    ``torch.optim.Muon`` works in bfloat16 and one matrix at a time, which is slow on a processor without bfloat16;
    this one works in float32 and on all layers' matrices of one shape at once.
    """

    def __init__(
        self, matrices: list[Tensor], lr: float, weight_decay: float, threads: int, momentum: float = 0.95
    ) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        # Stacks of four, so that the threads have work of one size to share.
        groups = [{"params": group[i : i + 4]} for group in shapes.values() for i in range(0, len(group), 4)]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = ThreadPoolExecutor(threads)

    def step(self, closure: None = None) -> None:
        """Move every matrix along its orthogonalised Nesterov momentum."""
        list(self.pool.map(self.move, sorted(self.param_groups, key=lambda group: -group["params"][0].numel())))

    @torch.no_grad()
    def move(self, group: dict) -> None:
        """Move one stack of matrices."""
        torch.set_num_threads(1)
        gradients = torch.stack([matrix.grad for matrix in group["params"]])
        state = self.state[group["params"][0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        state["momentum"].lerp_(gradients, 1 - group["momentum"])
        update = orthogonalise(gradients.lerp_(state["momentum"], group["momentum"]))
        rows, columns = update.shape[-2:]
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for matrix, change in zip(group["params"], update, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-scale)


def orthogonalise(stack: Tensor, rounds: int = 5) -> Tensor:
    """The nearest half-orthogonal matrices, by Newton-Schulz rounds with Muon's quintic coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def prepare(work: Path, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray, int]:
    """The tokenizer, the training stream, the held-out stream, and the held-out text's size in bytes."""
    corpus = work / "corpus.jsonl"
    if not corpus.exists():
        build_corpus(work)
    train, held = read_documents(corpus)
    folder = work / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(page_text(document) for document in train).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_texts = [page_text(document) for document in held]
    held_ids = encode_texts(tokenizer, [f"<|bos|>{text}<|eos|>" for text in held_texts])
    stream_file = work / "train_tokens.npy"
    if not stream_file.exists():
        np.save(stream_file, encode_stream(tokenizer, train, recipe.seed), allow_pickle=False)
    stream = np.load(stream_file, allow_pickle=False)
    return tokenizer, stream, held_ids, sum(len(text.encode()) for text in held_texts)


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """A fresh model; output projections start at zero, so that every layer begins as the identity."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(make_config()).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe, threads: int) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return [Muon(matrices, recipe.muon_lr, recipe.weight_decay, threads), adam]


def schedule(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate's factor: warm up, hold, then fall linearly to zero over the last part."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return min(1.0, (steps - step) / max(1.0, recipe.decay_share * steps))


def rows_of(stream: np.ndarray, context: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of packed rows of one length, in a new seeded order and at a new offset each pass."""
    rng = np.random.default_rng([seed, context])
    width = context + 1
    while True:
        offset = int(rng.integers(0, width))
        rows = (len(stream) - offset) // width
        table = stream[offset : offset + rows * width].reshape(rows, width)
        order = rng.permutation(rows)
        for start in range(0, rows - count + 1, count):
            yield torch.from_numpy(table[order[start : start + count]].astype(np.int64))


def batches(stream: np.ndarray, recipe: Recipe) -> Iterator[list[Tensor]]:
    """Yield each step's micro-batches. Every row length draws from the whole stream by itself."""
    sources = {
        context: rows_of(stream, context, recipe.micro_tokens // context, recipe.seed)
        for context in set(recipe.contexts)
    }
    while True:
        yield [next(sources[context]) for context in recipe.contexts]


def loss_of(model: LlamaForCausalLM, batch: Tensor, compute: str = "float32") -> Tensor:
    """Mean next-token loss of packed rows."""
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out(model: LlamaForCausalLM, ids: np.ndarray, context: int = 512, rows: int = 10**9) -> tuple[float, int]:
    """Mean held-out loss in nats a token over windows of the context's length, and the tokens it is over."""
    width = context + 1
    table = torch.from_numpy(ids[: len(ids) // width * width].reshape(-1, width).astype(np.int64))[:rows]
    model.eval()
    losses = [loss_of(model, chunk).item() * len(chunk) for chunk in table.split(2)]
    model.train()
    return sum(losses) / len(table), table[:, 1:].numel()


def train(args: argparse.Namespace, recipe: Recipe) -> None:
    """Train, with a checkpoint every few minutes."""
    # Whole micro-batches and whole stacks of matrices go to the threads; a second thread for every small operation
    # between them would mostly spin.
    torch.set_num_threads(1)
    _, stream, held, held_bytes = prepare(args.work, recipe)
    print(f"{len(stream):,} training tokens, {len(held):,} held-out tokens of {held_bytes:,} bytes", flush=True)
    model = make_model(recipe)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = make_optimizers(model, recipe, args.threads)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    source = batches(stream, recipe)
    first, before = load_checkpoint(args.work, model, optimizers) if args.resume else (0, 0.0)
    for _ in range(first):
        next(source)
    step, steps, smooth = first, recipe.steps, 0.0
    started = saved = time.monotonic()
    with ThreadPoolExecutor(args.threads) as pool:
        while step < steps:
            factor = schedule(step, steps, recipe)
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            value = take_step(model, next(source), optimizers, recipe, pool)
            step += 1
            smooth = value if step == first + 1 else 0.95 * smooth + 0.05 * value
            spent = time.monotonic() - started
            if step % 10 == 0:
                steps = fitting_steps(step, first, recipe.steps, spent, args.max_minutes)
                speed = (step - first) * recipe.step_tokens / spent
                print(
                    f"{step}/{steps} loss {smooth:.4f} lr {factor:.3f} {speed:.0f} tok/s {spent / 60:.1f} min",
                    flush=True,
                )
            if time.monotonic() - saved > 240 or step >= steps:
                save_checkpoint(args.work, model, optimizers, recipe, (step, steps, before + spent))
                quick, _ = held_out(model, held, rows=16)
                print(f"checkpoint at step {step}: held-out loss (16 windows) {quick:.4f}", flush=True)
                saved = time.monotonic()


def take_step(
    model: LlamaForCausalLM,
    micro_batches: list[Tensor],
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    pool: ThreadPoolExecutor,
) -> float:
    """One update from the mean gradient of the micro-batches.

    Each thread works out whole micro-batches with one core. That beats two cores on every operation: the data stay in
    the caches, and a core that other work holds up delays one micro-batch, not every operation. The gradients are
    summed in a fixed order, so the number of threads does not change the result.
    """
    parameters = list(model.parameters())

    def gradients(batch: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        loss = loss_of(model, batch, recipe.compute)
        return loss.item(), torch.autograd.grad(loss, parameters)

    total = 0.0
    for value, grads in pool.map(gradients, micro_batches):
        total += value
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
    for parameter in parameters:
        parameter.grad.div_(len(micro_batches))
    torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total / len(micro_batches)


def fitting_steps(step: int, first: int, planned: int, spent: float, max_minutes: float) -> int:
    """Fewer steps where the planned ones would outrun the time, so that the learning rate still falls to zero."""
    if not max_minutes:
        return planned
    return max(step, min(planned, first + int((step - first) * max_minutes * 60 / spent)))


def state_tensors(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by the name of the parameter that it hangs on."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}:{names[parameter]}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }


def save_checkpoint(
    work: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    progress: tuple[int, int, float],
) -> None:
    """The float32 weights, the optimizers' state, and how they came about."""
    step, steps, spent = progress
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    record = {
        "recipe": asdict(recipe),
        "steps_made": step,
        "steps_scheduled": steps,
        "tokens_seen": step * recipe.step_tokens,
        "minutes": round(spent / 60, 1),
    }
    for name, tensors in (("state", state_tensors(model, optimizers)), ("checkpoint", weights)):
        # The record rides along, so that weights and state of different steps are never put together.
        save_file(tensors, work / f"{name}.part", metadata={"record": json.dumps(record)})
        (work / f"{name}.part").replace(work / f"{name}.safetensors")
    (work / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def load_checkpoint(work: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Put the last checkpoint back; return its step and the seconds spent until then."""
    records = []
    for name in ("checkpoint", "state"):
        with safe_open(work / f"{name}.safetensors", "pt") as file:
            records.append(json.loads(file.metadata()["record"]))
    if records[0] != records[1]:
        raise SystemExit("the weights and the optimizer state are of different steps; start again without --resume")
    model.load_state_dict(load_file(work / "checkpoint.safetensors"), strict=False)
    model.tie_weights()
    owners = dict(model.named_parameters())
    for key, tensor in load_file(work / "state.safetensors").items():
        kind, name = key.split(":", 1)
        holder = next(o for o in optimizers if any(owners[name] is p for g in o.param_groups for p in g["params"]))
        holder.state[owners[name]][kind] = tensor
    return records[0]["steps_made"], records[0]["minutes"] * 60


def export(args: argparse.Namespace, recipe: Recipe) -> None:
    """Write the last checkpoint as bfloat16 with its tokenizer, and measure what was written."""
    torch.set_num_threads(args.threads)
    tokenizer, stream, held, held_bytes = prepare(args.work, recipe)
    model = make_model(recipe)
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
        train(args, recipe)
    export(args, recipe)


if __name__ == "__main__":
    main()
