"""What a process says when it cannot go on."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import NoReturn

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h: a defect of ours."""

log = logging.getLogger("graftwork.process")


def exit_after(error: BaseException | None) -> NoReturn:
    """Ends this process at once: where a thread has ended by `error`, others might wait for it for ever."""
    log.critical("this process ends: %s in thread %s", _what(error), threading.current_thread().name, exc_info=error)
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def exit_when_a_thread_dies() -> None:
    """From now on, an exception that nobody handles in any thread but the main one ends this process."""
    threading.excepthook = lambda arguments: exit_after(arguments.exc_value)


def _what(error: BaseException | None) -> str:
    return "an exception" if error is None else type(error).__name__
