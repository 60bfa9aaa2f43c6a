"""The options of a generation: how tokens are chosen and when to stop."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from graftwork.requests.fields import build
from graftwork.v1 import generation_pb2 as pb


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and when to stop; None or left out: the server's default.

    max_tokens: most tokens to generate. temperature: 0 (the default) takes the most likely token. top_p: nucleus mass
    in (0, 1]. top_k: sample among so many tokens. seed: of this request's own random stream. stop: a text or texts that
    end the generation and are not returned. logprobs: how many alternatives to return with each token, 0 for the
    chosen token's log probability alone. ignore_eos: go on after an end-of-sequence token. min_p: sample only tokens at
    least this share as likely as the most likely one. typical_p: mass of the most typical tokens.
    repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and completion.
    presence_penalty: taken from the logit of each token in the completion. frequency_penalty: the same, for each time
    that it is there. logit_bias: added to the logits of token ids. bad_words: texts not to be generated.
    stop_token_ids: tokens that end the generation. min_tokens: so many tokens come before any end.
    n: completions to return. best_of: sample so many and return the n with the highest mean log probability.
    prompt_logprobs: as logprobs, for the prompt's tokens. echo: begin each completion's text with the prompt.
    At most one of these says what the output must look like. json_schema: a mapping, or JSON. regex: the whole output
    matches it. choice: one of these texts. lark: a grammar in llguidance's variant of Lark.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_tokens: int | None
    n: int | None
    best_of: int | None
    prompt_logprobs: int | None
    echo: bool
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None
    lark: str | None


def sampling_parameters(options: SamplingOptions) -> pb.SamplingParameters:
    """SamplingParameters of SamplingOptions; what is None stays unset, so that the server's default holds.

    Raises TypeError for an option that there is not, ValueError for two that exclude each other.
    """
    unknown = sorted(set(options) - set(SamplingOptions.__annotations__))
    if unknown:
        known = list(SamplingOptions.__annotations__)
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise TypeError(f"there is no option {unknown[0]!r}; {hint}")
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    formats = {name: values.pop(name) for name in ("json_schema", "regex", "choice", "lark") if name in values}
    if len(formats) > 1:
        raise ValueError(f"{' and '.join(formats)}: give at most one of them")
    if formats:
        values["structured_output"] = _structured(**formats)
    return build(pb.SamplingParameters, **values)


def _structured(
    json_schema: Mapping[str, Any] | str | None = None,
    choice: Sequence[str] | None = None,
    regex: str | None = None,
    lark: str | None = None,
) -> pb.StructuredOutput:
    if json_schema is not None:
        schema = json_schema if isinstance(json_schema, str) else json.dumps(json_schema, ensure_ascii=False)
        return build(pb.StructuredOutput, json_schema=schema)
    if choice is not None:
        choices = build(pb.Choices, {"texts": "choice"}, texts=choice)
        return pb.StructuredOutput(choice=choices)
    if regex is not None:
        return build(pb.StructuredOutput, regex=regex)
    return build(pb.StructuredOutput, lark=lark or "")
