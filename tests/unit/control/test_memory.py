"""The memory limit: where it is said, and what of it a worker may use."""

from pathlib import Path

import pytest

from meshproxy.control.memory import LEAST_SHARE_BYTES, limit_bytes, share_bytes
from meshproxy.control.settings import Settings

MIB = 1 << 20


def said(tmp_path: Path, groups: str, files: dict[str, str], setting: int | None = None) -> int | None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    settings = Settings(config_paths=(), memory_limit_bytes=setting)
    return limit_bytes(settings, root=tmp_path / "cgroup", own=tmp_path / "own")


@pytest.mark.parametrize(
    ("groups", "files", "limit_mib"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{160 * MIB}\n"}, 150),  # an ancestor's
        ("0::/a\n", {"a/memory.max": f"{320 * MIB}\n", "memory.max": f"{160 * MIB}\n"}, 150),  # the tightest
        ("0::/host/path\n", {"memory.max": f"{160 * MIB}\n"}, 150),  # inside a container the path is the host's
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{160 * MIB}\n"}, 150),  # version 1
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/a\n", {"a/memory.max": "max\n"}, None),
        ("0::/gone\n", {}, None),
        ("3:cpu:/a\n", {"cpu/a/memory.max": f"{160 * MIB}\n"}, None),
    ],
)
def test_the_tightest_limit_of_the_control_groups_holds_less_what_the_kernel_takes(
    tmp_path: Path, groups: str, files: dict[str, str], limit_mib: int | None
) -> None:
    found = said(tmp_path, groups, files)
    assert found == (limit_mib * MIB if limit_mib is not None else None)


def test_what_the_operator_says_holds_before_the_control_group() -> None:
    assert limit_bytes(Settings(config_paths=(), memory_limit_bytes=96 * MIB)) == 96 * MIB
    assert limit_bytes(Settings(config_paths=(), memory_limit_bytes=0)) is None


def test_workers_share_what_the_others_leave_and_never_starve() -> None:
    assert share_bytes(128 * MIB, 48 * MIB, 2) == 40 * MIB
    assert share_bytes(128 * MIB, 120 * MIB, 2) == LEAST_SHARE_BYTES
