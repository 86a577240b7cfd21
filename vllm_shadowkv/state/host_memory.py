"""How much host memory is free: for the machine, and for this process's control group (a container's limit)."""

from __future__ import annotations

from pathlib import Path

import psutil

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""Control groups without a limit say "max" (version 2) or a number beyond any machine (version 1)."""

_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_bytes() -> int:
    """Host memory that can still be taken, in bytes: the less of the machine's and the control group's."""
    machine = int(psutil.virtual_memory().available)
    group = cgroup()
    return machine if group is None else min(machine, group[1])


def cgroup(root: Path = CGROUP, own: str | None = None) -> tuple[int, int] | None:
    """The tightest limit of this process's control groups and what is free of it, in bytes; None without a limit.

    Pages of files count as used, but are given back when memory is wanted, so inactive ones count as free here, as they
    do in what the kernel calls available.

    Args:
        root: where the control groups are mounted.
        own: path of this process's group below it; None: as /proc/self/cgroup says.
    """
    group = root / (_own() if own is None else own).strip("/")
    limits = [_limit(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit[1], default=None)


def _own() -> str:
    """This process's group in version 2; the mount's root where that is not known, as in containers."""
    try:
        lines = PROC.read_text().splitlines()
    except OSError:
        return "/"
    path = next((line[3:] for line in lines if line.startswith("0::/")), "/")
    return path if ".." not in path else "/"


def _limit(group: Path) -> tuple[int, int] | None:
    for limit_file, usage_file, stat_file in _FILES:
        try:
            limit = int((group / limit_file).read_text())
            used = int((group / usage_file).read_text())
            stat = dict(line.split() for line in (group / stat_file).read_text().splitlines())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if limit < UNLIMITED:
            return limit, max(limit - used + int(stat.get("inactive_file", 0)), 0)
    return None
