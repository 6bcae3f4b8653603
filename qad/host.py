"""``host``: the machine this runs on as a board, its memory and arithmetic measured in about two seconds.

What is measured, with torch's own kernels and the best of several short windows counting:

- bandwidth: matrix times vector in float32, which reads a matrix once, as decoding does. Each thread walks through its
  own part of a buffer that is four times the caches where memory allows. Smaller working sets are measured too, because
  a small model stays in the cache.
- int8: ``torch._int_mm`` (u8 or s8 dot products where the processor has them); fp16: the faster of fp16, bf16 and
  float32 matrix products. A kernel of llama.cpp may be better than torch's: these are floors of what it can do.
- on an NVIDIA GPU: a copy within its memory, and the same products.

Others may use the machine meanwhile. Time counts while a thread has a core, so that waiting for one is left out; caches
and memory are still shared, and the best of all measurements that were made is kept, per machine, under the user's
cache folder. Threads are Python's, each running torch on one core: torch's own would wait for one another.

What is given up: where threads got no core at the same time, the sum of what each reads is more than they read
together. A GPU's part has not been run yet: no machine with one was at hand.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from qad.devices import GIB, HOST, Device, Fact, make
from qad.errors import UserError
from qad.files import cache_folder, replacing_file

_FORMAT = 1
_INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_COLUMNS = 4096  # of the matrix that is read, in float32
_CHUNK = 128  # rows of one product: 2 MiB, so that a call's own cost is small beside it
_SMALLEST = 4 * 2**20  # bytes of the smallest working set
_LARGEST = GIB
_CACHES = 4  # times the caches
_WINDOW = 0.03  # seconds
_WINDOWS = 3
_MATRIX = 512
_SLOWEST = 0.5  # seconds of one product


@dataclass(frozen=True)
class Measurement:
    """What was measured on a machine, and when.

    Attributes:
        format: Of this record.
        machine: The processor and the memory; another machine measures anew.
        when: Seconds since 1970 of the last measurement.
        times: How many there were; the best of them is kept.
        buffer_bytes, cache_bytes: Of the bandwidth measurement, and of the processor's caches (0: not known).
        curves: Threads -> [bytes, bytes a second] of reads.
        rates: Name of a compute rate -> operations a second.
        gpu: Name, memory and compute capability of the GPU, empty without one.
        seconds: How long the last measurement took, after loading torch.
    """

    format: int
    machine: dict[str, Any]
    when: float
    times: int
    buffer_bytes: int
    cache_bytes: int
    curves: dict[str, list[list[float]]]
    rates: dict[str, float]
    gpu: dict[str, Any]
    seconds: float


# ---------------------------------------------------------------------------------------------------- what there is


def _processor() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and its instruction sets that matter, as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    pairs = [line.partition(":")[::2] for line in lines]
    values = {key.strip(): value.strip() for key, value in reversed(pairs)}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    name = values.get("model name") or values.get("Model") or platform.machine()
    return name, tuple(flag for flag in _INSTRUCTION_SETS if flag in flags)


def allowed_cores() -> float:
    """Return the physical cores that this process may use: those it is bound to, or its share in a container."""
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    quota = math.inf
    with contextlib.suppress(OSError, ValueError):
        limit, period = _QUOTA.read_text().split()
        quota = math.inf if limit == "max" else int(limit) / int(period)
    # Two logical processors of one core share its arithmetic units: the second adds little.
    return min(physical, max(1, allowed * physical // logical), quota)


def _memory() -> tuple[int, int]:
    """Return the bytes of memory that this process may use, and those free now."""
    memory = psutil.virtual_memory()
    total = memory.total
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(_MEMORY_LIMIT.read_text()))
    return total, min(total, memory.available)


def _cache_bytes() -> int:
    """Return the size of the last level of cache, 0 if the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes)


def describe() -> dict[str, Any]:
    """Return what this machine is, nothing measured: its node, system, processor, cores and memory."""
    name, sets = _processor()
    return {
        "node": platform.node(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": name,
        "instruction_sets": list(sets),
        "cores": max(1, int(allowed_cores())),
        "memory": _memory()[0],
    }


# ---------------------------------------------------------------------------------------------------- measuring


def _clock() -> Callable[[], float]:
    """Return a clock of the time that the calling thread had a core; of all time where the system's is too coarse."""
    return time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter


def _best_rate(work: list[Callable[[], float]], window: float = _WINDOW, windows: int = _WINDOWS) -> float:
    """Return the best rate of several windows: work of all threads a second.

    Args:
        work: One function per thread, which does a small piece and returns how much that was.
        window: Seconds.
        windows: How many.
    """
    best = 0.0
    for _ in range(windows):
        rates = [0.0] * len(work)
        gate = threading.Barrier(len(work))

        def run(index: int, rates: list[float] = rates, gate: threading.Barrier = gate) -> None:
            clock, done = _clock(), 0.0
            gate.wait()
            end = time.perf_counter() + window
            began = clock()
            while done == 0.0 or time.perf_counter() < end:
                done += work[index]()
            rates[index] = done / max(clock() - began, 1e-9)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(rates))
    return best


def _walk(torch: Any, matrix: Any, vector: Any) -> Callable[[], float]:
    """Return work that reads a matrix chunk after chunk, over and over."""
    chunks = matrix.split(_CHUNK)
    outputs = [torch.empty(len(chunk)) for chunk in chunks]
    position = 0

    def read() -> float:
        nonlocal position
        torch.mv(chunks[position], vector, out=outputs[position])
        size = chunks[position].numel() * 4
        position = (position + 1) % len(chunks)
        return size

    return read


def _read_curves(torch: Any, cores: int, size: int) -> dict[str, list[list[float]]]:
    """Return the read rates of one core and of all, for working sets from a few MiB up to ``size`` bytes."""
    row = _COLUMNS * 4
    whole = torch.ones(size // row, _COLUMNS)
    vector = torch.ones(_COLUMNS)
    curves: dict[str, list[list[float]]] = {}
    sizes = [working for power in range(16) if (working := _SMALLEST * 4**power) < size]
    for threads in sorted({1, cores}):
        points: list[list[float]] = []
        for working in (*sizes, size):
            parts = whole[: working // row].chunk(threads)
            points.append([working, _best_rate([_walk(torch, part, vector) for part in parts])])
        curves[str(threads)] = points
    return curves


def _products(torch: Any, device: str, side: int) -> dict[str, Callable[[], Any]]:
    """Return square matrix products to time, by the name of their rate."""
    left = torch.ones(side, side, device=device)
    whole = torch.ones(side, side, dtype=torch.int8, device=device)
    half, brain = left.half(), left.bfloat16()
    return {
        "int8": lambda: torch._int_mm(whole, whole),
        "fp16": lambda: half @ half,
        "bf16": lambda: brain @ brain,
        "fp32": lambda: left @ left,
    }


def _cpu_rates(torch: Any, cores: int) -> dict[str, float]:
    rates: dict[str, float] = {}
    ops = 2.0 * _MATRIX**3
    trials = _products(torch, "cpu", _MATRIX // 4)
    products = _products(torch, "cpu", _MATRIX)
    for name, trial in trials.items():
        try:
            trial()
            began = time.perf_counter()
            trial()
        except RuntimeError:
            continue  # this torch has no such kernel on this processor
        if 64 * (time.perf_counter() - began) > _SLOWEST and name != "fp32":
            continue  # emulated: not what a runtime would use, and too slow to wait for

        def work(product: Callable[[], Any] = products[name]) -> float:
            product()
            return ops

        work()
        for threads in sorted({1, cores}):
            rates[f"{name}_{threads}"] = _best_rate([work] * threads, windows=2)
    return rates


def _gpu(torch: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what the first NVIDIA GPU is, and its rates; nothing where torch sees none."""
    if not torch.cuda.is_available():
        return {}, {}
    properties = torch.cuda.get_device_properties(0)
    source = torch.ones(min(GIB, properties.total_memory // 16) // 4, device="cuda")
    target = torch.empty_like(source)

    def rate(work: Callable[[], Any], amount: float) -> float:
        best = 0.0
        for _ in range(6):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(4):
                work()
            end.record()
            end.synchronize()
            best = max(best, 4 * amount / (begin.elapsed_time(end) * 1e-3))
        return best

    # A copy reads and writes; both count.
    rates = {"gpu_bandwidth": rate(lambda: target.copy_(source), 2.0 * source.numel() * 4)}
    side = 4096
    for name, product in _products(torch, "cuda", side).items():
        with contextlib.suppress(RuntimeError):
            rates[f"gpu_{name}"] = rate(product, 2.0 * side**3)
    facts = {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        # A Jetson's GPU has no memory of its own.
        "integrated": bool(getattr(properties, "is_integrated", False)),
    }
    return facts, rates


def measure() -> Measurement:
    """Measure this machine. Takes about two seconds, and some more to load torch."""
    import torch

    machine = describe()
    cache = _cache_bytes()
    began = time.perf_counter()
    room = max(_SMALLEST, min(_LARGEST, _memory()[1] // 4))
    size = min(room, max(_CACHES * cache, 2**28))
    row = _COLUMNS * 4 * _CHUNK
    size = max(_SMALLEST, size // row * row)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        curves = _read_curves(torch, machine["cores"], size)
        rates = _cpu_rates(torch, machine["cores"])
    finally:
        torch.set_num_threads(threads)
    gpu, gpu_rates = _gpu(torch)
    return Measurement(
        format=_FORMAT,
        machine=machine,
        when=time.time(),
        times=1,
        buffer_bytes=size,
        cache_bytes=cache,
        curves=curves,
        rates=rates | gpu_rates,
        gpu=gpu,
        seconds=time.perf_counter() - began,
    )


def merge(old: Measurement, new: Measurement) -> Measurement:
    """Return the newer measurement with the better value of each rate: a busy machine only ever measures too little."""
    rates = {name: max(old.rates.get(name, 0.0), new.rates.get(name, 0.0)) for name in {**old.rates, **new.rates}}
    curves: dict[str, list[list[float]]] = {}
    for threads, points in new.curves.items():
        before = {point[0]: point[1] for point in old.curves.get(threads, [])}
        curves[threads] = [[size, max(rate, before.get(size, 0.0))] for size, rate in points]
    return Measurement(**(asdict(new) | {"rates": rates, "curves": curves, "times": old.times + 1}))


# ---------------------------------------------------------------------------------------------------- keeping


def _file(machine: Mapping[str, Any]) -> Path:
    """Return where a machine's measurement is kept: a shared home folder may serve several machines."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"host-{digest[:16]}.json"


def kept() -> Measurement | None:
    """Return this machine's measurement, None if there is none that can be read."""
    machine = describe()
    try:
        found = Measurement(**json.loads(_file(machine).read_text()))
    except (OSError, ValueError, TypeError, UserError):
        return None
    return found if found.format == _FORMAT and found.machine == machine else None


def _keep(measurement: Measurement) -> None:
    """Write a measurement where the next run finds it; without such a place each run measures anew."""
    with contextlib.suppress(OSError, UserError):
        file = _file(measurement.machine)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as temporary:
            temporary.write_text(json.dumps(asdict(measurement), indent=1))


def measurement(*, again: bool = False) -> Measurement:
    """Return what is known of this machine, measured now if it never was.

    Args:
        again: Measure in any case; the best of all measurements is kept.
    """
    before = kept()
    if before is not None and not again:
        return before
    now = measure()
    if before is not None:
        now = merge(before, now)
    _keep(now)
    return now


def age(when: float) -> str:
    """Return in words how long ago something was."""
    seconds = max(0.0, time.time() - when)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now" if seconds < 10 else f"{seconds:.0f} seconds ago"


def _falling(points: list[list[float]], floor: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Return a curve as rates that fall: a smaller working set is never slower to read, nor are more threads."""
    curve: list[tuple[int, float]] = []
    best = 0.0
    for size, rate in reversed(points):
        best = max(best, rate, floor.get(int(size), 0.0))
        curve.append((int(size), best))
    return tuple(reversed(curve))


def host(*, again: bool = False) -> Device:
    """Return this machine as a board; see the module.

    Args:
        again: Measure in any case.
    """
    found = measurement(again=again)
    machine, cores = found.machine, found.machine["cores"]
    one = _falling(found.curves["1"], {})
    everything = _falling(found.curves[str(cores)], dict(one))
    curves = {1: one, cores: everything}
    total, free = _memory()
    told = "the operating system"
    timed = f"measured {age(found.when)}" + (f", best of {found.times} times" if found.times > 1 else "")

    def seen(value: Any, note: str = "") -> Fact:
        return Fact(value, told, "", time.strftime("%Y-%m-%d"), note=note)

    def took(value: Any, note: str) -> Fact:
        return Fact(value, timed, "", time.strftime("%Y-%m-%d", time.localtime(found.when)), note=note)

    def rate(*names: str) -> float:
        return max(found.rates.get(name, 0.0) for name in names)

    halves = [f"{kind}_{threads}" for kind in ("fp16", "bf16", "fp32") for threads in (1, cores)]
    facts = {
        "memory_gib": seen(total / GIB, "what this process may use"),
        "memory_kind": seen("system"),
        "usable_share": seen(free / total, "free now"),
        "bandwidth_gb_s": took(
            everything[-1][1] / 1e9,
            f"reads of {found.buffer_bytes / 2**20:.0f} MiB by {cores} cores; the last cache has "
            f"{found.cache_bytes / 2**20:.0f} MiB",
        ),
        "cores": seen(cores, machine["processor"]),
        "instruction_sets": seen(list(machine["instruction_sets"])),
        "runtimes": seen(["llama.cpp CPU", "ONNX Runtime CPU", "GPTQ CPU"]),
        "cpu_int8_tops": took(rate("int8_1", f"int8_{cores}") / 1e12, "torch._int_mm"),
        "cpu_fp16_tflops": took(rate(*halves) / 1e12, "the fastest of fp16, bf16 and float32 products in torch"),
    }
    if found.gpu:
        facts |= {
            "gpu": seen(found.gpu["name"]),
            "compute_capability": seen(found.gpu["capability"]),
            "bandwidth_gb_s": took(found.rates["gpu_bandwidth"] / 1e9, "a copy in the GPU's memory, read and write"),
            "gpu_int8_tops": took(rate("gpu_int8") / 1e12, "torch._int_mm"),
            "gpu_fp16_tflops": took(rate("gpu_fp16", "gpu_bf16") / 1e12, "the faster of fp16 and bf16 in torch"),
            "runtimes": seen(["llama.cpp CUDA", "llama.cpp CPU", "ONNX Runtime CPU", "GPTQ CUDA"]),
        }
        if found.gpu["integrated"]:
            facts["memory_kind"] = seen("unified")
        else:
            facts["memory_kind"] = seen("gpu")
            facts["memory_gib"] = seen(found.gpu["memory"] / GIB)
            facts["usable_share"] = seen(0.9, "an estimate: others may use the GPU")
        curves = {}
    return make(HOST, f"this machine: {machine['processor']}", facts, curves)
