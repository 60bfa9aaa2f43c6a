"""The connection of one command, and what its errors become: a line on stderr and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer

from graftwork.cli import exit_codes
from graftwork.cli.output import plain
from graftwork.client import Client
from graftwork.errors import (
    APIError,
    GraftworkError,
    JobFailedError,
    NotFoundError,
    UnavailableError,
    UploadError,
    in_words,
)


@contextmanager
def session(ctx: typer.Context, address: str | None, as_json: bool) -> Iterator[Client]:
    """A client for the body of a command; its errors end the command.

    address: of the command's own option; None: that given before the command. as_json: errors as JSON on stderr, too.
    """
    interrupts = signal.getsignal(signal.SIGINT)
    try:
        if callable(interrupts):  # not where they are ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with Client(address=address or ctx.obj) as client:
            yield client
        sys.stdout.flush()  # here, where a closed pipe still has a name
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(exit_codes.PIPE_CLOSED) from None
    except KeyboardInterrupt:
        raise typer.Exit(exit_codes.INTERRUPTED) from None
    except (GraftworkError, ValueError, OverflowError) as error:
        # ValueError: an argument that fits no request, such as an adapter "x@y" or a token id below 0.
        _report(error, as_json, address or ctx.obj, _options(ctx))
        raise typer.Exit(_exit_code(error)) from None
    finally:
        if callable(interrupts):
            signal.signal(signal.SIGINT, interrupts)


def _exit_code(error: Exception) -> int:
    match error:
        case NotFoundError():
            return exit_codes.NOT_FOUND
        case UnavailableError():
            return exit_codes.UNREACHABLE
        case JobFailedError():
            return exit_codes.JOB_FAILED
        case UploadError() | ValueError() | OverflowError():
            return exit_codes.USAGE
        case _:
            return exit_codes.FAILED


def _report(error: Exception, as_json: bool, address: str, options: Mapping[str, str]) -> None:
    if as_json:
        print(json.dumps({"error": _error_object(error)}, ensure_ascii=False), file=sys.stderr)
        return
    if not isinstance(error, APIError):
        print(f"error: {error}", file=sys.stderr)
        return
    if isinstance(error, UnavailableError) and "Connection refused" in error.message:
        print(f"error: no server listens on {address}; start one with: graftwork serve", file=sys.stderr)
        return
    if isinstance(error, UnavailableError) and "resolv" in error.message:
        print(f"error: the host of {address} is not known", file=sys.stderr)
        return
    print(f"error: {error.spoken(partial(_option, options))} {error.facts}", file=sys.stderr)
    for violation in error.unsaid_violations:
        print(f"  {_option(options, violation.field)}: {violation.description}", file=sys.stderr)


def _options(ctx: typer.Context) -> dict[str, str]:
    """The command's options as they are typed, by the names of its arguments in Python."""
    spellings = {str(parameter.name): parameter.opts[0] for parameter in ctx.command.params}
    return {name: typed for name, typed in spellings.items() if typed.startswith("-")}


def _option(options: Mapping[str, str], field: str) -> str:
    """A field's path in a request as what was typed: "sampling.top_p" is --top-p, "spec.config.r" is --set r."""
    word = in_words(field)
    if word.startswith("config."):
        return f"--set {word.removeprefix('config.')}"
    return options.get(word, word)


def _error_object(error: Exception) -> dict[str, Any]:
    if isinstance(error, APIError):
        names = ("code", "message", "reason", "metadata", "field_violations", "request_id", "retry_after_ms")
        return {name: plain(getattr(error, name)) for name in names}
    if isinstance(error, JobFailedError):
        return {"code": f"JOB_{error.job.state.upper()}", "message": str(error), "job": plain(error.job)}
    return {"code": "BAD_USAGE", "message": str(error)}
