"""The floors of the house: an import goes down or stays level, never up. Read from the sources, lazy ones included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Module -> floor. A package's entry holds for everything in it. Add a new module here, on the lowest floor that
# still lets it reach what it imports.
FLOORS = {
    # F0: facts and tables; standard library and numpy
    "qad": 0,
    "qad.errors": 0,
    "qad.registry": 0,
    "qad.closing": 0,
    "qad.files": 0,
    "qad.locks": 0,
    "qad.interrupts": 0,
    "qad.grid": 0,
    "qad.budget": 0,
    "qad.architectures": 0,
    "qad.sentencepieces": 0,
    "qad.gguf_check": 0,
    "qad.devices": 0,
    "qad.host": 0,
    "qad.provenance": 0,
    "qad.model_facts": 0,
    "qad.roofline": 0,
    "qad.fit": 0,
    "qad.energy": 0,
    "qad.csrc": 0,
    # F1: numbers
    "qad.scales": 1,
    "qad.scale_search": 1,
    "qad.tensor": 1,
    "qad.tensor_file": 1,
    "qad.noise": 1,
    "qad.cpu_compiler": 1,
    "qad.native": 1,
    "qad.cuda_compiler": 1,
    "qad.cuda_driver": 1,
    "qad.native_cuda": 1,
    "qad.pack": 1,
    "qad.philox": 1,
    # F2: operations on them, with and without gradients
    "qad.fake_quant": 2,
    "qad.layout": 2,
    "qad.divergence": 2,
    "qad.ops": 2,
    "qad.losses": 2,
    "qad.rounding": 2,
    # F3: models and their parts
    "qad.student": 3,
    "qad.measure": 3,
    "qad.plan": 3,
    "qad.plans": 3,
    "qad.gguf_load": 3,
    "qad.hf_tokenizer": 3,
    "qad.model": 3,
    "qad.teacher": 3,
    "qad.artifact": 3,
    # F4: what a run is made of
    "qad.recipe": 4,
    "qad.recipes": 4,
    "qad.gptq_init": 4,
    "qad.sensitivity": 4,
    # F5: training and its data
    "qad.callbacks": 5,
    "qad.outcome": 5,
    "qad.prepare": 5,
    "qad.checkpoints": 5,
    "qad.train": 5,
    "qad.data": 5,
    "qad.algebra": 5,
    "qad.algebra_worker": 5,
    "qad.same_answer": 5,
    "qad.final_answer": 5,
    # Training asks in the words of the evaluation, and leaves its questions out.
    "qad.evals.task": 5,
    "qad.evals.tasks.forms": 5,
    "qad.evals.tasks.guard": 5,
    "qad.evals.tasks.items": 5,
    "qad.evals.tasks.procedural": 5,
    # F6: a whole run; containers
    "qad.planning": 6,
    "qad.distill": 6,
    "qad.quantize": 6,
    "qad.export": 6,
    # F7: engines, proofs, reports
    "qad.runtimes": 7,
    "qad.agreement": 7,
    "qad.verify": 7,
    "qad.verify_command": 7,
    "qad.requantize": 7,
    "qad.deliver": 7,
    "qad.doctor": 7,
    "qad.answer": 7,
    "qad.boards": 7,
    "qad.bench_run": 7,
    "qad.bench_table": 7,
    "qad.bench": 7,
    "qad.think": 7,
    "qad.evals": 7,
    "qad.report": 7,
    # F8: the command line
    "qad.cli": 8,
    "qad.cli_eval": 8,
    "qad.cli_options": 8,
    "qad.cli_think": 8,
    "qad.cli_train": 8,
}

FOLDERS = {
    "qad": ROOT / "qad",
    "qad.export": ROOT / "export",
    "qad.runtimes": ROOT / "runtimes",
    "qad.devices": ROOT / "devices",
    "qad.csrc": ROOT / "csrc",
}

# Libraries that take longer to import than a command may take to show its help.
HEAVY = {"torch", "transformers", "trl", "datasets", "numpy", "gguf", "llama_cpp", "pyarrow", "onnx", "onnxruntime"}


def modules() -> dict[str, Path]:
    """Return every module of the project by its import name. The links in qad/ are not followed."""
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder).with_suffix("").parts
            if package == "qad" and inside[0] in ("export", "runtimes", "devices", "csrc"):
                continue
            parts = inside[:-1] if inside[-1] == "__init__" else inside
            found[".".join((package, *parts))] = file
    return found


MODULES = modules()


def floor_of(module: str) -> int | None:
    """Return the floor of a module or of the nearest package above it, of which ``qad`` itself is none."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
        if module in ("", "qad"):
            return None
    return FLOORS[module]


def is_module(name: str) -> bool:
    """Return whether a dotted name is a module and not something defined in one."""
    return name in MODULES or name in FLOORS


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each import of this project's modules, at any depth of the source.

    ``from qad import grid`` and ``from qad.grid import Grid`` both give ``qad.grid``. A name given to
    ``import_module`` counts with its constant beginning: ``f"qad.export.{name}"`` gives ``qad.export``.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else base for name in inside]
        elif isinstance(node, ast.Call) and node.args and _called(node.func) in ("import_module", "__import__"):
            names = [_constant_beginning(node.args[0]).rstrip(".")]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name == "qad" or name.startswith("qad."))


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _constant_beginning(value: ast.expr) -> str:
    if isinstance(value, ast.JoinedStr) and value.values:
        value = value.values[0]
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def climbs(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return a complaint for each import that goes up."""
    own = floor_of(module)
    assert own is not None
    complaints = []
    for line, name in imported(source, module, is_package):
        other = floor_of(name)
        if other is None:
            complaints.append(f"{module}:{line} imports {name}, which has no floor")
        elif other > own:
            complaints.append(f"{module}:{line} (F{own}) imports {name} (F{other})")
    return complaints


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_go_up(module: str) -> None:
    assert floor_of(module) is not None, f"{module} has no floor: add it to FLOORS in tests/test_floors.py"
    file = MODULES[module]
    complaints = climbs(file.read_text(), module, file.name == "__init__.py")
    assert not complaints, "\n".join(complaints) + "\nmove what is shared to a lower floor"


def test_the_table_names_nothing_that_is_gone() -> None:
    gone = [name for name in FLOORS if name not in MODULES]
    assert not gone, f"remove from FLOORS in tests/test_floors.py: {gone}"


@pytest.mark.parametrize(
    "source",
    [
        "import qad.cli",
        "from qad import cli",
        "from qad.cli import main",
        "def late():\n    from qad.export import gguf",
        "if TYPE_CHECKING:\n    import qad.runtimes.llamacpp",
        "from . import train",
        "from .train import QADTrainer",
        "importlib.import_module(f'qad.export.{name}')",
        "import_module('qad.train')",
    ],
)
def test_each_way_up_is_seen(source: str) -> None:
    (complaint,) = climbs(source, "qad.tensor")
    assert complaint.startswith("qad.tensor:")


@pytest.mark.parametrize("source", ["import qad", "from qad import __version__, grid", "from .errors import UserError"])
def test_ways_down_are_free(source: str) -> None:
    assert climbs(source, "qad.tensor") == []


def test_packages_resolve_their_own_dots() -> None:
    assert climbs("from ..cli import main", "qad.recipes", is_package=True) == [
        "qad.recipes:1 (F4) imports qad.cli (F8)"
    ]
    assert climbs("from . import gguf", "qad.export", is_package=True) == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["qad", "qad.grid", "qad.errors", "qad.files", "qad.devices", "qad.cli"])
def test_importing_stays_light(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*sys.modules)").split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    "verb",
    ["", "train", "quantize", "export", "verify", "run", "think", "doctor", "devices", "bench", "eval", "report"],
)
def test_showing_help_stays_light(verb: str) -> None:
    out = run(
        f"""
import sys
from qad.cli import main
sys.argv = ["qad", *{verb.split()!r}, "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print("LOADED", *sys.modules)
"""
    )
    shown, _, loaded = out.partition("LOADED ")
    assert f"qad {verb}".strip() in shown
    assert not HEAVY & set(loaded.split())
