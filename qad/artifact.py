"""The artifact: what a run leaves, and the only thing that exporters read.

    RUN/artifact/
      artifact.json        grids, tied head, recipe, SHA-256 of each tensor that the trainer's forward used, run hash
      weights.safetensors  NAME.codes (int8) and NAME.scales (fp16) for quantized, NAME (fp32) for kept tensors; for
                           grids of more than scales also NAME.minimums, NAME.super_scales, NAME.super_minimums
      config.json, tokenizer files, chat template: as Hugging Face writes them

``forward_sha256`` is taken from the buffers that the trainer's forward multiplied with, before anything was packed or
saved. A decoder that reproduces it has reproduced the training weights, whatever stands in between.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qad.architectures import ARCHITECTURES
from qad.errors import UserError
from qad.files import is_dropping, recover_folder, replacing_folder, sha256_of_file
from qad.grid import get_grid
from qad.scales import StoredScales, part_dtype
from qad.tensor import QuantizedTensor, dequantize
from qad.tensor_file import DTYPES, Entry, TensorFile

FOLDER = "artifact"
WEIGHTS = "weights.safetensors"
_FORMAT = 1
_DESCRIPTION = "artifact.json"
# What exports put beside an artifact that was given by its own folder.
_EXPORTED = ("student", "manifest.json")
_KEYS = {"grids": dict, "kept": list, "tied_head": bool, "forward_sha256": dict, "recipe": dict, "run_hash": str}


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's float32 bytes in row-major order."""
    data = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return hashlib.sha256(data.numpy().data.cast("B")).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. Tensors are read from the mapped file when they are asked for.

    Attributes:
        folder: The ``artifact`` folder, which also holds the tokenizer.
        config: The model's Hugging Face configuration.
        grids: Name of each quantized tensor -> name of its grid.
        kept: Names of the tensors kept in float32 (norms, biases).
        tied_head: Whether the output head is the embedding.
        forward_sha256: Name of each quantized tensor -> hash of the float32 weights the trainer's forward used.
        recipe: The resolved recipe of the run.
        run_hash: Hash of everything above, of the weights, and of the tokenizer's files.
    """

    folder: Path
    config: dict[str, Any]
    grids: dict[str, str]
    kept: list[str]
    tied_head: bool
    forward_sha256: dict[str, str]
    recipe: dict[str, Any]
    run_hash: str

    @property
    def weights_file(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS

    @functools.cached_property
    def _file(self) -> TensorFile:
        return TensorFile(self.weights_file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._file.entries[f"{name}.codes" if name in self.grids else name].shape

    def quantized(self, name: str) -> QuantizedTensor:
        """Return one quantized tensor: views of the mapped file, not to be written to, that read it when used."""
        self._file.give_back()
        grid = get_grid(self.grids[name])
        stored = StoredScales.of(grid, {part: self._file.tensor(f"{name}.{part}") for part in grid.parts})
        return QuantizedTensor.of(self._file.tensor(f"{name}.codes"), stored)

    def is_whole(self) -> bool:
        """Return whether the folder's files, hidden ones aside, are those that the run hash was taken of. Reads all."""
        description = json.loads((self.folder / _DESCRIPTION).read_text())
        del description["run_hash"]
        return _hash(description, self.folder) == self.run_hash

    def weight(self, name: str) -> Tensor:
        """Return one tensor as the float32 values that the student computes with, in memory of its own."""
        if name in self.grids:
            return dequantize(self.quantized(name))
        self._file.give_back()
        return self._file.tensor(name).clone()


def _hash(description: Mapping[str, Any], folder: Path) -> str:
    """Return the hash of a description and of every other file of an artifact."""
    ours = (".", _DESCRIPTION, *_EXPORTED)  # hidden: what an interrupted export left, or other tools did
    tops = [path for path in folder.iterdir() if not path.name.startswith(ours)]
    paths = [path for top in tops for path in (top, *top.rglob("*")) if path.is_file() and not is_dropping(path)]
    files = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in paths}
    text = json.dumps({"description": description, "files": files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _settled(kept: Tensor, offset: float) -> Tensor:
    """Return the value of a kept float32 tensor that survives being stored with an offset.

    A model that computes with fl(w + 1) does so with many w. Of these the one that fl(w + 1) - 1 gives is as good as
    any: the model computes the same bits with it, and it comes back from a container that holds the sum. (True for
    magnitudes below 2^23, beyond which no norm's weight lies.)
    """
    return (kept + offset) - offset if offset else kept


def save_artifact(
    run: Path,
    *,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    quantized: Mapping[str, QuantizedTensor],
    kept: Mapping[str, Tensor],
    tied_head: bool,
    forward_sha256: Mapping[str, str],
    recipe: Mapping[str, Any],
) -> Artifact:
    """Write ``run``/artifact, whole or not at all, and return it opened.

    Raises:
        UserError: The disk is full or not writable; a previous artifact is untouched.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    tensors: dict[str, Tensor] = {}
    for name, tensor in quantized.items():
        for part, values in tensor.parts.items():
            tensors[f"{name}.{part}"] = values.cpu().contiguous()
    for name, tensor in kept.items():
        value = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        tensors[name] = _settled(value, architecture.offset(name)) if architecture else value
    description = {
        "format": _FORMAT,
        "grids": {name: tensor.grid.name for name, tensor in quantized.items()},
        "kept": list(kept),
        "tied_head": tied_head,
        "forward_sha256": dict(forward_sha256),
        "recipe": dict(recipe),
    }
    with replacing_folder(run / FOLDER) as folder:
        save_file(tensors, folder / WEIGHTS)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        description["run_hash"] = _hash(description, folder)
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1))
    return open_artifact(run)


def _check_description(description: dict[str, Any], folder: Path) -> None:
    """Check that a description says all it should, in the types it should.

    Raises:
        UserError: It does not, or is of another version.
    """
    if description.get("format") != _FORMAT:
        raise UserError(f"{folder} has artifact format {description.get('format')}; this qad reads format {_FORMAT}")
    if missing := sorted(_KEYS.keys() - description.keys()):
        raise UserError(f"the artifact in {folder} is damaged ({', '.join(missing)} missing); train or copy it again")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(description[key], kind)]
    if not wrong:
        named = {"kept": description["kept"]} | {k: description[k].values() for k in ("grids", "forward_sha256")}
        wrong = [key for key, values in named.items() if not all(isinstance(value, str) for value in values)]
    if wrong:
        reason = f"{', '.join(wrong)} of a wrong type"
        raise UserError(f"the artifact in {folder} is damaged ({reason}); train or copy it again")


def _check_tensors(description: dict[str, Any], entries: Mapping[str, Entry]) -> str | None:
    """Return what is wrong with the stored tensors, None if they are what the description says."""
    for name, grid_name in description["grids"].items():
        grid = get_grid(grid_name)
        codes = entries[f"{name}.codes"]
        if codes.dtype != "I8" or len(codes.shape) != 2:
            return f"{name} is stored as {codes.dtype} {codes.shape}"
        rows, columns = codes.shape
        for part in grid.parts:
            found, shape = entries[f"{name}.{part}"], (rows, columns // grid.columns_of(part))
            if DTYPES.get(found.dtype) != part_dtype(grid, part):
                return f"the {part} of {name} are stored as {found.dtype}"
            if columns % grid.unit or found.shape != shape:
                return f"{name} has {codes.shape} codes and {found.shape} {part}"
    wrong = [name for name in description["kept"] if entries[name].dtype != "F32"]
    return f"{wrong[0]} is stored as {entries[wrong[0]].dtype}" if wrong else None


def open_artifact(run: Path) -> Artifact:
    """Open the artifact of a run folder (or the artifact folder itself).

    Raises:
        UserError: Nothing there, an unfinished run, or damaged files.
    """
    folder = run if (run / _DESCRIPTION).is_file() else run / FOLDER
    recover_folder(folder)
    if run.is_file():
        raise UserError(f"{run} is a file: name the run folder that `qad train` or `qad quantize` made")
    if not (folder / _DESCRIPTION).is_file() and (run / "config.json").is_file() and not (run / WEIGHTS).exists():
        raise UserError(f"{run} is a model and no run: `qad quantize {run} -o RUN` or `qad train` makes one of it")
    if not (folder / _DESCRIPTION).is_file():
        reason = "the run is unfinished: continue it with --resume" if (run / "recipe.json").exists() else "no such run"
        raise UserError(f"{run} holds no artifact ({reason}); `qad train -o {run}` makes one")
    remedy = "train or copy it again"
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the artifact in {folder} is damaged ({error}); {remedy}") from error
    for file_name, content in ((_DESCRIPTION, description), ("config.json", config)):
        if not isinstance(content, dict):
            raise UserError(f"the artifact in {folder} is damaged ({file_name} is no object); {remedy}")
    _check_description(description, folder)
    try:
        entries = TensorFile(folder / WEIGHTS).entries
    except UserError as error:
        raise UserError(f"the artifact in {folder} is damaged ({error}); {remedy}") from error
    parts = {name: ("codes", *get_grid(grid).parts) for name, grid in description["grids"].items()}
    wanted = {f"{name}.{part}" for name in parts for part in parts[name]}
    wanted |= set(description["kept"])
    if wanted - entries.keys():
        raise UserError(f"the artifact in {folder} lacks {sorted(wanted - entries.keys())[:3]}; {remedy}")
    if wrong := _check_tensors(description, entries):
        raise UserError(f"the artifact in {folder} is damaged ({wrong}); {remedy}")
    return Artifact(
        folder=folder,
        config=config,
        grids=description["grids"],
        kept=description["kept"],
        tied_head=description["tied_head"],
        forward_sha256=description["forward_sha256"],
        recipe=description["recipe"],
        run_hash=description["run_hash"],
    )
