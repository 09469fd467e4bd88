"""Tells what held a worker's loop: the stack at the moment it was late, for the line that says it was.

Nothing runs while the loop is on time: each tick of the loop moves an interval timer ahead of itself, and only a tick
that does not come lets it go off. Its signal interrupts Python code between two instructions, so a call into C that
takes long is seen where it was made.
"""

import os
import signal
from types import FrameType

_DEPTH = 6


class StallWatch:
    """One per process, in its main thread."""

    __slots__ = ("_stack",)

    def __init__(self) -> None:
        self._stack = ""
        signal.signal(signal.SIGALRM, self._on_alarm)

    def expect(self, within_s: float) -> None:
        """The loop will call again within so many seconds."""
        signal.setitimer(signal.ITIMER_REAL, within_s)

    def take(self) -> str:
        """Where the loop was when it was late, innermost call first; empty where it was in no Python code."""
        stack, self._stack = self._stack, ""
        return stack

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        # Not logged here: the code that was interrupted may hold the log's lock.
        calls: list[str] = []
        while frame is not None and len(calls) < _DEPTH:
            code = frame.f_code
            calls.append(f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
            frame = frame.f_back
        self._stack = " < ".join(calls)
