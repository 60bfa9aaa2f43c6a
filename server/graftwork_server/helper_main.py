"""A helper process: reads strangers' tokenizers, templates and data sets within limits. See text/strangers/helper.py.

python -m graftwork_server.helper_main FD FRONT_PID VOCAB_SIZE [BASE_DIR SOURCE_DIR]
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from graftwork_server.errors import (
    ErrorBody,
    FailedPrecondition,
    GraftworkServerError,
    Internal,
    InvalidArgument,
)
from graftwork_server.text import TextProcessor
from graftwork_server.text.chat_template import ChatTemplate, Message
from graftwork_server.text.strangers.adapter_text import AdapterTexts
from graftwork_server.text.strangers.helper import (
    CallText,
    CheckDataset,
    Limit,
    ReadTexts,
    Ready,
    Refused,
    Request,
    TextFacts,
    Value,
    request_decoder,
)
from graftwork_server.tuning.data import check_dataset_file
from graftwork_server.wire.frames import encode_frame, receive_frame

MEMORY_BYTES = 512 << 20
"""Address space that one request may take beyond what the process has, and beyond MEMORY_PER_FILE_BYTE."""
MEMORY_PER_FILE_BYTE = 24
"""A tokenizer takes so much memory for each byte of its file, while it is read."""
MAX_CHARACTERS = 4 << 20
"""Characters of a rendered conversation."""
MAX_TEMPLATE_CHARACTERS = 256 << 10
METHODS = frozenset(
    {"encode", "encode_pair", "encode_plain", "encode_following", "encode_chat", "render_chat", "end_tokens"}
)
_CACHED_TEXTS = 8
_PR_SET_PDEATHSIG = 1
_TRIAL = "The fox: 1, 2.\n\n\u00e9\u4e16\U0001f98a"


class _Strangers:
    """Answers requests; keeps the texts it read last."""

    def __init__(self, vocab_size: int, base_dir: str | None, source_dir: str | None) -> None:
        self._base = TextProcessor.from_dir(base_dir) if base_dir else None
        self._readers = AdapterTexts(
            self._base, base_dir, vocab_size, compile_template=_BoundedTemplate, source_dir=source_dir
        )
        self._texts: OrderedDict[str, TextProcessor | None] = OrderedDict()
        self._base_json = self._base.to_json() if self._base else None
        size = (Path(base_dir) / "tokenizer.json").stat().st_size if base_dir else 0
        self._headroom = MEMORY_BYTES + MEMORY_PER_FILE_BYTE * 2 * size
        self._most = 2 * self._headroom + _address_space()

    def answer(self, request: Request) -> bytes:
        """The answer as a frame. Never raises for what a request holds."""
        if _address_space() > self._most - self._headroom:
            self._texts.clear()
        try:
            with _memory_limit(_address_space() + self._headroom):
                return encode_frame(self._answer(request))
        except MemoryError:
            self._texts.clear()
            return encode_frame(Refused(_failed(request, "it takes too much memory"), over_limit=True))
        except UnicodeError:
            return encode_frame(Refused(_failed(request, "it makes text that is not valid Unicode")))
        except GraftworkServerError as error:
            return encode_frame(Refused(error.body()))
        except SystemExit:
            raise
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            what = str(error) or type(error).__name__
            return encode_frame(Refused(_failed(request, f"the tokenizers library cannot work with it: {what[:200]}")))

    def _answer(self, request: Request) -> TextFacts | Value:
        match request:
            case ReadTexts(folder):
                return self._facts(self._text(folder))
            case CallText(folder, method, arguments):
                return Value(self._call(folder, method, json.loads(arguments)))
            case CheckDataset(path, max_sequence_tokens, context_tokens):
                report = check_dataset_file(Path(path), self._base, max_sequence_tokens, context_tokens)
                return Value(msgspec.to_builtins(report))

    def _text(self, folder: str) -> TextProcessor | None:
        if not folder:
            return self._base
        if folder not in self._texts:
            while len(self._texts) >= _CACHED_TEXTS:
                self._texts.popitem(last=False)
            self._texts[folder] = self._readers.read(folder)
        self._texts.move_to_end(folder)
        return self._texts[folder]

    def _facts(self, text: TextProcessor | None) -> TextFacts:
        if text is None or text is self._base:
            return TextFacts(is_base=True)
        with contextlib.suppress(Exception):  # a panic, which is no Exception, is to come now and not with each request
            text.encode(_TRIAL)
        as_json = text.to_json()
        same = as_json == self._base_json
        return TextFacts(
            is_base=False,
            has_chat_template=text.has_chat_template,
            tokens=None if same else _tokens_by_id(as_json),
            special_ids=sorted(text.special_ids),
            named_tokens=dict(text.named_tokens),
        )

    def _call(self, folder: str, method: str, arguments: dict[str, Any]) -> Any:
        text = self._text(folder)
        if text is None or method not in METHODS:
            raise Internal(f"no {method!r} of {folder!r}", reason="INTERNAL")
        return getattr(text, method)(**arguments)


class _BoundedTemplate(ChatTemplate):
    """A template of at most MAX_TEMPLATE_CHARACTERS whose text has at most MAX_CHARACTERS."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FailedPrecondition(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are accepted",
                reason="CHAT_TEMPLATE_BROKEN",
            )
        super().__init__(source, variables)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        text = super().render(messages, add_generation_prompt=add_generation_prompt, **variables)
        if len(text) > MAX_CHARACTERS:
            raise InvalidArgument(
                f"the chat template makes {len(text)} characters of this; at most {MAX_CHARACTERS} are accepted",
                reason="CHAT_TEMPLATE_REJECTED",
                field="messages",
            )
        return text


def _tokens_by_id(tokenizer_json: str) -> list[str | None]:
    """The tokens of a tokenizer.json by id. Raises FailedPrecondition (TOKENIZER_INVALID) if one has two ids."""
    document = json.loads(tokenizer_json)
    vocab = document["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece, id) for id, (piece, _) in enumerate(vocab))
    by_id: dict[int, str] = {id: token for token, id in pairs}
    by_id |= {token["id"]: token["content"] for token in document["added_tokens"]}
    if len(set(by_id.values())) < len(by_id):
        raise FailedPrecondition(
            "tokenizer.json: a token has two ids", reason="TOKENIZER_INVALID", field="tokenizer.json"
        )
    return [by_id.get(id) for id in range(max(by_id, default=-1) + 1)]


def _failed(request: Request, what: str) -> ErrorBody:
    """A failure that has no error of ours: the doing of the file, or of the text, that the request is about."""
    match request:
        case ReadTexts():
            error: GraftworkServerError = FailedPrecondition(
                f"the tokenizer files cannot be used: {what}", reason="TOKENIZER_INVALID", field="tokenizer.json"
            )
        case CallText(_, method, _) if "chat" in method:
            error = InvalidArgument(
                f"the chat template or tokenizer fails on these messages: {what}",
                reason="CHAT_TEMPLATE_REJECTED",
                field="messages",
            )
        case CallText():
            error = InvalidArgument(f"the tokenizer fails on this text: {what}", reason="TEXT_INVALID", field="text")
        case CheckDataset():
            error = InvalidArgument(f"the data set cannot be checked: {what}", reason="DATASET_INVALID", field="data")
    return error.body()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _end_with_front(pid: int) -> None:
    """Killed when the front is, even in the middle of an endless loop."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:
        sys.exit(0)


def main(
    descriptor: str, front_pid: str, vocab_size: str, base_dir: str | None = None, source_dir: str | None = None
) -> None:
    """Answers requests until the socket is closed."""
    _end_with_front(int(front_pid))
    with socket.socket(fileno=int(descriptor)) as front:
        strangers = _Strangers(int(vocab_size), base_dir, source_dir)
        front.sendall(encode_frame(Ready()))
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                request = request_decoder.decode(receive_frame(front))
                if isinstance(request, Limit):
                    # Its signal ends the process, wherever it is; nothing is used up between requests.
                    signal.setitimer(signal.ITIMER_PROF, request.seconds)
                else:
                    front.sendall(strangers.answer(request))


if __name__ == "__main__":
    main(*sys.argv[1:])
