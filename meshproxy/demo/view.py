"""What the demo shows: a line that is redrawn on a terminal, plain lines elsewhere, one JSON document on request."""

import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from meshproxy.demo.steps import Report


class View:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._has_colour = self._is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        encoding = (stream.encoding or "ascii").lower().replace("-", "")
        self._marks = ("✔", "✘") if encoding == "utf8" else ("ok", "FAILED")
        self._has_live = False

    def step(self, text: str) -> None:
        self._line(f"\n{self._paint(text, '1')}")

    def live(self, text: str) -> None:
        """Shown until the next line; only on a terminal."""
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K  {text}")
            self._stream.flush()
            self._has_live = True

    def note(self, text: str) -> None:
        self._line(f"    {text}")

    def outcome(self, name: str, measured: str, holds: bool) -> None:
        mark = self._paint(self._marks[0], "32") if holds else self._paint(self._marks[1], "31")
        self._line(f"  {mark} {name}: {measured}")

    def summary(self, report: "Report", seconds: float) -> None:
        self._line("")
        width = max(len(expectation.name) for expectation in report.expectations)
        for expectation in report.expectations:
            mark = self._marks[0] if expectation.holds else self._marks[1]
            colour = "32" if expectation.holds else "31"
            text = f"{expectation.name:{width}}  {expectation.measured}"
            if not expectation.holds:
                text += f"  (expected {expectation.expected})"
            self._line(f"{self._paint(mark, colour)} {text}")
        held = sum(expectation.holds for expectation in report.expectations)
        self._line(f"\n{held} of {len(report.expectations)} expectations held in {seconds:.0f} s")

    def _line(self, text: str) -> None:
        if self._has_live:
            self._stream.write("\r\x1b[K")
            self._has_live = False
        self._stream.write(text + "\n")
        self._stream.flush()

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_colour else text


def print_json(report: "Report", seconds: float) -> None:
    expectations = [
        {"name": e.name, "expected": e.expected, "measured": e.measured, "holds": e.holds} for e in report.expectations
    ]
    document = {"holds": report.holds, "seconds": seconds, "expectations": expectations, "figures": report.figures}
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")
