"""Energy of a piece of work, where the machine tells it; absent, and not zero, where it does not.

Three sources, of which the first that answers counts:

- a Jetson's own sensor of the whole board (INA3221, rail ``VDD_IN`` or ``SYS_5V0``), under ``/sys/class/hwmon``:
  millivolts times milliamperes, sampled;
- an NVIDIA card, by ``nvidia-smi``: watts, sampled; asked for only when the card does the work;
- RAPL of Intel and AMD processors, under ``/sys/class/powercap``: counters in microjoules of each package, which
  run over. Memory beside the package is not counted. Often readable by root only.

Whatever else runs on the machine is counted in. Samples are summed by the trapezoidal rule.
"""

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_POWERCAP = Path("/sys/class/powercap")
_HWMON = Path("/sys/class/hwmon")
_BOARD_RAILS = ("VDD_IN", "SYS_5V0", "POM_5V_IN")
_INTERVAL = 0.1  # seconds between samples


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None


def _packages(folder: Path) -> list[tuple[Path, float]]:
    """Return the counter of each package that can be read, and where it runs over, in microjoules."""
    # Cores and memory of a package are zones of their own below it (intel-rapl:0:1).
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    return [
        (zone / "energy_uj", _number(zone / "max_energy_range_uj") or 0.0)
        for zone in zones
        if _number(zone / "energy_uj") is not None
    ]


def _board_watts(folder: Path) -> Callable[[], float | None] | None:
    """Return a function that reads the power of a Jetson, None on other machines."""
    for label in sorted(folder.glob("hwmon*/in*_label")):
        with contextlib.suppress(OSError):
            if label.read_text().strip() in _BOARD_RAILS:
                volts = label.with_name(label.name.replace("_label", "_input"))
                amperes = volts.with_name(volts.name.replace("in", "curr", 1))

                def watts(volts: Path = volts, amperes: Path = amperes) -> float | None:
                    pair = _number(volts), _number(amperes)
                    return None if pair[0] is None or pair[1] is None else pair[0] * pair[1] * 1e-6

                if watts() is not None:
                    return watts
    return None


def _card_watts() -> float | None:
    """Return the power of the first NVIDIA card, None if ``nvidia-smi`` does not tell."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return float(done.stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


class Meter:
    """Measures the energy of a ``with`` block, again and again.

    Args:
        gpu: Whether an NVIDIA card does the work.
        powercap, hwmon: Where the system tells.

    Attributes:
        source: ``board``, ``card`` or ``rapl``; None where nothing tells.
        joules: Of the latest block; None where nothing told.
    """

    def __init__(self, *, gpu: bool = False, powercap: Path = _POWERCAP, hwmon: Path = _HWMON) -> None:
        self.joules: float | None = None
        self._packages: list[tuple[Path, float]] = []
        self._watts = _board_watts(hwmon)
        self.source = "board" if self._watts else None
        if self._watts is None and gpu and shutil.which("nvidia-smi") and _card_watts() is not None:
            self._watts, self.source = _card_watts, "card"
        if self._watts is None and not gpu:
            self._packages = _packages(powercap)
            self.source = "rapl" if self._packages else None

    def __enter__(self) -> Self:
        self.joules = None
        if self._watts is not None:
            self._samples: list[tuple[float, float]] = []
            self._stop = threading.Event()
            self._sample()
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        self._before = [_number(file) for file, _ in self._packages]
        return self

    def _sample(self) -> None:
        assert self._watts is not None
        watts = self._watts()
        if watts is not None:
            self._samples.append((time.perf_counter(), watts))

    def _follow(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._sample()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watts is not None:
            self._stop.set()
            self._thread.join()
            self._sample()
            pairs = list(zip(self._samples, self._samples[1:], strict=False))
            self.joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs) if pairs else None
        elif self._packages:
            total = 0.0
            for (file, limit), before in zip(self._packages, self._before, strict=True):
                after = _number(file)
                if before is None or after is None:
                    return
                total += after - before + (limit if after < before else 0.0)
            self.joules = total * 1e-6
