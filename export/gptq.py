"""GPTQ: the codes and scales of an artifact as an AutoGPTQ checkpoint (format v1), nothing rounded again.

The layout is described in ``_gptq_decode``, which reads it back without a line of this file. All zero points are
2^(bits-1), which version 1 stores as one less; signed scales are legal. The format knows linear layers only: embedding,
head, norms and biases become fp16, and ``write`` returns by how much that moved them.

safetensors files are written here and not by the library, which wants all tensors of a file in memory at once. A
tensor is made when its turn comes, so that memory holds one whatever the model's size. What is given up: tensors with
words of 32 bits stand before those of 16, so that each is aligned, and not layer by layer.

Shapes: N output features, K input features, G groups along K.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qad import __version__
from qad.architectures import ARCHITECTURES
from qad.artifact import Artifact
from qad.errors import UserError
from qad.export import OnProgress, Rounding, Weights, check_grids, formats_that_carry, get
from qad.export._folder import check_target, copy_companions, write_json
from qad.export._gptq_decode import CONFIG_FILE, GPTQWeights, read_json
from qad.export._tokenizer import read_tokenizer
from qad.files import begin_flush, replacing_folder
from qad.grid import Grid, get_grid
from qad.layout import dequantize, one_thread, row_chunks, word_chunks

SUFFIX = "-gptq"
GRIDS = ("q4_0", "q8_0", "q8_0_fp16", "int4_g64", "int4_g128", "int8_g64", "int8_g128")
FP16_RUNTIMES = True

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9
_CHUNK = 1 << 17  # values turned to fp16 at a time: what is made of them stays in the cache
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")
_ITEM_BYTES = {"I32": 4, "F16": 2}


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint: what its header says, and how to make its parts, one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[NDArray[Any]]]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


def recognizes(path: Path) -> bool:
    """Return whether a path is a folder with a GPTQ configuration."""
    return (path / CONFIG_FILE).is_file()


def only_half(artifact: Artifact) -> frozenset[str]:
    """Return the names of the tensors that the format holds only as fp16: all but the linear layers of the blocks."""
    return frozenset({name for name in artifact.grids if name in _ENDS} | set(artifact.kept))


def _linear_grid(artifact: Artifact) -> Grid:
    """Return the grid of the linear layers.

    Raises:
        UserError: None there, more than one, or one that the format cannot carry.
    """
    linear = {name: grid for name, grid in artifact.grids.items() if name not in _ENDS}
    if not linear:
        raise UserError("the artifact holds no quantized linear layer: there is nothing that GPTQ could store")
    grids = sorted(set(linear.values()))
    if len(grids) > 1:
        able = [name for name in formats_that_carry(artifact) if get(name).SUFFIX != SUFFIX]
        raise UserError(
            f"a GPTQ folder has one width and one group size for all linear layers, and this artifact has "
            f"{', '.join(grids)}; "
            + (f"formats that can: {', '.join(able)}" if able else "train its linear layers on one grid")
        )
    return get_grid(grids[0])


def _check(artifact: Artifact) -> Grid:
    """Return the grid of the linear layers of an artifact that GPTQ can carry.

    Raises:
        UserError: It cannot; the message says why.
    """
    check_grids(artifact, get("gptq"))
    grid = _linear_grid(artifact)
    kind = str(artifact.config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UserError(f"architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    known = set(ARCHITECTURES[kind].parameter_names(artifact.config["num_hidden_layers"]))
    if unknown := sorted({*artifact.grids, *artifact.kept} - known):
        raise UserError(f"a {kind} model has no {', '.join(unknown[:3])}: runtimes would leave it out")
    for name in artifact.grids:
        rows = artifact.shape(name)[0]
        if name not in _ENDS and rows * grid.bits % 32:
            able = _others(artifact)
            raise UserError(
                f"{name} has {rows} output features, and GPTQ packs the zero points of {32 // grid.bits} into a word"
                + (f"; formats that can: {', '.join(able)}" if able else "")
            )
    return grid


def check(artifact: Artifact) -> None:
    """Check what can be checked before anything is written.

    Raises:
        UserError: Grids, an architecture or shapes that GPTQ cannot carry.
    """
    _check(artifact)


def check_place(artifact: Artifact, path: Path) -> None:
    """Check that a folder may be replaced; see ``qad.export.Exporter``."""
    check_target(artifact, path, run_hash, "GPTQ", ("*config.json", "model*.safetensors", _INDEX))


def _others(artifact: Artifact) -> list[str]:
    return [name for name in formats_that_carry(artifact) if name != "gptq"]


def _zeros(groups: int, rows: int, bits: int) -> NDArray[np.int32]:
    """Return the zero points 2^(bits-1) of every group and output feature, less one, packed along the features."""
    word = sum((2 ** (bits - 1) - 1) << shift for shift in range(0, 32, bits))
    return np.full((groups, rows * bits // 32), word, dtype=np.uint32).view(np.int32)


def _linear(artifact: Artifact, name: str, grid: Grid) -> list[_Stored]:
    """Return the four tensors of a linear layer."""
    rows, columns = artifact.shape(name)
    groups, layer = columns // grid.block, name.removesuffix(".weight")
    return [
        _Stored(
            f"{layer}.qweight",
            "I32",
            (columns * grid.bits // 32, rows),
            lambda: word_chunks(artifact.quantized(name)),
        ),
        _Stored(f"{layer}.qzeros", "I32", (groups, rows * grid.bits // 32), lambda: [_zeros(groups, rows, grid.bits)]),
        _Stored(
            f"{layer}.scales",
            "F16",
            (groups, rows),
            lambda: [artifact.quantized(name).scales_NG.t().contiguous().numpy()],
        ),
        _Stored(
            f"{layer}.g_idx", "I32", (columns,), lambda: [np.arange(columns, dtype=np.int32) // np.int32(grid.block)]
        ),
    ]


def _row_chunks(artifact: Artifact, name: str) -> Iterable[torch.Tensor]:
    """Yield a tensor's exact values, some rows at a time; the memory of the ones before is used again."""
    if name not in artifact.grids:
        yield artifact.weight(name)
        return
    buffer = None
    for rows in row_chunks(artifact.quantized(name), codes=_CHUNK):
        buffer = torch.empty(rows.codes_NK.shape) if buffer is None else buffer
        yield dequantize(rows, buffer[: len(rows.codes_NK)])


def _half(artifact: Artifact, name: str, roundings: dict[str, Rounding]) -> Iterable[NDArray[np.float16]]:
    """Yield a tensor rounded to fp16, some rows at a time; note in the end by how much that moved it.

    Raises:
        UserError: fp16 does not reach that far.
    """
    rounding = Rounding()
    for exact in _row_chunks(artifact, name):
        half = exact.half().numpy()
        moved = Rounding.of(exact.numpy(), half)
        if not math.isfinite(moved.total):
            able = _others(artifact)
            raise UserError(
                f"{name} holds values up to {float(exact.abs().max()):.3g}, and GPTQ stores it as fp16, which ends at "
                f"65504" + (f"; formats that can: {', '.join(able)}" if able else "")
            )
        rounding += moved
        yield half
    roundings[name] = rounding


def _plan(artifact: Artifact, grid: Grid, roundings: dict[str, Rounding]) -> list[_Stored]:
    """Return every tensor of the checkpoint, in the model's order."""
    half = only_half(artifact)
    present = {*artifact.grids, *artifact.kept}
    stored: list[_Stored] = []
    names = ARCHITECTURES[artifact.config["model_type"]].parameter_names(artifact.config["num_hidden_layers"])
    for name in names:
        if name not in present or (artifact.tied_head and name == "lm_head.weight"):
            continue
        if name in half:
            stored.append(
                _Stored(name, "F16", artifact.shape(name), lambda name=name: _half(artifact, name, roundings))
            )
        else:
            stored += _linear(artifact, name, grid)
    return stored


def _shards(stored: list[_Stored], limit: int) -> dict[str, list[_Stored]]:
    """Return file name -> tensors: as many of the sequence to a file as fit, wide words first, for their alignment."""
    shards: list[list[_Stored]] = [[]]
    size = 0
    for tensor in stored:
        if shards[-1] and size + tensor.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    shards = [sorted(shard, key=lambda tensor: -_ITEM_BYTES[tensor.dtype]) for shard in shards]
    if len(shards) == 1:
        return {_WHOLE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _write_safetensors(file: Path, shard: list[_Stored], on_bytes: Callable[[int], None]) -> None:
    """Write one safetensors file: length of the header, header, data.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream, one_thread():
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        flushed = 0
        for tensor in shard:
            start = stream.tell()
            for part in tensor.make():
                stream.write(part.data.cast("B"))
                flushed = begin_flush(stream, flushed)
                on_bytes(part.nbytes)
            assert stream.tell() - start == tensor.size, tensor.name


def _quantization_config(artifact: Artifact, grid: Grid, roundings: dict[str, Rounding]) -> dict[str, Any]:
    """Return what loaders ask for.

    vLLM wants ``bits``, ``group_size``, ``desc_act`` and ``sym``, and takes 4 or 8 symmetric bits in groups of 32, 64
    or 128 (its ``GPTQMarlinConfig`` and ``MARLIN_SUPPORTED_GROUP_SIZES``). Layers whose outputs 64 or whose inputs
    128 does not divide, as SmolLM2's 576, get another of its kernels than Marlin.
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": grid.block,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"qad:{__version__}"],
            "run_hash": artifact.run_hash,
            "fp16_relative_error": {
                name: {"largest": rounding.largest, "mean": rounding.mean}
                for name, rounding in roundings.items()
                if name in artifact.grids
            },
        },
    }


def write(
    artifact: Artifact, path: Path, on_progress: OnProgress | None = None, *, shard_bytes: int = _SHARD_BYTES
) -> dict[str, Rounding]:
    """Write an artifact as a GPTQ folder, whole or not at all.

    Args:
        artifact: What to write.
        path: The folder. An earlier export there is replaced.
        on_progress: Called after each tensor with the bytes written so far and in all.
        shard_bytes: Largest data of one file; a single larger tensor gets a file of its own.

    Returns:
        Relative error of each tensor that the format holds only as fp16.

    Raises:
        UserError: Grids, an architecture or values that GPTQ cannot carry, no tokenizer, a folder that holds something
            else, or a full disk.
    """
    grid = _check(artifact)
    check_place(artifact, path)
    tokenizer = read_tokenizer(artifact.folder).tokenizer
    roundings: dict[str, Rounding] = {}
    stored = _plan(artifact, grid, roundings)
    total = sum(tensor.size for tensor in stored)
    shards = _shards(stored, shard_bytes)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    with replacing_folder(path) as folder:
        for name, shard in shards.items():
            _write_safetensors(folder / name, shard, on_bytes)
        if len(shards) > 1:
            where = {tensor.name: name for name, shard in shards.items() for tensor in shard}
            write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        copy_companions(artifact, tokenizer, folder)
        quantization = _quantization_config(artifact, grid, roundings)
        config = artifact.config | {
            # vLLM finds its class by this name.
            "architectures": [ARCHITECTURES[artifact.config["model_type"]].hf_class],
            "dtype": "float16",
            "tie_word_embeddings": artifact.tied_head,
            "quantization_config": quantization,
        }
        config.pop("torch_dtype", None)
        write_json(folder / "config.json", config)
        write_json(folder / CONFIG_FILE, quantization)
    return roundings


def read(path: Path) -> Weights:
    """Return the weights of a GPTQ folder, decoded in float32 as the format describes them.

    Raises:
        UserError: Not such a folder, truncated or damaged.
    """
    return GPTQWeights(path)


def run_hash(path: Path) -> str | None:
    """Return the hash of the run that a folder was exported from, None if another tool wrote it.

    Raises:
        UserError: Not a GPTQ folder, or damaged.
    """
    meta = read_json(path / CONFIG_FILE).get("meta")
    found = meta.get("run_hash") if isinstance(meta, dict) else None
    return found if isinstance(found, str) else None
