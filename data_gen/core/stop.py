"""SIGINT and SIGTERM end a command with 130 or 143 and one line, at any moment; nothing here imports anything large."""

import atexit
import os
import signal
import sys
from types import FrameType

GRACE = 10
"""Seconds to leave nothing unfinished in; then the process ends, whatever swallowed its exception."""
LINE = b"lookahead: stopped; the same command continues\n"


def heed_signals() -> None:
    """From now on; children of this process go on as they were made."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        code = 128 + number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)

        def end(*_: object) -> None:
            os.write(2, LINE)
            os._exit(code)

        if _importing(frame):  # a half-imported package turns the exception into another, or into none
            end()
        signal.signal(signal.SIGALRM, end)
        signal.alarm(GRACE)
        atexit.register(os.write, 2, LINE)  # after what is said on the way out
        sys.exit(code)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
