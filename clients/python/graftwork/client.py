"""The synchronous client."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from graftwork.requests import generation as generation_requests
from graftwork.requests import pooling as pooling_requests
from graftwork.requests.generation import GenerateCall, Prompt, Prompts
from graftwork.requests.messages import Messages, Tools
from graftwork.requests.pooling import TextInput
from graftwork.requests.sampling import SamplingOptions
from graftwork.resources.adapters import Adapters
from graftwork.resources.datasets import Datasets
from graftwork.resources.server import Server
from graftwork.resources.strategies import Strategies
from graftwork.resources.tuning import Tuning
from graftwork.streams import GenerationStream
from graftwork.transport.calls import Streaming
from graftwork.transport.settings import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S, Settings
from graftwork.transport.sync_transport import Transport
from graftwork.types import (
    ClassificationResult,
    EmbeddingResult,
    Generation,
    GenerationChunk,
    Pooling,
    Score,
    Tokenization,
)

AT_ONCE = 32
"""Prompts of one call that are answered at the same time."""


class Client:
    """A connection to a Graftwork server; safe to use from several threads. Close it, or use it in a with block.

    address: HOST:PORT; None: the environment variable GRAFTWORK_ADDRESS, else 127.0.0.1:8470. timeout: seconds for each
    call unless it says otherwise, retries included. max_retries: how often a call is sent again, with exponential
    back-off, when the server is away or says when to come back; only calls that may safely be sent twice are.
    Connects with the first call. Raises ValueError for a bad timeout or max_retries.

    model, in every method: "base", an adapter id (its newest version, as "id@latest"), or
    "id@version".
    """

    adapters: Adapters
    datasets: Datasets
    server: Server
    strategies: Strategies
    tuning: Tuning

    def __init__(
        self,
        *,
        address: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        self._transport = Transport(Settings.of(address, timeout, max_retries))
        self.adapters = Adapters(self._transport)
        self.datasets = Datasets(self._transport)
        self.server = Server(self._transport)
        self.strategies = Strategies(self._transport)
        self.tuning = Tuning(self._transport)

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._transport.settings.address

    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream: ...
    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: bool,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | GenerationStream: ...
    @overload
    def generate(
        self,
        model: str,
        prompt: Prompts,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    def generate(
        self,
        model: str,
        prompt: Prompt | Prompts,
        *,
        stream: bool = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | GenerationStream | list[Generation]:
        """Continues a prompt, a text or token ids; or several of them, which are sent at the same time.

        cache_salt: share nothing in the server's cache with requests of another salt, at most 256 characters. priority:
        -100 to 100, higher ones begin first.
        Options: max_tokens, temperature, top_p, top_k, seed, stop, logprobs, n and more; see SamplingOptions.
        Returns the whole generation, or with stream=True an iterator of its chunks that can be closed; of a list of
        prompts a list of generations, in their order, or the first error.
        Raises NotFoundError for an unknown model, InvalidArgumentError with the wrong field, and APIError.
        """
        call = generation_requests.generate(model, prompt, options, cache_salt, priority, stream=stream)
        if isinstance(call, list):
            return self._answer_all(call, timeout, options)
        return self._answer(call, stream, timeout, options)

    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool,
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | GenerationStream: ...
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | GenerationStream:
        """Answers a conversation: messages are mappings with role and content, oldest first.

        tools: descriptions of tools that the chat template shows to the model. continue_final_message: go on with the
        last message, the assistant's, instead of beginning a new one.
        Other options, return value and errors are those of generate; FailedPreconditionError: the base model has no
        chat template.
        """
        call = generation_requests.chat(model, messages, options, tools, continue_final_message, cache_salt, priority)
        return self._answer(call, stream, timeout, options)

    def _answer(
        self, call: Streaming[Any, GenerationChunk], stream: bool, timeout: float | None, options: SamplingOptions
    ) -> Generation | GenerationStream:
        running = GenerationStream(self._transport, call, timeout=timeout, options=options)
        return running if stream else running.result()

    def _answer_all(
        self, calls: list[GenerateCall], timeout: float | None, options: SamplingOptions
    ) -> list[Generation]:
        running = [GenerationStream(self._transport, call, timeout=timeout, options=options) for call in calls]
        threads = ThreadPoolExecutor(min(len(calls), AT_ONCE), "graftwork-generate")
        try:
            return list(threads.map(GenerationStream.result, running))
        finally:
            for stream in running:  # after an error, or Ctrl-C: none of the others goes on
                stream.close()
            threads.shutdown(cancel_futures=True)

    def score(self, model: str, text: Prompt, *, top_logprobs: int = 0, timeout: float | None = None) -> Score:
        """Returns the log probability of every token of a text or of token ids, without sampling.

        top_logprobs: alternatives to return at each position, 0 to 20. Raises NotFoundError, InvalidArgumentError.
        """
        return self._transport.unary(generation_requests.score(model, text, top_logprobs), timeout)

    def classify(
        self, model: str, inputs: TextInput | Sequence[TextInput], *, timeout: float | None = None
    ) -> ClassificationResult:
        """Returns the labels of a text, or of several, with the head of an adapter or of the base model.

        inputs: a text, token ids, or a list of at most 256 of these; a list may hold pairs of texts too. Raises
        FailedPreconditionError where there is no head, NotFoundError, InvalidArgumentError.
        """
        return self._transport.unary(pooling_requests.classify(model, inputs), timeout)

    def embed(
        self,
        model: str,
        inputs: TextInput | Sequence[TextInput],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        timeout: float | None = None,
    ) -> EmbeddingResult:
        """Returns the vector of a text, or of several: a hidden state of the last layer, the adapter applied.

        inputs: as in classify. pooling: "mean", "cls" (the first token), "last", "max", "mean_sqrt_len" or
        "weightedmean"; None: what the base model's files say, else the last token for decoders and the mean for
        encoders. normalize: scale vectors to length 1. dimensions: keep so many first values. Raises NotFoundError,
        InvalidArgumentError, FailedPreconditionError if the files ask for what is not done and no pooling is named.
        """
        return self._transport.unary(pooling_requests.embed(model, inputs, pooling, normalize, dimensions), timeout)

    def tokenize(
        self,
        text: str | Messages,
        *,
        model: str = "base",
        tools: Tools | None = None,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> Tokenization:
        """Returns the token ids that the server makes of a text, or of a conversation with its chat template.

        tools and continue_final_message are as in chat.
        """
        return self._transport.unary(generation_requests.tokenize(text, model, tools, continue_final_message), timeout)

    def close(self) -> None:
        """Closes the connection; calls in flight end with CancelledError."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
