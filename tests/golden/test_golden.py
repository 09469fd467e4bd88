"""<case>/input.yaml → <case>/snapshot.json. UPDATE_GOLDEN=1 writes them anew: read the difference.

A case's first line may say how the process is started: `# locality=r1/z1 labels=app=client`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tests.support.translation import translated

CASES = sorted(path.parent for path in Path(__file__).parent.glob("*/input.yaml"))


def plain(value: Any) -> Any:
    """JSON without what is at its default, so that a golden file shows what the configuration says."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name))
            for field in fields(value)
            if getattr(value, field.name) != default(field)
        }
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in sorted(value)}
    if isinstance(value, (frozenset, set)):
        return sorted(map(plain, value))
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def started_with(text: str) -> dict[str, Any]:
    first = text.partition("\n")[0]
    if not first.startswith("# ") or "=" not in first:
        return {}
    context: dict[str, Any] = dict(word.split("=", 1) for word in first[2:].split())
    if "labels" in context:
        context["labels"] = dict(pair.split("=", 1) for pair in context["labels"].split(","))
    return context


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_snapshot_is_the_one_on_file(case: Path) -> None:
    text = (case / "input.yaml").read_text()
    result = translated(text, **started_with(text))
    found = json.dumps(
        {"warnings": result.warnings, "errors": result.errors, "snapshot": plain(replace(result.snapshot, version=""))},
        indent=1,
        ensure_ascii=False,
    )
    golden = case / "snapshot.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found + "\n")
    assert json.loads(found) == json.loads(golden.read_text())
