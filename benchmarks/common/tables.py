"""Results as Markdown tables, each with a sentence about what its figures are of."""

from __future__ import annotations

from typing import Any

from benchmarks.common.figures import Row

SIDES = {
    "graftwork": "Graftwork",
    "vllm": "vLLM CPU",
    "llama_cpp": "llama.cpp",
    "peft": "transformers + PEFT",
}
LATENCIES = (
    ("first_token_ms", "time to first token, p50, ms"),
    ("first_token_p99_ms", "time to first token, p99, ms"),
    ("inter_token_ms", "between tokens, p50, ms"),
    ("inter_token_p99_ms", "between tokens, p99, ms"),
)
Result = dict[str, Any]


def sides_of(result: Result) -> list[str]:
    """Those that were measured."""
    return [side for side in SIDES if any(f"{side}_tokens_per_second" in row for row in result["results"])]


def rate_table(result: Result) -> str:
    """Tokens per second of every case and side; after each peer, ours over theirs."""
    sides = sides_of(result)
    head = [""] + [SIDES[side] if side == "graftwork" else f"{SIDES[side]} (ours / theirs)" for side in sides]
    rows = []
    for row in result["results"]:
        ours = row["graftwork_tokens_per_second"]
        cells = [row["case"]]
        for side in sides:
            rate = row.get(f"{side}_tokens_per_second")
            ratio = "" if side == "graftwork" or rate is None else f" ({ours / rate:.2f})"
            cells.append("-" if rate is None else f"{rate:,.1f}{ratio}")
        rows.append(cells)
    return markdown(head, rows)


def latency_tables(result: Result) -> str:
    """Time to first token and between tokens of every case and side."""
    sides = sides_of(result)
    tables = []
    for key, title in LATENCIES:
        rows = []
        for row in result["results"]:
            values = [row.get(f"{side}_{key}") for side in sides]
            if any(value is not None for value in values):
                rows.append([row["case"], *("-" if value is None else f"{value:,.1f}" for value in values)])
        if rows:
            tables.append(markdown([title, *(SIDES[side] for side in sides)], rows))
    return "\n\n".join(tables)


def serving_circumstances(result: Result) -> str:
    """What the figures of a serving result are of: model, requests, machine and versions, in one sentence."""
    machine = result["machine"]
    versions = {"torch": "torch", "transformers": "transformers", "peft": "PEFT"}
    parts = [f"{name} {machine[key]}" for key, name in versions.items()]
    peers = {"vllm": "vLLM", "llama_cpp_python": "llama-cpp-python"}
    parts += [f"{name} {result['peers'][key]}" for key, name in peers.items() if key in result.get("peers", {})]
    instructions = ", ".join(machine["instructions"])
    return (
        f"A {result['shape']} Llama shape with random weights, LoRA of rank 16 on all linear layers unless a row says "
        f"otherwise, {result['dtype']}, greedy, {result['prompt_tokens']} prompt and {result['new_tokens']} new "
        f"tokens, {result['threads']} threads; {machine['processor']} ({instructions}), {machine['cores']} cores; "
        f"{', '.join(parts)}; medians of {result['rounds']} alternating rounds in one run, {machine['date']}."
    )


def front_table(result: Result) -> str:
    """What the server adds to its engine: benchmarks/front.py."""
    rates, firsts = result["tokens_per_second"], result["first_token_ms"]
    return markdown(
        ["", "engine, in process", "server, over gRPC", "the front adds"],
        [
            [
                f"{result['streams']} streams, tokens per second",
                f"{rates['engine']:,.0f}",
                f"{rates['server']:,.0f}",
                f"{100 * (1 - rates['server'] / rates['engine']):.0f}%",
            ],
            [
                "one request, first token, ms",
                f"{firsts['engine']:.1f}",
                f"{firsts['server']:.1f}",
                f"{firsts['server'] - firsts['engine']:.1f} ms",
            ],
        ],
    )


def front_circumstances(result: Result) -> str:
    """What the figures of front_table are of, in one sentence."""
    machine = result["machine"]
    return (
        f"The small model on board, {result['dtype']}, {result['prompt_tokens']} prompt and {result['new_tokens']} new "
        f"tokens, {result['threads']} engine threads on both sides; client, front and engine share the "
        f"{machine['cores']} cores; medians of {result['rounds']} alternating rounds, {machine['date']}."
    )


def hot_load_table(result: Result) -> str:
    """First tokens of adapters that are not loaded, by how many are registered: benchmarks/hot_load.py."""
    columns = ("warm_first_token_ms", "cold_first_token_ms", "difference_ms", "load_call_ms")
    rows = [[f"{row['registered']:,}", *(f"{row[key]:.1f}" for key in columns)] for row in result["results"]]
    head = ["adapters registered", "first token, loaded, ms", "not loaded, ms", "the load adds, ms", "LoadAdapter, ms"]
    return markdown(head, rows)


def hot_load_circumstances(result: Result) -> str:
    """What the figures of hot_load_table are of, in one sentence."""
    size = result["results"][0]["adapter_bytes"] / 1e6
    return (
        f"Adapters of rank 16 on all linear layers of the {result['shape']} shape ({size:.1f} MB), {result['dtype']}, "
        f"a prompt of {result['prompt_tokens']} tokens over gRPC, {result['threads']} threads; medians of "
        f"{result['rounds']} rounds, {result['machine']['date']}. Where two adapters evict each other, a load adds "
        + " and ".join(f"{value:.1f} ms from {name}" for name, value in result["evicted_difference_ms"].items())
        + "."
    )


def neighbours_table(result: Result) -> str:
    """What a neighbour sees beside others; each hostile row's p99 also over the ordinary one's before it."""
    rows = []
    ordinary: Row = {}
    for row in result["results"]:
        is_hostile = row["case"].endswith("hostile")
        ordinary = ordinary if is_hostile else row
        cells = [row["case"]]
        for key in ("p99_ms", "get_p99_ms", "chat_p99_ms"):
            ratio = f" ({row[key] / ordinary[key]:.2f})" if is_hostile else ""
            cells.append(f"{row[key]:.1f}{ratio}")
        rows.append([*cells, f"{row['front_mb']:.0f}", f"{row['answered']:.0f}", f"{row['refused']:.0f}"])
    head = ["beside", "between tokens, p99, ms", "GetAdapter, p99, ms", "another chat, p99, ms", "front, MB"]
    return markdown([*head, "answered", "refused"], rows)


def neighbours_circumstances(result: Result) -> str:
    """What the figures of neighbours_table are of, in one sentence."""
    machine = result["machine"]
    return (
        f"A stream of {result['new_tokens']} tokens on the {result['shape']} shape, {result['dtype']}, and small calls "
        f"beside {result['clients']} clients that send ordinary or hostile requests of one kind without pause; in "
        f"brackets hostile over ordinary; {result['threads']} threads, {machine['cores']} cores; medians of "
        f"{result['rounds']} rounds, {machine['date']}."
    )


def overload_table(result: Result) -> str:
    """Admitted and refused requests at the server's own rate and at ten times it: benchmarks/overload.py."""
    full, flooded = result["results"]
    rows = []
    for key, name in (
        ("admitted_p50_ms", "admitted, p50, ms"),
        ("admitted_p99_ms", "admitted, p99, ms"),
        ("first_token_p99_ms", "first token, p99, ms"),
        ("admitted_per_second", "admitted a second"),
        ("refused_p50_ms", "refused, p50, ms"),
        ("refused_p99_ms", "refused, p99, ms"),
        ("refused_most_ms", "refused, most, ms"),
    ):
        ratio = f" ({flooded[key] / full[key]:.2f})" if key in full else ""
        rows.append([name, f"{full[key]:.1f}" if key in full else "-", f"{flooded[key]:.1f}{ratio}"])
    return markdown(["", "full", "ten times (over full)"], rows)


def overload_circumstances(result: Result) -> str:
    """What the figures of overload_table are of, in one sentence."""
    machine = result["machine"]
    return (
        f"{result['max_queue']} clients that fill a server with `--max-queue {result['max_queue']}`, then ten times "
        f"the requests it answered; the {result['shape']} shape, {result['dtype']}, {result['prompt_tokens']} prompt "
        f"and {result['new_tokens']} new tokens, client and server on the same {machine['cores']} cores; medians of "
        f"{result['rounds']} rounds, {machine['date']}."
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """One table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
