"""ONNX: a folder for ONNX Runtime and onnxruntime-genai with the artifact's codes and scales, nothing rounded again.

``model.onnx`` is the decoder with its key-value cache, ``model.onnx.data`` every tensor, ``genai_config.json`` what
onnxruntime-genai reads; tokenizer and configuration lie beside them. Every tensor may have a grid of its own. Codes,
scales and kept tensors are exact, embedding, head, norms and biases included. What is given up: on the CPU scales are
float32, because MatMulNBits wants them in the type of its input; with blocks of 32 that is half a bit a weight more.

What a runtime makes of exact weights is chosen here. Accuracy level 4, the default for the CPU, rounds the inputs of
products to 8 bits a block, as llama.cpp does, and is fast; level 1 computes in float32. At level 4 some products, or
all, keep more of their input (``_onnx_wide``): by default those that suffer most. A graph for CUDA computes in fp16,
and so rounds products of 8-bit codes with their scales, norms and biases when it runs.
"""

from pathlib import Path

from qad import __version__
from qad.architectures import get_architecture, rotary_dim
from qad.artifact import Artifact
from qad.errors import UserError
from qad.export import OnProgress, Rounding, Weights, check_grids, formats_that_carry, get
from qad.export._folder import check_target, copy_companions, write_json
from qad.export._onnx_decode import MODEL_FILE, RUN_HASH, ONNXWeights
from qad.export._onnx_wide import WIDE_INPUTS
from qad.files import replacing_folder
from qad.model import load_tokenizer

SUFFIX = "-onnx"
GRIDS = ("q4_0", "q8_0", "q8_0_fp16", "int4_g64", "int4_g128", "int8_g64", "int8_g128")
FP16_RUNTIMES = False
# Target -> accuracy level unless one is asked for. CUDA's kernels have no levels.
TARGETS = {"cpu": 4, "cuda": 0}
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
_ROUNDING_LEVEL = 4
# Of GroupQueryAttention.
_ROTARY_STEP = 16


def recognizes(path: Path) -> bool:
    """Return whether a path is a folder with an ONNX model."""
    return (path / MODEL_FILE).is_file()


def only_half(artifact: Artifact) -> frozenset[str]:
    """Return no names: the format holds every tensor exactly."""
    return frozenset()


def check(artifact: Artifact) -> None:
    """Check what can be known before anything is written.

    Raises:
        UserError: A grid or an architecture that ONNX folders cannot carry.
    """
    check_grids(artifact, get("onnx"))
    get_architecture(artifact.config)
    width = rotary_dim(artifact.config)
    if width % _ROTARY_STEP:
        able = [name for name in formats_that_carry(artifact) if name != "onnx"]
        raise UserError(
            f"the model rotates {width} dimensions of a head, and ONNX Runtime a multiple of {_ROTARY_STEP}"
            + (f"; formats that can: {', '.join(able)}" if able else "")
        )


def check_place(artifact: Artifact, path: Path) -> None:
    """Check that a folder may be replaced; see ``qad.export.Exporter``."""
    check_target(artifact, path, run_hash, "ONNX", ("*config.json", "*.onnx", "*.onnx.data"))


def check_options(
    target: str = "cpu", accuracy_level: int | None = None, wide_inputs: str | None = None
) -> tuple[int, str]:
    """Check the options of ``write``, which describes them, and return accuracy level and wide inputs as resolved.

    Raises:
        UserError: One that there is not, or two that exclude each other.
    """
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}: {' or '.join(TARGETS)}")
    if accuracy_level is not None and accuracy_level not in ACCURACY_LEVELS:
        raise UserError(f"there is no accuracy level {accuracy_level}: 1 (exact float32) to 4 (8-bit inputs), or 0")
    level = TARGETS[target] if accuracy_level is None else accuracy_level
    if wide_inputs is None:
        wide_inputs = "sensitive" if level == _ROUNDING_LEVEL and target == "cpu" else "none"
    elif wide_inputs not in WIDE_INPUTS:
        raise UserError(f"there are no wide inputs {wide_inputs!r}: {', '.join(WIDE_INPUTS)}")
    elif wide_inputs != "none" and (level != _ROUNDING_LEVEL or target != "cpu"):
        raise UserError("wide inputs are of --target cpu at accuracy level 4: nothing else rounds inputs to 8 bits")
    return level, wide_inputs


def write(
    artifact: Artifact,
    path: Path,
    on_progress: OnProgress | None = None,
    *,
    target: str = "cpu",
    accuracy_level: int | None = None,
    wide_inputs: str | None = None,
) -> dict[str, Rounding]:
    """Write an artifact as an ONNX folder, whole or not at all.

    Args:
        artifact: What to write.
        path: The folder. An earlier export there is replaced.
        on_progress: Called after each part with the bytes written so far and in all.
        target: ``cpu``: a graph in float32; ``cuda``: one in fp16 for ONNX Runtime's CUDA build.
        accuracy_level: Of MatMulNBits on the CPU: 1 to 3 compute in float32, 4 rounds inputs to 8 bits a block; 0
            leaves the choice to the runtime. None: 4 for the CPU.
        wide_inputs: Of level 4: which products keep more than 8 bits of their input. ``sensitive``: the head and those
            with queries, keys and values; ``all``; ``none``. None: ``sensitive``.

    Returns:
        Nothing by name: no tensor is rounded.

    Raises:
        UserError: Grids or an architecture that ONNX cannot carry, no tokenizer, libraries that are not installed, a
            folder that holds something else, or a full disk.
    """
    level, wide_inputs = check_options(target, accuracy_level, wide_inputs)
    check(artifact)
    check_place(artifact, path)
    tokenizer = load_tokenizer(str(artifact.folder))
    # Imported here: they load the libraries of the extra.
    from qad.export._onnx_graph import build_graph
    from qad.export._onnx_weights import is_beside, place_weights, write_model

    hf_class = get_architecture(artifact.config).hf_class
    config = artifact.config | {
        "architectures": [hf_class],
        "dtype": "float32",
        "tie_word_embeddings": artifact.tied_head,
    }
    config.pop("torch_dtype", None)
    with replacing_folder(path) as folder:
        copy_companions(artifact, tokenizer, folder)
        write_json(folder / "config.json", config)
        graph = build_graph(folder, hf_class, target)
        stored = place_weights(artifact, graph, level, wide_inputs)
        total = sum(tensor.size for tensor in stored if tensor.twin is None)
        total += sum(table.nbytes for table in graph.tables.values() if is_beside(table))
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(done, total)

        properties = {
            RUN_HASH: artifact.run_hash,
            "qad.version": __version__,
            "qad.target": target,
            "qad.accuracy_level": str(level),
            "qad.wide_inputs": wide_inputs,
        }
        write_model(folder, graph, stored, properties, on_bytes)
        (folder / "genai_config.json").write_text(graph.genai_config, encoding="utf-8")
    return {}


def read(path: Path) -> Weights:
    """Return the weights of an ONNX folder, decoded in float32 as its operators describe them.

    Raises:
        UserError: Not such a folder, truncated or damaged.
    """
    return ONNXWeights(path)


def run_hash(path: Path) -> str | None:
    """Return the hash of the run that a folder was exported from, None if another tool wrote it.

    Raises:
        UserError: Not an ONNX folder, or damaged.
    """
    return ONNXWeights(path).properties.get(RUN_HASH)
