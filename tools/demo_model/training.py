"""The training loop of the demo base model, and its held-out loss."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from demo_model.checkpoint import load_checkpoint, save_checkpoint
from demo_model.muon import Muon
from demo_model.recipe import Recipe, batches, make_model, schedule
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM


def train(
    work: Path,
    recipe: Recipe,
    stream: np.ndarray,
    held: np.ndarray,
    threads: int,
    max_minutes: float = 0.0,
    resume: bool = False,
) -> None:
    """Train on `stream`, with a checkpoint in `work` every few minutes; `resume` goes on from the last one."""
    # Whole micro-batches and whole stacks of matrices go to the threads; a second thread for every small operation
    # between them would mostly spin.
    torch.set_num_threads(1)
    model = make_model(recipe)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = make_optimizers(model, recipe, threads)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    source = batches(stream, recipe)
    first, before = load_checkpoint(work, model, optimizers) if resume else (0, 0.0)
    for _ in range(first):
        next(source)
    step, steps, smooth = first, recipe.steps, 0.0
    started = saved = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
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
                steps = fitting_steps(step, first, recipe.steps, spent, max_minutes)
                speed = (step - first) * recipe.step_tokens / spent
                print(
                    f"{step}/{steps} loss {smooth:.4f} lr {factor:.3f} {speed:.0f} tok/s {spent / 60:.1f} min",
                    flush=True,
                )
            if time.monotonic() - saved > 240 or step >= steps:
                save_checkpoint(work, model, optimizers, recipe, (step, steps, before + spent))
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
    sums: list[Tensor] = []
    for value, grads in pool.map(gradients, micro_batches):
        total += value
        sums = [before.add_(grad) for before, grad in zip(sums, grads, strict=True)] if sums else list(grads)
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.div_(len(micro_batches))
    torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total / len(micro_batches)


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe, threads: int) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return [Muon(matrices, recipe.muon_lr, recipe.weight_decay, threads), adam]


def fitting_steps(step: int, first: int, planned: int, spent: float, max_minutes: float) -> int:
    """Fewer steps where the planned ones would outrun the time, so that the learning rate still falls to zero."""
    if not max_minutes:
        return planned
    return max(step, min(planned, first + int((step - first) * max_minutes * 60 / spent)))


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
