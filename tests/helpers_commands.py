"""The command line in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_LIMIT = 300  # seconds


def qad(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "qad.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)


def interrupted(*arguments: Any, when: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Run a command and send it Ctrl-C as soon as something is so, on lines of 200 columns."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qad.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    limit = time.monotonic() + _LIMIT
    while time.monotonic() < limit and process.poll() is None and not when():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)
