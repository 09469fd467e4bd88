"""Results as JSON with everything needed to judge them, and as the README's table."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import envoy
from bench.case import Outcome, Settings
from bench.mesh import PYTHON
from bench.process import CHECKOUT, BenchError


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
        "versions": _versions(),
    }


def document(outcomes: Sequence[Outcome], settings: Settings) -> dict[str, Any]:
    return {
        "machine": machine(),
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "cases": [outcome.as_json() for outcome in outcomes],
    }


def markdown(document: dict[str, Any]) -> str:
    """Every figure, every contender's medians, then the machine; from the same document that --json writes."""
    return "\n\n".join((_figures(document, only_budgets=False), _medians(document), _about(document)))


def _figures(document: dict[str, Any], *, only_budgets: bool) -> str:
    """only_budgets: leave out the figures that nothing is asked of."""
    lines = ["| what | measured | budget |", "|---|---|---|"]
    for case in document["cases"]:
        for figure in case["figures"]:
            budget = "–"
            if figure["at_least"] is not None:
                budget = f"≥ {figure['at_least']:g}"
            elif figure["at_most"] is not None:
                budget = f"≤ {figure['at_most']:g}"
            if budget == "–" and only_budgets:
                continue
            value = _number(figure["value"], figure["unit"])
            mark = "" if figure["keeps_budget"] else " (missed)"
            lines.append(f"| {figure['name']} | {value}{mark} | {budget} |")
    return "\n".join(lines)


def _medians(document: dict[str, Any]) -> str:
    lines = [
        "| case | contender | req/s | p50 µs | p99 µs | added p50 µs | CPU µs/request | PSS MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        for name, row in case["medians"].items():
            if "req_s" in row:
                cells = [
                    f"{row[key]:,.0f}" if key in row else "–"
                    for key in ("req_s", "p50_us", "p99_us", "added_p50_us", "cpu_us_per_request", "pss_mib")
                ]
                lines.append(f"| {case['case']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _about(document: dict[str, Any]) -> str:
    about = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"Medians of {document['rounds']} interleaved rounds of {document['seconds']} s; {about['cores']} cores "
        f"({about['cpu']}), Linux {about['kernel']}; throughput: "
        f"proxies on one core, load and origin on another; latency: load on one core, all it calls on another; "
        f"{versions}."
    )


def update_readme(document: dict[str, Any]) -> None:
    """The figures with a budget go between the marks in the README, everything into docs/benchmarks.md."""
    path = CHECKOUT / "README.md"
    text = path.read_text()
    before, opening, rest = text.partition("<!-- bench -->\n")
    _, closing, after = rest.partition("<!-- /bench -->")
    if not opening or not closing:
        raise BenchError(f"{path} has no <!-- bench --> … <!-- /bench --> marks")
    more = "Every contender's medians: [docs/benchmarks.md](docs/benchmarks.md)."
    short = "\n\n".join((_figures(document, only_budgets=True), _about(document), more))
    path.write_text(before + opening + short + "\n" + closing + after)
    head = "# Benchmarks\n\nOne run of `make bench`; what each case does is in `bench/`.\n\n"
    (CHECKOUT / "docs" / "benchmarks.md").write_text(head + markdown(document) + "\n")


def _number(value: float, unit: str) -> str:
    if unit == "×":
        return f"{value:.2f}"
    return f"{value:,.1f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def _versions() -> dict[str, str]:
    found = {"meshproxy": _commit(), "python": platform.python_version()}
    for name in ("uvloop",):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        found["envoy"] = _first_line([envoy.binary(), "--version"]).rpartition("version:")[2].split("/")[1]
    except (BenchError, IndexError):
        pass
    haproxy = _first_line(["haproxy", "-v"]).split()
    if len(haproxy) > 2:
        found["haproxy"] = haproxy[2]
    nginx = _first_line(["/usr/sbin/nginx", "-v"]).rpartition("/")[2]
    if nginx:
        found["nginx"] = nginx
    wrk = _first_line(["wrk", "-v"]).split()
    if len(wrk) > 1:
        found["wrk"] = wrk[1].removeprefix("debian/")
    h2load = _first_line(["h2load", "--version"]).rpartition("nghttp2/")[2]
    if h2load:
        found["h2load"] = h2load
    return found


def _commit() -> str:
    text = subprocess.run(
        [PYTHON, "-c", "import meshproxy; print(meshproxy.__version__)"], capture_output=True, text=True, cwd=CHECKOUT
    ).stdout.strip()
    commit = _first_line(["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"])
    return f"{text} ({commit})" if commit else text


def _first_line(command: list[str]) -> str:
    """First line a program prints on either stream; empty when it is not there."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line for line in (run.stdout + run.stderr).splitlines() if line.strip()), "").strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
