"""How many threads to use: engines whose threads spin at barriers collapse when a core is shared."""

import math

import psutil

from qad.host import allowed_cores


def free_cores() -> int:
    """Return the number of physical cores that this process may use and that nobody else uses now, at least 1."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    busy = psutil.cpu_percent(interval=0.1) / 100 * physical
    return max(1, math.floor(allowed_cores() - busy + 0.5))
