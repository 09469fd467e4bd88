"""How much memory each worker may use: the limit of the whole process group, less what control and supervisor take.

Source: cgroup v2 memory.max, cgroup v1 memory.limit_in_bytes (kernel documentation, admin-guide).
"""

import os
from pathlib import Path

from meshproxy.control.settings import Settings

STEP_BYTES = 1 << 20
"""A share is told again when it has changed by this much."""
KERNEL_SHARE = 1 / 16
"""Of a control group's limit: socket buffers and page tables count there, and are nobody's memory here."""
LEAST_SHARE_BYTES = 16 << 20
"""A worker with less could not serve at all."""

_UNLIMITED = 1 << 60
_PAGE = os.sysconf("SC_PAGE_SIZE")


def limit_bytes(
    settings: Settings, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What the operator said, else the tightest limit of the control groups this process is in; None: there is none."""
    if settings.memory_limit_bytes is not None:
        return settings.memory_limit_bytes or None
    limit = _cgroup_limit_bytes(root, own)
    return int(limit * (1 - KERNEL_SHARE)) if limit is not None else None


def _cgroup_limit_bytes(root: Path, own: Path) -> int | None:
    limits: list[int] = []
    mounts: tuple[Path, ...]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts, name = (root, root / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            mounts, name = (root / "memory",), "memory.limit_in_bytes"
        else:
            continue
        for mount in mounts:
            group = mount / path.strip("/")
            # Inside a container the path may be the host's: then the mount's own root is our group.
            for directory in (group, *group.parents):
                limits += _number(directory / name)
                if directory == mount:
                    break
    limits = [limit for limit in limits if limit < _UNLIMITED]
    return min(limits) if limits else None


def _number(file: Path) -> list[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() else []


def anonymous_bytes(pid: int) -> int:
    """What this process alone holds; 0 for one that is gone."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            _, resident, shared, _ = file.read().split(" ", 3)
    except OSError:
        return 0
    return (int(resident) - int(shared)) * _PAGE


def share_bytes(limit: int, others_bytes: int, workers: int) -> int:
    """What is left to each worker when the other processes of the group hold others_bytes."""
    return max((limit - others_bytes) // workers, LEAST_SHARE_BYTES)
