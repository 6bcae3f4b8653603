"""How many threads to use: engines whose threads spin at barriers collapse when a core is shared."""

import math
import os
from pathlib import Path

import psutil

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def _quota() -> float:
    """Return the CPUs that a container may use, infinity if there is no limit."""
    try:
        limit, period = _QUOTA_FILE.read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


def free_cores() -> int:
    """Return the number of physical cores that this process may use and that nobody else uses now, at least 1."""
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    # Two logical processors of one core share its arithmetic units: the second adds little.
    usable = min(physical, max(1, allowed * physical // logical), _quota())
    busy = psutil.cpu_percent(interval=0.1) / 100 * physical
    return max(1, math.floor(usable - busy + 0.5))
