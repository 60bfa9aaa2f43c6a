"""Arguments to calls. Both clients build every request here.

Retried are reads, calls that do the same when repeated, and creates, whose request_id is made once and sent with each
attempt. Not retried are deleting and cancelling: a second attempt could report what the first one did as an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from graftwork import responses, types
from graftwork.fields import build, text
from graftwork.transport.calls import Message, Page, Streaming, Unary, Upload
from graftwork.transport.request_ids import new_request_id
from graftwork.transport.uploads import AdapterFiles
from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2, strategies_pb2

Prompt: TypeAlias = str | Sequence[int]
Prompts: TypeAlias = list[str] | list[list[int]] | tuple[str, ...]
"""Several prompts, each answered by itself."""
TextInput: TypeAlias = str | tuple[str, str] | Sequence[int]
"""A text, two texts that belong together (a question and a passage), or token ids."""
Messages: TypeAlias = Sequence[types.Message | Mapping[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]]

_POOLINGS: Mapping[str, generation_pb2.Pooling.ValueType] = {
    "mean": generation_pb2.POOLING_MEAN,
    "cls": generation_pb2.POOLING_CLS,
    "last": generation_pb2.POOLING_LAST,
    "max": generation_pb2.POOLING_MAX,
    "mean_sqrt_len": generation_pb2.POOLING_MEAN_SQRT_LEN,
    "weightedmean": generation_pb2.POOLING_WEIGHTED_MEAN,
}

_GENERATION = "/graftwork.v1.GenerationService/"
_ADAPTERS = "/graftwork.v1.AdapterService/"
_STRATEGIES = "/graftwork.v1.StrategyService/"
_SERVER = "/graftwork.v1.ServerService/"


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


def sampling(options: SamplingOptions) -> generation_pb2.SamplingParameters:
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
    return build(generation_pb2.SamplingParameters, **values)


def _structured(
    json_schema: Mapping[str, Any] | str | None = None,
    choice: Sequence[str] | None = None,
    regex: str | None = None,
    lark: str | None = None,
) -> generation_pb2.StructuredOutput:
    if json_schema is not None:
        schema = json_schema if isinstance(json_schema, str) else json.dumps(json_schema, ensure_ascii=False)
        return build(generation_pb2.StructuredOutput, json_schema=schema)
    if choice is not None:
        choices = build(generation_pb2.Choices, {"texts": "choice"}, texts=choice)
        return generation_pb2.StructuredOutput(choice=choices)
    if regex is not None:
        return build(generation_pb2.StructuredOutput, regex=regex)
    return build(generation_pb2.StructuredOutput, lark=lark or "")


def generate(
    model: str, prompt: Prompt, options: SamplingOptions, cache_salt: str | None, priority: int | None
) -> Streaming[generation_pb2.GenerateResponse, types.GenerationChunk]:
    """Generate."""
    request = build(
        generation_pb2.GenerateRequest,
        {"text": "prompt"},
        model=model,
        sampling=sampling(options),
        cache_salt=cache_salt or "",
        priority=priority or 0,
        **_prompt(prompt),
    )
    return Streaming(
        path=_GENERATION + "Generate", request=request, response=generation_pb2.GenerateResponse, parse=responses.chunk
    )


def several(prompt: Prompt | Prompts) -> list[Prompt] | None:
    """The prompts, if it is a list of them; None for one, a text or token ids."""
    if isinstance(prompt, list | tuple) and prompt and not any(isinstance(one, int) for one in prompt):
        return list(prompt)
    return None


def one_prompt(stream: bool) -> None:
    """Raises ValueError for stream=True, where several prompts were given."""
    if stream:
        raise ValueError("stream=True takes one prompt; call it once for each of several")


def _prompt(prompt: Prompt, called: str = "prompt") -> dict[str, Any]:
    """A prompt as the field that it is; an empty list is still the choice of token ids."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"{called} is {prompt!r:.60}; a text or a list of token ids is accepted")
    return {"token_ids": build(generation_pb2.TokenIds, {"ids": called}, ids=prompt)}


def chat(
    model: str,
    messages: Messages,
    options: SamplingOptions,
    tools: Tools | None,
    continue_final_message: bool,
    cache_salt: str | None,
    priority: int | None,
) -> Streaming[generation_pb2.ChatResponse, types.GenerationChunk]:
    """Chat. Raises ValueError for tools or tool calls that JSON cannot hold."""
    request = build(
        generation_pb2.ChatRequest,
        model=model,
        messages=_messages(messages),
        sampling=sampling(options),
        tools_json=_json(tools),
        continue_final_message=continue_final_message,
        cache_salt=cache_salt or "",
        priority=priority or 0,
    )
    return Streaming(
        path=_GENERATION + "Chat", request=request, response=generation_pb2.ChatResponse, parse=responses.chunk
    )


def score(model: str, prompt: Prompt, top_logprobs: int) -> Unary[generation_pb2.ScoreResponse, types.Score]:
    """Score."""
    request = build(generation_pb2.ScoreRequest, model=model, top_logprobs=top_logprobs, **_prompt(prompt, "text"))
    return Unary(
        path=_GENERATION + "Score",
        request=request,
        response=generation_pb2.ScoreResponse,
        parse=responses.score,
        retry=True,
    )


def classify(
    model: str, inputs: TextInput | Sequence[TextInput]
) -> Unary[generation_pb2.ClassifyResponse, types.ClassificationResult]:
    """Classify."""
    return Unary(
        path=_GENERATION + "Classify",
        request=build(generation_pb2.ClassifyRequest, model=model, inputs=_inputs(inputs)),
        response=generation_pb2.ClassifyResponse,
        parse=responses.classifications,
        retry=True,
    )


def embed(
    model: str,
    inputs: TextInput | Sequence[TextInput],
    pooling: types.Pooling | None,
    normalize: bool,
    dimensions: int | None,
) -> Unary[generation_pb2.EmbedResponse, types.EmbeddingResult]:
    """Embed. Raises ValueError for a pooling that there is not."""
    if pooling is not None and pooling not in _POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; {', '.join(_POOLINGS)} are accepted")
    request = build(
        generation_pb2.EmbedRequest,
        model=model,
        inputs=_inputs(inputs),
        pooling=_POOLINGS[pooling] if pooling else generation_pb2.POOLING_UNSPECIFIED,
        normalize=normalize,
        dimensions=dimensions,
    )
    return Unary(
        path=_GENERATION + "Embed",
        request=request,
        response=generation_pb2.EmbedResponse,
        parse=responses.embeddings,
        retry=True,
    )


def _inputs(inputs: TextInput | Sequence[TextInput]) -> list[generation_pb2.TextInput]:
    if not isinstance(inputs, str | list | tuple):
        raise TypeError(f"inputs is {inputs!r:.60}; a text, token ids, or a list of these is accepted")
    is_one = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int))
    all_inputs: Any = [inputs] if is_one else inputs
    return [_text_input(one, f"inputs[{index}]") for index, one in enumerate(all_inputs)]


def _text_input(one: TextInput, name: str) -> generation_pb2.TextInput:
    names = {"text": name, "text_pair": f"{name}[1]"}
    if isinstance(one, str):
        return build(generation_pb2.TextInput, names, text=one)
    if not isinstance(one, list | tuple):
        raise TypeError(f"{name} is {one!r:.60}; a text, a pair of texts, or a list of token ids is accepted")
    if len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], str):
        return build(generation_pb2.TextInput, names, text=one[0], text_pair=one[1])
    return generation_pb2.TextInput(token_ids=build(generation_pb2.TokenIds, {"ids": name}, ids=one))


def tokenize(
    given: str | Messages, model: str, tools: Tools | None, continue_final_message: bool
) -> Unary[generation_pb2.TokenizeResponse, types.Tokenization]:
    """Tokenize, of a text or of a conversation."""
    request = build(
        generation_pb2.TokenizeRequest,
        text=given if isinstance(given, str) else "",
        messages=() if isinstance(given, str) else _messages(given),
        model=model,
        tools_json=_json(tools),
        continue_final_message=continue_final_message,
    )
    return Unary(
        path=_GENERATION + "Tokenize",
        request=request,
        response=generation_pb2.TokenizeResponse,
        parse=responses.tokenization,
        retry=True,
    )


def _messages(messages: Messages) -> list[generation_pb2.ChatMessage]:
    given = () if isinstance(messages, str | Mapping) else tuple(messages)
    if isinstance(messages, str | Mapping) or not all(isinstance(message, Mapping) for message in given):
        raise TypeError('messages is a list of messages, such as [{"role": "user", "content": "Hello"}]')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _message(message: Mapping[str, Any] | types.Message, called: str) -> generation_pb2.ChatMessage:
    if "role" not in message:
        raise ValueError(f'{called} has no "role"; it is "system", "user", "assistant" or another of the template\'s')
    fields = ("role", "content", "tool_call_id", "name")
    known = (*fields, "tool_calls")
    for name, value in message.items():
        if value and name not in known:
            raise ValueError(f"{called} has {name!r}; a message has {', '.join(known)}")
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f'{called} has no "content"; give the text, which may be ""')
    values = {name: message.get(name) or "" for name in fields}
    if not isinstance(values["content"], str):
        values["content"] = _joined(values["content"], f"{called}.content")
    return build(
        generation_pb2.ChatMessage,
        {name: f"{called}.{name}" for name in fields},
        **values,
        tool_calls_json=_json(message.get("tool_calls")),
    )


def _joined(parts: Any, called: str) -> str:
    """The text of content that is a list of text parts, as other APIs have it; nothing is put between them."""
    if not isinstance(parts, list | tuple):
        raise TypeError(f'{called} is {parts!r:.60}; a text is accepted, or a list of {{"type": "text", "text": ...}}')
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TypeError(f'{called}[{index}] is {part!r:.60}; {{"type": "text", "text": ...}} is accepted')
    return "".join(part["text"] for part in parts)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) if value else ""


def adapter_name(adapter: str | types.Adapter) -> str:
    """The resource name of "id", "id@version", a resource name, or an Adapter (then of its version).

    Raises ValueError where the part after "@" is neither a number nor "latest".
    """
    if isinstance(adapter, types.Adapter):
        return f"adapters/{adapter.adapter_id}/versions/{adapter.version}"
    if text(adapter, "adapter").startswith("adapters/"):
        return adapter
    adapter_id, at, version = adapter.partition("@")
    if not at or version == "latest":
        return f"adapters/{adapter_id}"
    if not re.fullmatch(r"[0-9]{1,9}", version):
        raise ValueError(f'{adapter!r}: expected ID or ID@VERSION, where VERSION is a number or "latest"')
    return f"adapters/{adapter_id}/versions/{int(version)}"


def create_adapter(
    files: AdapterFiles,
    *,
    adapter_id: str,
    strategy: str | None,
    new_version: bool,
    load: bool,
    request_id: str | None,
) -> Upload[adapters_pb2.CreateAdapterResponse, types.Adapter]:
    """CreateAdapter. The request_id is made here, once, so that a retry cannot publish a second version."""
    upload = build(
        adapters_pb2.AdapterUpload,
        adapter_id=adapter_id,
        strategy=strategy or "",
        files=[
            adapters_pb2.FileInfo(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in files.files
        ],
        new_version=new_version,
        load=load,
        request_id=request_id or new_request_id(),
    )

    def messages() -> Iterator[Message]:
        yield adapters_pb2.CreateAdapterRequest(upload=upload)
        for name, data in files.chunks():
            yield adapters_pb2.CreateAdapterRequest(chunk=adapters_pb2.FileChunk(name=name, data=data))

    return Upload(
        path=_ADAPTERS + "CreateAdapter",
        messages=messages,
        response=adapters_pb2.CreateAdapterResponse,
        parse=responses.loaded_adapter,
    )


def get_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.GetAdapterResponse, types.Adapter]:
    """GetAdapter."""
    return Unary(
        path=_ADAPTERS + "GetAdapter",
        request=build(adapters_pb2.GetAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.GetAdapterResponse,
        parse=responses.adapter,
        retry=True,
    )


def list_adapters(page_size: int, token: str) -> Unary[adapters_pb2.ListAdaptersResponse, Page[types.Adapter]]:
    """ListAdapters, one page."""
    return Unary(
        path=_ADAPTERS + "ListAdapters",
        request=build(adapters_pb2.ListAdaptersRequest, page_size=page_size, page_token=token),
        response=adapters_pb2.ListAdaptersResponse,
        parse=responses.adapter_page,
        retry=True,
    )


def list_versions(
    adapter: str | types.Adapter, page_size: int, token: str
) -> Unary[adapters_pb2.ListVersionsResponse, Page[types.Adapter]]:
    """ListVersions, one page. Raises ValueError for a single version."""
    return Unary(
        path=_ADAPTERS + "ListVersions",
        request=build(
            adapters_pb2.ListVersionsRequest,
            parent=_whole_adapter(adapter),
            page_size=page_size,
            page_token=token,
        ),
        response=adapters_pb2.ListVersionsResponse,
        parse=responses.version_page,
        retry=True,
    )


def _whole_adapter(adapter: str | types.Adapter) -> str:
    """The resource name without a version. Raises ValueError where one is named."""
    if isinstance(adapter, types.Adapter):
        adapter = adapter.adapter_id
    if "@" in adapter or "/versions/" in adapter:
        raise ValueError(f"{adapter!r}: the versions of an adapter are listed; give its id without a version")
    return adapter_name(adapter)


def delete_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.DeleteAdapterResponse, int]:
    """DeleteAdapter, of an id or an Adapter."""
    adapter_id = adapter.adapter_id if isinstance(adapter, types.Adapter) else adapter
    return Unary(
        path=_ADAPTERS + "DeleteAdapter",
        request=build(adapters_pb2.DeleteAdapterRequest, name=adapter_name(adapter_id)),
        response=adapters_pb2.DeleteAdapterResponse,
        parse=lambda message: message.deleted_versions,
        retry=False,
    )


def delete_version(adapter: str) -> Unary[adapters_pb2.DeleteVersionResponse, int]:
    """DeleteVersion, of "id@version". Parsed to how many were deleted, which is one."""
    return Unary(
        path=_ADAPTERS + "DeleteVersion",
        request=build(adapters_pb2.DeleteVersionRequest, name=adapter_name(adapter)),
        response=adapters_pb2.DeleteVersionResponse,
        parse=lambda message: 1,
        retry=False,
    )


def delete(adapter: str | types.Adapter) -> Unary[Any, int]:
    """DeleteVersion of "id@version", else DeleteAdapter. Raises ValueError for "id@latest": that moves."""
    if isinstance(adapter, types.Adapter) or ("@" not in adapter and "/versions/" not in adapter):
        return delete_adapter(adapter)
    if adapter.endswith(("@latest", "/latest")):
        raise ValueError(f"{adapter!r}: name the version to delete by its number, such as dates@3")
    return delete_version(adapter)


def load_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.LoadAdapterResponse, types.Adapter]:
    """LoadAdapter."""
    return Unary(
        path=_ADAPTERS + "LoadAdapter",
        request=build(adapters_pb2.LoadAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.LoadAdapterResponse,
        parse=responses.loaded_adapter,
        retry=True,
    )


def unload_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.UnloadAdapterResponse, types.Adapter]:
    """UnloadAdapter."""
    return Unary(
        path=_ADAPTERS + "UnloadAdapter",
        request=build(adapters_pb2.UnloadAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.UnloadAdapterResponse,
        parse=responses.unloaded_adapter,
        retry=True,
    )


def pin_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.PinAdapterResponse, types.Adapter]:
    """PinAdapter."""
    return Unary(
        path=_ADAPTERS + "PinAdapter",
        request=build(adapters_pb2.PinAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.PinAdapterResponse,
        parse=responses.loaded_adapter,
        retry=True,
    )


def unpin_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.UnpinAdapterResponse, types.Adapter]:
    """UnpinAdapter."""
    return Unary(
        path=_ADAPTERS + "UnpinAdapter",
        request=build(adapters_pb2.UnpinAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.UnpinAdapterResponse,
        parse=responses.adapter,
        retry=True,
    )


def list_strategies(page_size: int, token: str) -> Unary[strategies_pb2.ListStrategiesResponse, Page[types.Strategy]]:
    """ListStrategies, one page."""
    return Unary(
        path=_STRATEGIES + "ListStrategies",
        request=build(strategies_pb2.ListStrategiesRequest, page_size=page_size, page_token=token),
        response=strategies_pb2.ListStrategiesResponse,
        parse=responses.strategy_page,
        retry=True,
    )


def get_strategy(strategy: str) -> Unary[strategies_pb2.GetStrategyResponse, types.Strategy]:
    """GetStrategy, by id or resource name."""
    return Unary(
        path=_STRATEGIES + "GetStrategy",
        request=build(strategies_pb2.GetStrategyRequest, name=resource_name("strategies", strategy)),
        response=strategies_pb2.GetStrategyResponse,
        parse=responses.strategy,
        retry=True,
    )


def get_server() -> Unary[server_pb2.GetServerResponse, types.ServerInfo]:
    """GetServer."""
    return Unary(
        path=_SERVER + "GetServer",
        request=server_pb2.GetServerRequest(),
        response=server_pb2.GetServerResponse,
        parse=responses.server,
        retry=True,
    )


_SINGULAR = {"datasets": "dataset", "tuningJobs": "job", "strategies": "strategy"}
"""What arguments that name one of a collection are called."""


def resource_name(collection: str, resource: str) -> str:
    """The resource name "collection/{id}" of an id; a name stays as it is."""
    return (
        resource if text(resource, _SINGULAR[collection]).startswith(f"{collection}/") else f"{collection}/{resource}"
    )
