"""`meshproxy validate PATH…`: every problem of a configuration, as the proxy itself would find it.

Reads what `meshproxy run -c PATH…` would read, by the same code: loading, the last word between two files, translation.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from meshproxy.control.store import ResourceStore
from meshproxy.discovery.files import files_at
from meshproxy.discovery.provider import Document, Update
from meshproxy.resources.document import MAX_BYTES, Resource
from meshproxy.resources.load import load_text
from meshproxy.resources.problems import ConfigProblem, Severity

_COLOURS = {Severity.ERROR: "\x1b[31m", Severity.WARNING: "\x1b[33m"}
_END = "\x1b[0m"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "validate",
        help="check configuration files",
        description="Check configuration files; exit status 1 if any has an error.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="file, directory (*.yaml, *.yml, *.json), or - for stdin"
    )
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument(
        "--namespace", default="default", help="namespace of resources that name none (default: default)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if there is any error."""
    documents = list(_documents(args.paths, args.namespace))
    store = ResourceStore()
    store.apply(Update(documents=documents))
    resources = store.resources()
    problems = [*store.problems(), *_translation_problems(resources, args.namespace)]
    if args.output == "json":
        _print_json(len(documents), len(resources), problems, sys.stdout)
    else:
        _print_text(len(documents), len(resources), problems, sys.stdout)
    return 1 if any(problem.severity is Severity.ERROR for problem in problems) else 0


def _documents(paths: Iterable[str], namespace: str) -> Iterable[Document]:
    seen: set[str] = set()
    for path in paths:
        if path == "-":
            yield _load(sys.stdin.buffer.read(MAX_BYTES + 1), "-", namespace)
            continue
        found = files_at(path)
        if found is None:
            yield _unreadable(path, "no such file or directory")
            continue
        for file in found:
            if file in seen:
                continue
            seen.add(file)
            try:
                with open(file, "rb") as opened:
                    data = opened.read(MAX_BYTES + 1)
            except OSError as error:
                yield _unreadable(file, (error.strerror or str(error)).lower())
            else:
                yield _load(data, file, namespace)


def _load(data: bytes, source: str, namespace: str) -> Document:
    resources, problems = load_text(data, source, namespace)
    return Document(source=source, resources=resources, problems=problems)


def _unreadable(path: str, why: str) -> Document:
    problem = ConfigProblem(Severity.ERROR, path, 0, "", "", f"cannot be read: {why}", "")
    return Document(source=path, problems=(problem,))


def _translation_problems(resources: Sequence[Resource], namespace: str) -> list[ConfigProblem]:
    """What does not fit together although each resource is well formed."""
    if importlib.util.find_spec("meshproxy.snapshot.translate") is None:
        return []
    from meshproxy.model.endpoint import NOWHERE
    from meshproxy.snapshot.translate import ProxyContext, translate

    _, problems = translate(resources, ProxyContext(locality=NOWHERE, default_namespace=namespace))
    return list(problems)


def _print_text(files: int, resources: int, problems: Sequence[ConfigProblem], out: TextIO) -> None:
    is_coloured = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for problem in problems:
        word = f"{problem.severity.value:<7}"
        if is_coloured:
            word = f"{_COLOURS[problem.severity]}{word}{_END}"
        print(f"{word} {problem.sentence()}", file=out)
    errors, warnings = _counts(problems)
    print(
        f"{_several(files, 'file')}, {_several(resources, 'resource')}: "
        f"{_several(errors, 'error')}, {_several(warnings, 'warning')}",
        file=out,
    )


def _print_json(files: int, resources: int, problems: Sequence[ConfigProblem], out: TextIO) -> None:
    errors, warnings = _counts(problems)
    report = {
        "files": files,
        "resources": resources,
        "errors": errors,
        "warnings": warnings,
        "problems": [{**dataclasses.asdict(problem), "sentence": problem.sentence()} for problem in problems],
    }
    json.dump(report, out, indent=2, ensure_ascii=True)
    out.write("\n")


def _counts(problems: Sequence[ConfigProblem]) -> tuple[int, int]:
    errors = sum(problem.severity is Severity.ERROR for problem in problems)
    return errors, len(problems) - errors


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
