"""python -m bench [CASE…]: run the cases, print the figures."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import (
    bodies,
    change,
    footprint,
    grpc,
    http1,
    http2,
    http3,
    idle,
    overload,
    pairs,
    report,
    soak,
    survival,
    tcp,
    udp,
)
from bench.case import Outcome, Settings, say
from bench.process import PINNINGS, BenchError

_MODULES = (http1, http2, http3, grpc, pairs, tcp, udp, footprint, idle, bodies, overload, change, survival, soak)
CASES = {case.name: case for module in _MODULES for case in module.CASES}

_ROUND_S = 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="meshproxy bench", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; none: all but the longest (see --list)")
    parser.add_argument("--list", action="store_true", help="print the cases and what each asks")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--seconds", type=int, help="seconds of load a round (default 3), or of overload (default 60)")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the soak (default 30)")
    parser.add_argument("--contenders", default="", help="comma-separated: only these (direct,envoy,haproxy,meshproxy)")
    parser.add_argument(
        "--pinning", choices=sorted(PINNINGS), help="cores, where not each case's own (see bench/process.py)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: report an earlier --json")
    parser.add_argument("--readme", action="store_true", help="put the Markdown between the marks in README.md")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses its budget")
    options = parser.parse_args(arguments)
    if options.list:
        for case in CASES.values():
            print(f"{case.name:<18} {case.question}{' (only by name)' if case.by_name_only else ''}")
        return 0
    if options.from_json:
        document = json.loads(options.from_json.read_text())
        if options.readme:
            report.update_readme(document)
        else:
            print(report.markdown(document))
        return 0
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)} (see --list)")
    if options.rounds < 1 or (options.seconds is not None and options.seconds < 1) or options.minutes < 0.5:
        parser.error("--rounds and --seconds must be at least 1, --minutes at least 0.5")
    needed, absent = _missing_programs()
    if needed:
        say(f"bench: {' and '.join(needed)} not installed; `make bench` installs what is missing")
        return 1
    for name in sorted(absent):
        say(f"bench: {name} is not installed, so its rows are left out; `make bench` installs it")
    settings = Settings(
        rounds=options.rounds,
        seconds=options.seconds or _ROUND_S,
        own_seconds=options.seconds,
        minutes=options.minutes,
        contenders=frozenset(filter(None, options.contenders.split(","))),
        pinning=options.pinning,
        absent=absent,
    )
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)  # also where a shell started us with it ignored
    outcomes: list[Outcome] = []
    failed = False
    for name in options.cases or [name for name, case in CASES.items() if not case.by_name_only]:
        case = CASES[name]
        say(f"{name}: {case.question}")
        outcome = Outcome(name, case.question)
        try:
            case.run(settings, outcome)
        except BenchError as error:
            say(f"  {name} not measured: {error}")
            outcome.notes.append(f"not measured: {error}")
            failed = True
        except KeyboardInterrupt:
            say("stopped")
            return 130
        outcomes.append(outcome)
        for figure in outcome.figures:
            say(
                f"  {figure.name}: {figure.value:.3g} {figure.unit}{'' if figure.keeps_budget else '  (budget missed)'}"
            )
    document = report.document(outcomes, settings)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.readme:
        report.update_readme(document)
    print(report.markdown(document) if options.markdown else _text(outcomes))
    missed = any(not figure.keeps_budget for outcome in outcomes for figure in outcome.figures)
    return 1 if failed or (options.check and missed) else 0


def _missing_programs() -> tuple[list[str], frozenset[str]]:
    """(what no case can do without, contenders that can be left out)."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))
    needed = [name for name in ("nginx", "wrk", "h2load") if shutil.which(name, path=path) is None]
    absent = {"haproxy"} if shutil.which("haproxy", path=path) is None else set()
    if importlib.util.find_spec("envoy") is None:
        absent.add("envoy")
    return needed, frozenset(absent)


def _text(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.case}: {outcome.question}")
        for name, row in outcome.rows.items():
            cells = "  ".join(f"{key} {value:,.1f}" for key, value in row.items() if key not in ("failed", "max_us"))
            lines.append(f"  {name:<16} {cells}")
        for figure in outcome.figures:
            budget = "" if figure.at_least is None and figure.at_most is None else (
                f"  [{'≥' if figure.at_least is not None else '≤'} {figure.at_least or figure.at_most:g}"
                f"{'' if figure.keeps_budget else ', missed'}]"
            )  # fmt: skip
            lines.append(f"  → {figure.name}: {figure.value:.3g} {figure.unit}{budget}")
        lines += [f"  note: {note}" for note in outcome.notes]
    return "\n".join(lines)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
