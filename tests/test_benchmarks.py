"""The README's figures are those of benchmarks/results, and the benchmarks count what they say."""

from __future__ import annotations

import pytest
from benchmarks.common.figures import percentile, summary
from benchmarks.common.tables import rate_table
from benchmarks.report import README, readme_block, with_block
from benchmarks.workloads.cases import CASES, adapters_of, chosen


def test_the_readme_shows_the_results() -> None:
    assert readme_block() in README.read_text(), "run python -m benchmarks.report"


def test_a_block_replaces_the_old_one_only() -> None:
    readme = README.read_text()
    changed = with_block(readme, readme_block().replace("| base only", "| base"))
    assert changed != readme
    assert with_block(changed, readme_block()) == readme
    with pytest.raises(ValueError, match="has no"):
        with_block("nothing", readme_block())


def test_every_place_and_every_adapter_is_used() -> None:
    for case in CASES:
        job = case.job()
        assert len(job["prompts"]) == len(job["adapters"]) >= case.at_once
        assert {name for name in job["adapters"] if name} == set(case.adapter_names)
        assert {len(prompt) for prompt in job["prompts"]} == {case.prompt_tokens}
        assert job == case.job(), "both sides must get the same requests"
    assert {"r8-0", "r16-1", "r64-2"} <= set(adapters_of(CASES))


def test_cases_are_chosen_by_name() -> None:
    assert [case.name for case in chosen("single,base-16", quick=False)] == ["single", "base-16"]
    assert set(chosen("", quick=True)) < set(chosen("", quick=False))
    with pytest.raises(ValueError, match="'nothing' is no case"):
        chosen("nothing", quick=False)


def test_percentiles() -> None:
    values = list(range(1, 101))
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7], 0.99)) == (50, 99, 7)


def test_figures_are_medians_of_rounds_and_ratios_ours_over_theirs() -> None:
    rounds = [{"seconds": s, "first_ms": [1.0, 3.0], "gaps_ms": [2.0]} for s in (1.0, 2.0, 4.0)]
    row = {"case": "x", **summary("graftwork", 100, rounds), **summary("vllm", 200, rounds)}
    assert row["graftwork_tokens_per_second"] == 50
    assert row["graftwork_first_token_ms"] == 1
    assert "| x | 50.0 | 100.0 (0.50) |" in rate_table(
        {"results": [row, {"case": "y", **summary("graftwork", 4, rounds)}]}
    )
