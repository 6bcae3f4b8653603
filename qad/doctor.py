"""``qad doctor``: what is installed, which kernels and runtimes work and why not, and what a model needs.

Nothing heavy is loaded to find out: versions come from the packages' metadata, a model's facts from its header and
configuration, with its modules made without memory. No weight is read, so damage within the weights is not found here;
training checks them.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from qad.architectures import detect_splitter
from qad.errors import UserError
from qad.gguf_check import read_header
from qad.gguf_load import read_config, read_tokenizer
from qad.grid import GRIDS, Grid
from qad.model import check_architecture, hub_is_unreachable, is_gguf, load_tokenizer, read_hf_config, resolve_source
from qad.ops import describe
from qad.plan import FALLBACKS, find_misfits, is_tied
from qad.runtimes import get, names

# Bytes a parameter takes in training, by what holds them. Adam keeps two moments of every parameter.
_TRAINING_BYTES = {"masters": 4, "forward weights": 4, "gradients": 4, "Adam moments": 8, "teacher": 4}
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "asimd", "asimddp", "sve")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(any(columns)))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _machine() -> Table:
    table = _table("machine", "", "")
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    table.add_row("platform", platform.platform())
    table.add_row(
        "cores", f"{psutil.cpu_count(logical=False)} physical, {psutil.cpu_count()} logical, {allowed} allowed"
    )
    table.add_row("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    table.add_row("disk", f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free in {Path.cwd()}")
    return table


def requirements() -> list[tuple[str, str | None]]:
    """Return every library that qad can use and an extra that installs it; None for what it cannot do without."""
    try:
        declared = requires("qad") or []
    except PackageNotFoundError:
        return []
    found: dict[str, str | None] = {}
    for text in declared:
        requirement = Requirement(text)
        extra = text.rpartition('extra == "')[2].rstrip('"') if "extra ==" in text else None
        if requirement.name != "qad" and extra not in ("dev", "all"):
            found.setdefault(requirement.name, extra)  # what cannot be done without is declared first
    return list(found.items())


def _libraries() -> tuple[Table, list[str]]:
    """Return the table of libraries, and the names of those missing that qad cannot do without."""
    table = _table("libraries", "library", "version", "if missing")
    missing: list[str] = []
    for name, extra in requirements():
        try:
            table.add_row(name, version(name), "")
        except PackageNotFoundError:
            remedy = "pip install qad" if extra is None else f"pip install 'qad[{extra}]'"
            table.add_row(name, "[yellow]not installed[/]", escape(remedy), style=None if extra else "red")
            if extra is None:
                missing.append(name)
    return table, missing


def _cpu_features() -> list[str]:
    """Return the processor's vector instruction sets that matter to a kernel, as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [torch.backends.cpu.get_cpu_capability()]
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def _kernels() -> Table:
    table = _table("kernels", "", "")
    table.add_row("on the CPU", escape(describe(torch.device("cpu"))))
    table.add_row(
        "processor", f"{platform.machine()}: {', '.join(_cpu_features()) or 'no vector instructions reported'}"
    )
    threads = torch.get_num_threads()
    table.add_row("torch", f"{torch.__version__}, {threads} thread{'s' if threads != 1 else ''}")
    if torch.cuda.is_available():
        gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        table.add_row("GPU", gpus)
        table.add_row("on the GPU", escape(describe(torch.device("cuda", torch.cuda.current_device()))))
    else:
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        table.add_row("on a GPU", f"not available: {reason}")
    return table


def _runtimes() -> Table:
    table = _table("runtimes", "runtime", "reads", "state")
    for name in names():
        runtime = get(name)
        reason = runtime.available()
        table.add_row(
            name, ", ".join(runtime.FORMATS), "[green]ready[/]" if reason is None else f"[yellow]{escape(reason)}[/]"
        )
    return table


def _quantizable(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield name and row length of each weight that a plan may quantize, a tied head once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield f"{name}.weight", module.weight.shape[-1]


def _read_model(source: str) -> tuple[PretrainedConfig, int, str]:
    """Return a model's configuration, its tokenizer's length, and how that tokenizer splits text.

    Raises:
        UserError: See ``qad.model``.
    """
    if is_gguf(source):
        header = read_header(Path(source))
        check_architecture(header.metadata["general.architecture"], source)
        config = read_config(header)
        tokenizer = read_tokenizer(Path(source), header)
        return config, len(tokenizer), f"{header.metadata.get('tokenizer.ggml.pre', 'missing')} (as the file says)"
    local_only = hub_is_unreachable(source)
    config = read_hf_config(source, local_only)
    tokenizer = load_tokenizer(source, local_only)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        splitter = "unknown: not a fast tokenizer" if backend is None else f"{detect_splitter(backend).name} (detected)"
    except UserError as error:
        splitter = f"[red]{escape(str(error))}[/]"
    return config, len(tokenizer), splitter


def _model(source: str) -> Table:
    """Return the table of a model's facts.

    Raises:
        UserError: See ``qad.model``.
    """
    config, tokens, splitter = _read_model(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    columns = dict(_quantizable(model))
    table = _table(f"model {escape(source)}", "", "")
    table.add_row("architecture", f"{config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}")
    table.add_row("parameters", f"{parameters:,}, {len(columns)} tensors to quantize")
    table.add_row("output head", "tied to the embedding" if is_tied(model) else "of its own")
    padding = config.vocab_size - tokens
    described = f"{config.vocab_size} in the model, {tokens} in the tokenizer"
    if padding > 0:
        described += f": {padding} rows of padding"
    elif padding < 0:
        described += f": [red]{-padding} tokens have no row, and text with them fails[/]"
    table.add_row("vocabulary", described)
    table.add_row("tokenizer splits as", splitter)
    for grid in GRIDS.values():
        table.add_row(f"grid {grid.name}", f"{_fit(grid, columns)} ({grid.bits_per_weight:g} bits per weight)")
    terms = " + ".join(f"{size} {name}" for name, size in _TRAINING_BYTES.items())
    needed = parameters * sum(_TRAINING_BYTES.values()) / 1e9
    free = psutil.virtual_memory().available / 1e9
    verdict = "" if needed < free else f"; [red]only {free:.1f} GB are free[/]"
    formula = f"{needed:.1f} GB = ({terms}) bytes x parameters"
    table.add_row(
        "memory to train",
        f"{formula}, with a teacher of the same size; activations come on top{verdict}",
    )
    return table


def _fit(grid: Grid, columns: dict[str, int]) -> str:
    """Return how many tensors a grid fits, and what becomes of the others, as markup."""
    misfits = find_misfits(dict.fromkeys(columns, grid.name), columns)
    if not misfits:
        return f"all {len(columns)} tensors fit"
    told = f"[yellow]{len(misfits)} of {len(columns)} tensors do not fit[/]"
    fallback = FALLBACKS.get(grid.name)
    if fallback in GRIDS and not find_misfits({misfit.name: fallback for misfit in misfits}, columns):
        return f"{told} and get {fallback} in its place"
    return f"{told}, such as {escape(str(misfits[0]))}"


def doctor_command(model: str | None = None) -> int:
    """Print what is installed and usable, and a model's facts if one is named.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or ``smollm2``.

    Returns:
        Exit status: 0, or 1 if a library is missing that qad cannot do without.

    Raises:
        UserError: The model cannot be read.
    """
    console = Console()
    # First of all, so that a file that cannot be read is told before pages that nobody asked for.
    facts = None if model is None else _model(resolve_source(model))
    table, missing = _libraries()
    for part in (_machine(), table, _kernels(), _runtimes()):
        console.print(part)
    if facts is not None:
        console.print(facts)
    if missing:
        console.print(f"[red]missing: {', '.join(missing)}[/]; run `pip install qad`")
    return 1 if missing else 0
