"""GGUF: the codes and scales of an artifact as ggml blocks, nothing rounded again.

gguf's writer lays out header and metadata. The blocks follow, some rows of a tensor after others, so that memory holds
little whatever the model's size. The file appears under its name when it is complete.

Reading back is left to gguf-py's own decoder, which shares no code with the packing here.

Shapes: N output features, K input features, H heads.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray
from torch import Tensor

from qad.architectures import Architecture, architecture_of_gguf, check_gguf_can, get_architecture
from qad.artifact import Artifact
from qad.errors import UserError
from qad.export import OnProgress, Rounding, Weights, _gguf_metadata, check_grids, get
from qad.export._gguf_writer import MetadataWriter
from qad.export._tokenizer import collector_paused
from qad.files import begin_flush, replacing_file
from qad.gguf_check import read_header
from qad.grid import get_grid
from qad.layout import map_rows, one_thread, pack, row_chunks
from qad.pack import gguf_block_bytes

SUFFIX = ".gguf"

_BLOCKS = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q5_0": GGMLQuantizationType.Q5_0,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q8_0_fp16": GGMLQuantizationType.Q8_0,
    "q4_k": GGMLQuantizationType.Q4_K,
    "q5_k": GGMLQuantizationType.Q5_K,
    "q6_k": GGMLQuantizationType.Q6_K,
}
GRIDS = tuple(_BLOCKS)
FP16_RUNTIMES = False
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


def recognizes(path: Path) -> bool:
    """Return whether a path ends as GGUF files do."""
    return path.suffix.lower() == SUFFIX


def only_half(artifact: Artifact) -> frozenset[str]:
    """Return no name: what GGUF does not store as codes it stores as float32."""
    return frozenset()


def _permute_rows(rows: Tensor, heads: int) -> Tensor:
    """Reorder a q or k projection's rows, within each head, from two halves to interleaved pairs.

    ggml's rotary embedding of the llama architecture turns neighbouring rows, Hugging Face's row i with row i + d/2.
    Whole rows move, so a block's codes and its scale stay together.
    """
    return rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _unpermute_rows(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo ``_permute_rows``.

    Raises:
        UserError: That many heads do not divide the rows.
    """
    if heads < 1 or rows.shape[0] % (2 * heads):
        raise UserError(f"{rows.shape[0]} rows of a projection are not those of {heads} heads; export the file again")
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _stored_bytes(artifact: Artifact, name: str) -> tuple[tuple[int, ...], int]:
    """Return the shape and the bytes of a tensor in the file."""
    shape = artifact.shape(name)
    if name not in artifact.grids:
        return shape, 4 * math.prod(shape)
    grid = get_grid(artifact.grids[name])
    return shape, math.prod(shape) // grid.unit * gguf_block_bytes(grid)


def _stored(artifact: Artifact, name: str, architecture: Architecture) -> Iterator[NDArray[Any]]:
    """Yield a tensor's bytes as the file stores them, some rows at a time: ready blocks, or float32.

    What is kept is stored as it is computed with.
    """
    heads = architecture.permuted_heads(name, artifact.config)
    if name not in artifact.grids:
        kept = artifact.weight(name)
        if offset := architecture.offset(name):  # adding 0 would turn -0.0 into 0.0
            kept += offset
        yield (_permute_rows(kept, heads) if heads else kept).contiguous().numpy()
        return
    head = artifact.shape(name)[0] // heads if heads else 1
    for rows in row_chunks(artifact.quantized(name), multiple=head):
        if heads:
            rows = map_rows(rows, lambda part: _permute_rows(part, len(part) // head))
        yield pack(rows, "gguf")


def _file_order(artifact: Artifact, names: Mapping[str, str]) -> list[str]:
    """Return the artifact's parameter names in the model's order, which is that in which a runtime reads them.

    Raises:
        UserError: The artifact has a tensor that the architecture does not know.
    """
    present = {*artifact.grids, *artifact.kept}
    unknown = sorted(present - names.keys())
    if unknown:
        raise UserError(f"GGUF has no name for {', '.join(unknown[:3])} of a {artifact.config['model_type']} model")
    return [name for name in names if name in present and not (artifact.tied_head and name == "lm_head.weight")]


def _write_header(artifact: Artifact, order: list[str], names: Mapping[str, str], path: Path) -> None:
    """Write everything that stands before the data."""
    architecture = get_architecture(artifact.config)
    # The writer reports every step as information; what matters is said by the caller.
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = MetadataWriter(path, architecture.gguf)
    parameters = sum(math.prod(artifact.shape(name)) for name in order)
    _gguf_metadata.add_general(writer, artifact, parameters, _gguf_metadata.main_grid(artifact))
    _gguf_metadata.add_model(writer, artifact.config)
    strips = _gguf_metadata.add_tokenizer(writer, artifact.folder, artifact.config)
    _gguf_metadata.add_name(writer, artifact, strips)
    for name, factors in _gguf_metadata.rope_factors(artifact.config).items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for name in order:
        shape, size = _stored_bytes(artifact, name)
        kind = _BLOCKS[artifact.grids[name]] if name in artifact.grids else GGMLQuantizationType.F32
        writer.add_tensor_info(names[name], shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _data(artifact: Artifact, order: list[str]) -> Iterator[Iterable[NDArray[Any]]]:
    """Yield the tensors in the order of the header, each as parts that are made when they are asked for."""
    for factors in _gguf_metadata.rope_factors(artifact.config).values():
        yield [factors]
    architecture = get_architecture(artifact.config)
    for name in order:
        yield _stored(artifact, name, architecture)


def _checked_names(artifact: Artifact) -> tuple[Mapping[str, str], list[str]]:
    """Return the GGUF name of every parameter, and the artifact's in the order of the file."""
    check_grids(artifact, get("gguf"))
    architecture = get_architecture(artifact.config)
    check_gguf_can(artifact.config)
    names = architecture.gguf_names(artifact.config["num_hidden_layers"])
    return names, _file_order(artifact, names)


def check(artifact: Artifact) -> None:
    """Check what can be checked before anything is written.

    Raises:
        UserError: A grid or an architecture that GGUF cannot carry.
    """
    _checked_names(artifact)


def check_place(artifact: Artifact, path: Path) -> None:
    """Check that a file may be replaced; see ``qad.export.Exporter``."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        ours = run_hash(path) is not None
    except UserError:
        ours = False
    if not ours:
        raise UserError(f"{path} was not exported by qad: delete it, or name another place with -o")


def write(artifact: Artifact, path: Path, on_progress: OnProgress | None = None) -> dict[str, Rounding]:
    """Write an artifact as a GGUF file, whole or not at all.

    Args:
        artifact: What to write.
        path: Where; a previous file is replaced when the new one is complete.
        on_progress: Called after each part of a tensor with the bytes of weights written so far and in all.

    Returns:
        Nothing: no tensor is held as fp16.

    Raises:
        UserError: A grid, architecture or tokenizer that GGUF cannot carry, no tokenizer, or a full disk.
    """
    names, order = _checked_names(artifact)
    total = sum(_stored_bytes(artifact, name)[1] for name in order)
    done = 0
    with replacing_file(path) as temporary:
        with collector_paused():
            _write_header(artifact, order, names, temporary)
        # Plain writes, because NumPy's tofile, which the writer uses, reports a full disk without its error number.
        with temporary.open("ab") as file, one_thread():
            flushed = 0
            for parts in _data(artifact, order):
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                for part in parts:
                    file.write(part.data.cast("B"))
                    flushed = begin_flush(file, flushed)
                    done += part.nbytes
                    if on_progress is not None:
                        on_progress(min(done, total), total)
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    return {}


class GGUFWeights(Mapping[str, NDArray[np.float32]]):
    """A GGUF file's tensors by Hugging Face name, decoded by gguf-py when asked for.

    A tensor that the architecture does not know keeps its GGUF name.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self._architecture = architecture_of_gguf(header.metadata["general.architecture"])
        prefix = self._architecture.gguf
        heads = header.metadata.get(f"{prefix}.attention.head_count")
        layers = header.metadata.get(f"{prefix}.block_count")
        if not isinstance(heads, int) or not isinstance(layers, int):
            raise UserError(f"{path} lacks its number of layers or heads; export it again")
        if not 0 < layers <= len(header.tensors):  # names are made for each
            raise UserError(f"{path} announces {layers} layers in {len(header.tensors)} tensors; export it again")
        self._config = {
            "num_attention_heads": heads,
            "num_key_value_heads": header.metadata.get(f"{prefix}.attention.head_count_kv", heads),
        }
        try:
            stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
            raise UserError(f"gguf-py cannot read {path} ({error}); export it again") from error
        hf_names = {gguf_name: name for name, gguf_name in self._architecture.gguf_names(layers).items()}
        # The rotary factors are computed from the configuration; they are no parameter.
        factors = _gguf_metadata.ROPE_FACTORS
        self._stored = {hf_names.get(name, name): tensor for name, tensor in stored.items() if name not in factors}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        tensor = self._stored[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = self._architecture.permuted_heads(name, self._config)
        offset = self._architecture.offset(name)
        values = values - np.float32(offset) if offset else values
        return _unpermute_rows(values, heads) if heads else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read(path: Path) -> Weights:
    """Return the weights of a GGUF file as gguf-py decodes them.

    Raises:
        UserError: Not a GGUF file, truncated, damaged, or of an architecture that is not supported.
    """
    return GGUFWeights(path)


def run_hash(path: Path) -> str | None:
    """Return the hash of the run that a file was exported from, None if another tool wrote it.

    Raises:
        UserError: Not a GGUF file, truncated or damaged.
    """
    found = read_header(path).metadata.get(_gguf_metadata.RUN_HASH)
    return found if isinstance(found, str) else None
