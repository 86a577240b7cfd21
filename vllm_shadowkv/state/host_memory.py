"""How much host memory is free: for the machine, and for this process's control group (a container's limit)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""Control groups without a limit say "max" (version 2) or a number beyond any machine (version 1)."""

_VERSION_2 = "memory.max", "memory.current", "inactive_file"
_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def free_bytes() -> int:
    """Host memory that can still be taken, in bytes: the less of the machine's and the control group's."""
    machine = int(psutil.virtual_memory().available)
    group = cgroup()
    return machine if group is None else min(machine, group[1])


def cgroup(root: Path = CGROUP, membership: str | None = None) -> tuple[int, int] | None:
    """The tightest limit of this process's control groups and what is free of it, in bytes; None without a limit.

    Pages of files count as used, but are given back when memory is wanted, so inactive ones count as free here, as they
    do in what the kernel calls available.

    Args:
        root: where the control groups are mounted.
        membership: this process's groups, as /proc/self/cgroup says them; None: read it.
    """
    groups = _groups(root, _membership() if membership is None else membership)
    limits = [_limit(folder, *names) for folder, names in groups]
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit[1], default=None)


def _membership() -> str:
    try:
        return PROC.read_text()
    except OSError:
        return ""


def _groups(root: Path, membership: str) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the groups that limit memory, from the process's own ones up, and the names of files in them."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root, _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = root / "memory", _VERSION_1
        else:
            continue
        # In a container the path may be the host's, and not exist; or lead out of what the container sees.
        own = mount / path.strip("/") if ".." not in path else mount
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield folder, names


def _limit(group: Path, limit_name: str, usage_name: str, cached_name: str) -> tuple[int, int] | None:
    try:
        limit = int((group / limit_name).read_text())
        used = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return (limit, max(limit - used + int(stat.get(cached_name, 0)), 0)) if limit < UNLIMITED else None
