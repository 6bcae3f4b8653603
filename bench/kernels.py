"""How fast the kernels are: against copies, and against what others use for the same work.

    python bench/kernels.py [--device cpu|cuda] [--threads 1] [--json OUT.json] [--plot OUT.png]

Each figure is the best of several rounds in which every contender has its turn, so that a neighbour on a shared machine
slows all of them alike. GB/s are the bytes that an operation must move, read and written, whatever it moves in fact.
There are two yardsticks, measured in the same process and the same rounds, of the same dtypes and by torch: a copy of
the weight itself ("/copy"), which runs as fast as the cache that the weight fits, and a copy of 256 MiB ("/memory"),
which runs as fast as the memory. For a large weight the two are alike; a small one, in a cache, can be several times as
fast as the memory.

Rivals of the forward pass without noise: the same formula in eager torch into memory that stays mapped (by default
each of its temporaries costs a page fault per 4 KiB), the same formula under torch.compile, torchao's fake quantizer
with mapped memory and with malloc as it is and, on a GPU, NVIDIA ModelOpt's; what is not installed is named and left
out. Needs torch and numpy alone; matplotlib for the plot.

Shapes: N output features, K input features, G blocks along K.
"""

import argparse
import ctypes
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from qad import native, ops
from qad.grid import GRIDS, Grid
from qad.noise import HARD, Noise
from qad.tensor import absmax_scales, as_blocks, round_scales

SHAPES = {
    "4096 x 4096": (4096, 4096),
    "4096 x 14336": (4096, 14336),
    "SmolLM2 q_proj 576 x 576": (576, 576),
    "SmolLM2 up_proj 1536 x 576": (1536, 576),
    "SmolLM2 embedding 49152 x 576": (49152, 576),
}
# Of weights and of what they become; fp32 weights of a model in 16 bits are a trainer's masters.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp32-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}
MEMORY_BYTES = 1 << 28  # that are read for a copy which no cache holds
Rivals = dict[str, Callable[[Tensor, torch.dtype], object]]
FORWARDS = {
    "forward": HARD,
    "forward, uniform noise": Noise("uniform", 0.0, seed=1),
    "forward, stochastic rounding": Noise("stochastic", 0.0, seed=1),
    "forward, partial": Noise("partial", 0.5, seed=1),
    "forward, uniform noise, half hard": Noise("uniform", 0.5, seed=1),
}


@dataclass(frozen=True)
class Row:
    """One operation on one tensor.

    Attributes:
        operation, shape, dtype: Which; the dtype as ``DTYPES`` names it. A copy out of memory has a shape of its own.
        milliseconds: Best time of a call.
        gigabytes_per_s: Bytes that must move over that time.
        copy_share: The same as a share of that of a copy of the weight.
        memory_share: The same as a share of that of a copy out of memory.
        faster_than: Time of each rival over ours.
    """

    operation: str
    shape: str
    dtype: str
    milliseconds: float
    gigabytes_per_s: float
    copy_share: float
    memory_share: float
    faster_than: dict[str, float]


class Stopwatch:
    """Times calls, on a GPU with its own events."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Return the mean time of a call among ``repeats`` in a row."""
        if not self._cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    def best(self, calls: dict[str, Callable[[], object]], rounds: int, least_s: float = 0.005) -> dict[str, float]:
        """Return the best time of each call; they take turns, each for at least ``least_s`` a turn."""
        repeats = {name: max(1, int(least_s / max(1e-9, self._warm(call)))) for name, call in calls.items()}
        times = {name: float("inf") for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name] = min(times[name], self.seconds(call, repeats[name]))
        return times

    def _warm(self, call: Callable[[], object]) -> float:
        self.seconds(call, 1)
        return self.seconds(call, 1)


def keep_pages_mapped() -> bool:
    """Make malloc keep its pages instead of handing large ones back; returns whether it could (glibc only)."""
    try:
        libc = ctypes.CDLL(None)
        no_mmap = libc.mallopt(-4, 0)  # M_MMAP_MAX
        no_trim = libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return False
    return bool(no_mmap and no_trim)


def eager_formula(weight_NK: Tensor, grid: Grid, out_dtype: torch.dtype) -> Tensor:
    """The forward pass as one writes it in torch, without checks, in place where it can be."""
    blocks = as_blocks(weight_NK.float(), grid)
    low_NG, high_NG = blocks.aminmax(dim=-1)
    if grid.signed_scale:
        scales = torch.where(high_NG >= -low_NG, high_NG, low_NG) / grid.code_min
    else:
        scales = torch.maximum(high_NG, -low_NG) / grid.code_max
    scales = round_scales(scales, grid).unsqueeze(-1)
    codes = (blocks * scales.reciprocal()).round_().clamp_(grid.code_min, grid.code_max)
    return codes.mul_(scales).view_as(weight_NK).to(out_dtype)


def compiled_formula(weight_NK: Tensor, grid: Grid, out_dtype: torch.dtype) -> Tensor:
    """The same without in-place steps, for the compiler to fuse."""
    blocks = as_blocks(weight_NK.float(), grid)
    low_NG, high_NG = blocks.amin(dim=-1), blocks.amax(dim=-1)
    if grid.signed_scale:
        scales = torch.where(high_NG >= -low_NG, high_NG, low_NG) / grid.code_min
    else:
        scales = torch.maximum(high_NG, -low_NG) / grid.code_max
    scales = round_scales(scales, grid).unsqueeze(-1)
    codes = (blocks * (1.0 / scales)).round().clamp(grid.code_min, grid.code_max)
    return (codes * scales).view_as(weight_NK).to(out_dtype)


def rivals(grid: Grid, device: torch.device) -> tuple[Rivals, list[str]]:
    """Return what else can do the forward pass here, and why the others cannot."""
    found: Rivals = {"eager torch": lambda weight, out_dtype: eager_formula(weight, grid, out_dtype)}
    missing: list[str] = []
    # For each shape and dtype by itself: past the limit, which is 8, it would run the formula as it is.
    torch._dynamo.config.recompile_limit = len(SHAPES) * len(DTYPES) + 1  # pyright: ignore[reportPrivateUsage]
    compiled = torch.compile(compiled_formula, dynamic=False)
    found["torch.compile"] = lambda weight, out_dtype: compiled(weight, grid, out_dtype)
    try:
        logging.disable(logging.WARNING)  # of libraries of kernels that it misses
        from torchao.quantization.qat import IntxFakeQuantizeConfig
        from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

        kind = getattr(torch, f"int{grid.bits}")
        theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(kind, group_size=grid.block, is_symmetric=True))
        found["torchao"] = lambda weight, out_dtype: theirs(weight).to(out_dtype)
    except ImportError as error:
        missing.append(f"torchao: {error}")
    finally:
        logging.disable(logging.NOTSET)
    if device.type == "cuda":
        try:
            from modelopt.torch.quantization.config import QuantizerAttributeConfig  # pyright: ignore
            from modelopt.torch.quantization.nn import TensorQuantizer  # pyright: ignore

            config = QuantizerAttributeConfig(num_bits=grid.bits, block_sizes={-1: grid.block})
            modelopt = TensorQuantizer(config)
            found["ModelOpt"] = lambda weight, out_dtype: modelopt(weight).to(out_dtype)
        except ImportError as error:
            missing.append(f"NVIDIA ModelOpt: {error}")
    else:
        missing.append("NVIDIA ModelOpt: its kernel needs a GPU")
    return found, missing


def measure_default_malloc(grid: Grid, shape: str, dtype: str, rounds: int, others: Rivals) -> dict[str, float]:
    """Return how many times faster than each rival the forward pass is while malloc hands large blocks back."""
    kind, out_kind = DTYPES[dtype]
    weight = (torch.randn(SHAPES[shape]) * 0.02).to(kind)
    out, used = torch.empty_like(weight, dtype=out_kind), torch.empty(weight.shape[0], weight.shape[1] // grid.block)
    ours = ops.FakeQuantizer(weight, None, grid, out, used)
    calls: dict[str, Callable[[], object]] = {"ours": lambda: ours(HARD)}
    calls |= {name: lambda rival=rival: rival(weight, out_kind) for name, rival in others.items()}
    times = Stopwatch(weight.device).best(calls, rounds)
    return {f"{name} (default malloc)": times[name] / times["ours"] for name in others}


def measure(grid: Grid, shape: str, dtype: str, device: torch.device, rounds: int, others: Rivals) -> Iterator[Row]:
    """Yield the figures of every operation on one tensor."""
    rows, columns = SHAPES[shape]
    watch = Stopwatch(device)
    kind, out_kind = DTYPES[dtype]
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(device, kind)
    grad, out = torch.randn_like(weight, dtype=out_kind), torch.empty_like(weight, dtype=out_kind)
    scales = absmax_scales(weight.float(), grid)
    used, codes = torch.empty_like(scales), torch.empty(rows, columns, dtype=torch.int8, device=device)
    stored = scales.to(torch.float16)
    kernels = native if device.type == "cpu" else ops.cuda_kernels()
    read, written, blocks = weight.element_size(), out.element_size(), scales.numel()
    calls: dict[str, tuple[Callable[[], object], int]] = {"copy": (lambda: out.copy_(weight), read + written)}
    forward = ops.FakeQuantizer(weight, None, grid, out, used)  # as the trainer does it
    given = ops.FakeQuantizer(weight, scales, grid, out)
    for name, noise in FORWARDS.items():
        calls[name] = (lambda noise=noise: forward(noise), read + written)
    calls["forward, scales given"] = (lambda: given(HARD), read + written)
    calls["backward"] = (
        lambda: ops.fake_quantize_backward(grad, weight, scales, grid, learn_scales=False),
        read + 2 * written,
    )
    calls["backward, learned scales"] = (
        lambda: kernels.fake_quantize_backward(grad, weight, scales, grid, HARD, used),
        read + 2 * written,
    )
    calls["quantize"] = (lambda: kernels.quantize(weight, None, grid, codes, stored), read + 1)
    calls["dequantize"] = (lambda: kernels.dequantize(codes, stored, grid, out), written + 1)
    # Not zeros, which are one page mapped many times.
    large = torch.ones(MEMORY_BYTES // read, dtype=kind, device=device)
    landing = torch.empty_like(large, dtype=out_kind)
    contenders = {name: call for name, (call, _) in calls.items()}
    contenders["copy out of memory"] = lambda: landing.copy_(large)
    contenders |= {name: lambda rival=rival: rival(weight, out_kind) for name, rival in others.items()}
    times = watch.best(contenders, rounds)
    copy_rate = calls["copy"][1] * weight.numel() / times["copy"] / 1e9
    memory_s = times["copy out of memory"]
    memory_rate = (read + written) * large.numel() / memory_s / 1e9
    for name, (_, per_element) in calls.items():
        extra = 0 if name == "copy" else 4 * blocks
        rate = (per_element * weight.numel() + extra) / times[name] / 1e9
        faster = {rival: times[rival] / times[name] for rival in others} if name == "forward" else {}
        yield Row(name, shape, dtype, times[name] * 1e3, rate, rate / copy_rate, rate / memory_rate, faster)
        if name == "copy":
            share = memory_rate / copy_rate
            yield Row("copy out of memory", shape, dtype, memory_s * 1e3, memory_rate, share, 1.0, {})


def commit() -> str:
    """Return the commit of the sources, empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine(device: torch.device) -> dict[str, str]:
    """Return what a figure must be read with."""
    facts = {"torch": torch.__version__, "platform": platform.platform(), "threads": str(torch.get_num_threads())}
    facts["kernels"] = ops.describe(device)
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            facts["driver"] = "unknown"
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        facts["device"] = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    return facts


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Draw each operation's share of the copy rate, one panel per dtype and one bar per shape, memory's rate ticked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    operations = [name for name in dict.fromkeys(row.operation for row in rows) if not name.startswith("copy")]
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(4 + 4 * len(dtypes), 7), sharex=True, sharey=True, squeeze=False
    )
    height = 0.8 / len(shapes)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        for index, shape in enumerate(shapes):
            share = {row.operation: row.copy_share for row in rows if row.dtype == dtype and row.shape == shape}
            places = [position + (index - (len(shapes) - 1) / 2) * height for position in range(len(operations))]
            panel.barh(places, [share.get(name, 0.0) for name in operations], height=height, label=shape)
            copy = next(row for row in rows if (row.dtype, row.shape, row.operation) == (dtype, shape, "copy"))
            label = "as fast as the memory copies" if index == len(shapes) - 1 else None
            at = [1 / copy.memory_share] * len(places)
            panel.scatter(at, places, marker="|", s=12, linewidths=0.8, color="black", zorder=3, label=label)
        panel.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(dtype)
        panel.set_xlabel("GB/s as a share of a copy of the weight")
        panel.set_yticks(range(len(operations)), operations)
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def positive(text: str) -> int:
    """Read a number of the command line that must be 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    plain = sorted(name for name, grid in GRIDS.items() if grid.is_plain)  # what there are kernels for
    parser.add_argument("--grid", default="q4_0", choices=plain, help="default: q4_0")
    parser.add_argument("--isa", choices=native.instruction_sets(), help="force an instruction set of the CPU kernels")
    shapes, dtypes = (", ".join(f"'{name}'" for name in names) for names in (SHAPES, DTYPES))
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE", help=f"some of {shapes}"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), metavar="DTYPE", help=f"some of {dtypes}"
    )
    parser.add_argument("--rounds", type=positive, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--no-rivals", action="store_true", help="measure ours and the copies alone")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--plot", type=Path, help="PNG to draw (needs matplotlib)")
    arguments = parser.parse_args()
    for path in (arguments.json, arguments.plot):  # now and not after the minutes of measuring
        if path and not path.parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}")

    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)  # nobody here has gradients; nobody shall look for any
    if reason := ops.why_reference(device):
        sys.exit(f"error: there are no kernels to measure on {device}: {reason}")
    if arguments.isa and device.type == "cpu":
        native.force_instruction_set(arguments.isa)
    grid = GRIDS[arguments.grid]
    others, missing = ({}, ["rivals: not asked for"]) if arguments.no_rivals else rivals(grid, device)
    fitting = [shape for shape in arguments.shapes if SHAPES[shape][1] % grid.block == 0]
    missing += [
        f"{shape}: blocks of {grid.block} do not divide its rows" for shape in arguments.shapes if shape not in fitting
    ]
    cases = [(shape, dtype) for shape in fitting for dtype in arguments.dtypes]
    if not cases:
        parser.error("; ".join(missing))
    # First, because malloc cannot be talked back into its default: it keeps using what it has kept.
    faulting = {
        case: {} if device.type == "cuda" else measure_default_malloc(grid, *case, min(5, arguments.rounds), others)
        for case in cases
    }
    mapped = device.type == "cuda" or keep_pages_mapped()
    facts = machine(device) | {"grid": grid.name, "commit": commit(), "pages": "kept mapped" if mapped else "default"}
    for name, fact in facts.items():
        print(f"{name:10} {fact}")
    for line in missing:
        print(f"not run    {line}")
    print(
        f"\n{'shape':30} {'dtype':9} {'operation':34} {'ms':>8} {'GB/s':>7} {'/copy':>6} {'/memory':>8}  "
        "times faster than"
    )
    rows: list[Row] = []
    for shape, dtype in cases:
        for row in measure(grid, shape, dtype, device, arguments.rounds, others):
            if row.operation == "forward":
                row.faster_than.update(faulting[shape, dtype])
            rows.append(row)
            faster = ", ".join(f"{name} {ratio:.1f}" for name, ratio in row.faster_than.items())
            print(
                f"{row.shape:30} {row.dtype:9} {row.operation:34} {row.milliseconds:8.3f} "
                f"{row.gigabytes_per_s:7.1f} {row.copy_share:6.2f} {row.memory_share:8.2f}  {faster}",
                flush=True,
            )
    if arguments.json:
        record = {"machine": facts, "not_run": missing, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        try:
            draw(
                rows,
                arguments.plot,
                f"{facts['device']}, {facts['kernels']}, {facts['threads']} thread(s), {grid.name}",
            )
        except ImportError as error:
            print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
