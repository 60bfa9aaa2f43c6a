"""What SIGTERM and SIGINT do while nothing runs yet, or nothing any more, that would have to be ended in order."""

from __future__ import annotations

import os
import signal

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


def end_at_once() -> None:
    """From now on each of the two ends this process without a word. Signals that were held back arrive here."""
    for number, code in EXIT_CODES.items():
        signal.signal(number, lambda *_, code=code: os._exit(code))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)


def hold_back() -> None:
    """Lets signals wait until end_at_once, or whatever else unblocks them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
