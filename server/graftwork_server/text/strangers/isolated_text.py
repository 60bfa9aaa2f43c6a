"""Tokenizers and chat templates that adapters bring, as the front uses them: what they compute runs in helpers.

Of an adapter's tokenizer the front itself has a table of its tokens and the base's decoder, nothing else. So a streamed
token costs what one of the base's costs, and nothing of a stranger's is run here.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument, Unavailable
from graftwork_server.logs import client
from graftwork_server.text import TextProcessor
from graftwork_server.text.strangers.adapter_text import AdapterTexts
from graftwork_server.text.strangers.helper import CallText, Helper, HelperStopped, ReadTexts, TextFacts, Value
from graftwork_server.text.strangers.helper_pool import HelperPool

SECONDS = 2.0
"""Of a processor's time, for one request in a helper."""
FILE_BYTES_PER_SECOND = 1_000_000
"""Reading the files of an adapter gets a second more for so many bytes of the base's tokenizer."""
CACHED_TEXTS = 32
"""Texts of adapters in memory."""
CHARACTERS_PER_SECOND = 50_000
"""It gets a second more for so many characters of text."""
LARGE_TEXT_CHARACTERS = 10_000
"""A text of the base's tokenizer goes to a helper from here on: tokenising holds the interpreter's lock."""
SLOW_TEXT_CHARACTERS = 200_000
"""Longer texts leave a helper to shorter ones."""

T = TypeVar("T")


class IsolatedText(TextProcessor):
    """A tokenizer and chat template whose text is tokenised in a helper, see `through`; decoding happens here.

    folder: where its files are, "" for the base's.
    """

    def __init__(self, base: TextProcessor, folder: str, facts: TextFacts) -> None:
        tokenizer = base._tokenizer if facts.tokens is None else _table(base._tokenizer, facts.tokens)
        super().__init__(tokenizer, facts.named_tokens, None)
        self.special_ids = frozenset(facts.special_ids)
        self.folder = folder
        self._has_chat_template = facts.has_chat_template
        self._helper: Helper | None = None

    @classmethod
    def of_base(cls, base: TextProcessor) -> Self:
        """The base's own."""
        facts = TextFacts(
            is_base=True,
            has_chat_template=base.has_chat_template,
            special_ids=list(base.special_ids),
            named_tokens=base.named_tokens,
        )
        return cls(base, "", facts)

    def through(self, helper: Helper) -> Self:
        """The same text, able to encode as long as the helper is the caller's."""
        bound = copy.copy(self)
        bound._helper = helper
        return bound

    @property
    def has_chat_template(self) -> bool:
        """Whether render_chat and encode_chat can work."""
        return self._has_chat_template

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See TextProcessor."""
        if skip_special_tokens:
            ids = [id for id in ids if id not in self.special_ids]
        return super().decode(ids, skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """See TextProcessor."""
        return list(self._call("encode", text=text))

    def encode_pair(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """See TextProcessor."""
        ids, type_ids = self._call("encode_pair", text=text, pair=pair)
        return ids, type_ids

    def encode_plain(self, text: str) -> list[int]:
        """See TextProcessor."""
        return list(self._call("encode_plain", text=text))

    def encode_following(self, text: str) -> list[int]:
        """See TextProcessor."""
        return list(self._call("encode_following", text=text))

    def end_tokens(self) -> list[int]:
        """See TextProcessor."""
        return list(self._call("end_tokens"))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
        """See TextProcessor."""
        arguments = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables}
        return str(self._call("render_chat", **arguments))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **named: Any
    ) -> list[int]:
        """See TextProcessor."""
        arguments = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **named}
        return list(self._call("encode_chat", **arguments))

    def _encode(self, *arguments: Any, **named: Any) -> NoReturn:
        raise RuntimeError("a stranger's tokenizer encodes in a helper only")

    def _call(self, method: str, **arguments: Any) -> Any:
        if self._helper is None:
            raise RuntimeError(f"{method} of an adapter's text needs a helper; see IsolatedTexts.run")
        answer = self._helper.ask(CallText(self.folder, method, json.dumps(arguments)))
        assert isinstance(answer, Value)
        return answer.value


class IsolatedTexts:
    """Texts of adapters by digest, the last used ones kept. To be used on one event loop."""

    def __init__(self, files: AdapterTexts, pool: HelperPool) -> None:
        """`files`: knows the base's, to compare with; it reads none of an adapter's here. The pool's helpers do."""
        self.base = files.base
        self._files = files
        self._pool = pool
        self._base_in_helpers = None if files.base is None else IsolatedText.of_base(files.base)
        self._cache: OrderedDict[str, TextProcessor | None] = OrderedDict()
        self._reading: dict[str, asyncio.Task[TextProcessor | None]] = {}

    async def of(self, digest: str, folder: str | Path) -> TextProcessor | None:
        """The adapter's own, or the base's where it brings none (None if the base has none either).

        Raises FailedPrecondition: TOKENIZER_INVALID, TOKENIZER_MISMATCH; ResourceExhausted (QUEUE_FULL).
        """
        if digest in self._cache:
            self._cache.move_to_end(digest)
            return self._cache[digest]
        # One reading for all who wait; it goes on when one of them goes away.
        if digest not in self._reading:
            task = self._reading[digest] = asyncio.create_task(self._read_in_helper(folder, str(folder), blame=True))
            task.add_done_callback(lambda done: self._read(digest, done))
        return await asyncio.shield(self._reading[digest])

    async def read(self, folder: str | Path) -> TextProcessor | None:
        """As `of`, for files that have no digest yet: on their sender's account."""
        return await self._read_in_helper(folder, f"upload of {client.get()}", blame=False)

    async def _read_in_helper(self, folder: str | Path, key: str, *, blame: bool) -> TextProcessor | None:
        if await asyncio.to_thread(self._files.brings_nothing, folder):
            return self.base
        seconds = SECONDS + self._files.base_bytes / FILE_BYTES_PER_SECOND
        request = ReadTexts(str(folder))
        try:
            facts = await self._pool.run(
                key, lambda helper: helper.ask(request), seconds=seconds, blame=blame, tells=False
            )
        except HelperStopped as stopped:
            what, field = "reading the adapter's tokenizer files", "tokenizer.json"
            raise stopped_error(stopped, what, reason="TOKENIZER_INVALID", field=field, seconds=seconds) from None
        assert isinstance(facts, TextFacts)
        if facts.is_base or self.base is None:
            return self.base
        return await asyncio.to_thread(IsolatedText, self.base, str(folder), facts)

    async def run(self, text: TextProcessor, size: int, work: Callable[[TextProcessor], T], field: str = "text") -> T:
        """The result of `work` with `text`: with a helper if it is a stranger's, or if `size`, in characters, is large.

        `field`: where the request has it. Raises InvalidArgument (CHAT_TEMPLATE_REJECTED, TEXT_TOO_COSTLY) if it takes
        too much time or memory, Unavailable (HELPER_DIED), ResourceExhausted (QUEUE_FULL).
        """
        if isinstance(text, IsolatedText):
            isolated, key, at_once, blame = text, text.folder, 1, True
        elif size <= LARGE_TEXT_CHARACTERS:
            return work(text)
        else:
            assert self._base_in_helpers is not None
            isolated, key, blame = self._base_in_helpers, f"text of {client.get()}", False
            at_once = max(self._pool.count - 1, 1)
        seconds, slow = SECONDS + size / CHARACTERS_PER_SECOND, size > SLOW_TEXT_CHARACTERS
        try:
            return await self._pool.run(
                key,
                lambda helper: work(isolated.through(helper)),
                seconds=seconds,
                at_once=at_once,
                slow=slow,
                blame=blame,
                ends_with_caller=slow,
            )
        except HelperStopped as stopped:
            if field == "messages":
                what = "rendering the chat template and tokenising its text"
                error = stopped_error(stopped, what, reason="CHAT_TEMPLATE_REJECTED", field=field, seconds=seconds)
            else:
                what = "tokenising the text"
                error = stopped_error(stopped, what, reason="TEXT_TOO_COSTLY", field=field, seconds=seconds)
            raise error from None

    def _read(self, digest: str, done: asyncio.Task[TextProcessor | None]) -> None:
        del self._reading[digest]
        if done.cancelled() or done.exception() is not None:
            return
        self._cache[digest] = done.result()
        if len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)


def stopped_error(
    stopped: HelperStopped, doing: str, *, reason: str, field: str, seconds: float
) -> GraftworkServerError:
    """The caller's error for a request whose helper was stopped. `doing`: what it did; `seconds`: what it had."""
    if stopped.why == "killed":
        return Unavailable(
            f"{doing} was ended from outside; send it again",
            reason="HELPER_DIED",
            metadata={"retry_after_ms": "500"},
        )
    kind = FailedPrecondition if field.endswith(".json") else InvalidArgument
    much = "memory than it may" if stopped.why == "memory" else f"than the {seconds:.3g} s of a processor that it may"
    return kind(f"{doing} took more {much}", reason=reason, field=field)


def _table(base: Tokenizer, tokens: Sequence[str | None]) -> Tokenizer:
    """A tokenizer that decodes `tokens`, by id, as the base's decodes its own. It encodes nothing."""
    vocab = {token: id for id, token in enumerate(tokens) if token is not None}
    table = Tokenizer(WordLevel(vocab, unk_token=""))
    table.decoder = base.decoder
    return table
