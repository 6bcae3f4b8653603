"""Prove that an exported file holds the weights that the trainer saw.

The artifact recorded the SHA-256 of each tensor as the trainer's forward multiplied with it; a decoder that shares no
code with the exporter must reproduce these hashes from the file. And it must agree with the artifact's own codes and
scales bit for bit, which tells where a mismatch lies. What a runtime does with the weights (it rounds activations) is
measured rather than proved: see ``qad.agreement``.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qad.artifact import Artifact, open_artifact, tensor_sha256
from qad.errors import UserError
from qad.export import REQUANTIZED, Computing, OnProgress, Rounding, exporter_for


@dataclass(frozen=True)
class Mismatch:
    """A tensor that the file does not hold as trained.

    Attributes:
        name: The tensor.
        reason: What is wrong, in words.
        differing: How many weights have other bits than the artifact's.
        first: Position of the first of them.
    """

    name: str
    reason: str
    differing: int = 0
    first: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" ({self.differing} weights, the first at {list(self.first)})" if self.differing else ""
        return f"{self.name}: {self.reason}{where}"


@dataclass(frozen=True)
class VerifyResult:
    """What comparing a file with its run found.

    Attributes:
        quantized, exact: Quantized tensors that the format carries as such, and those of them that are bit-exact.
        kept, kept_exact: The same of the tensors kept in float32.
        mismatches: One entry for each tensor that is not.
        half: Name of each tensor that the format holds only as fp16 -> by how much that moved it. Those among
            ``mismatches`` are not the nearest fp16 values.
        products: What fp16 makes of the decoded weights; None where the format's runtimes compute with all bits.
        computing: How a runtime is to compute with them, as the file says; None if it does not.
        run_hash: Of the artifact.
        file_run_hash: As the file's metadata has it, None if it has none.
        artifact_changed: Whether the artifact's files (weights, tokenizer, configuration) are other than when the run
            hash was taken of them.
    """

    quantized: int
    exact: int
    kept: int
    kept_exact: int
    run_hash: str
    file_run_hash: str | None
    mismatches: list[Mismatch] = field(default_factory=list)
    half: dict[str, Rounding] = field(default_factory=dict)
    products: Rounding | None = None
    computing: str | None = None
    artifact_changed: bool = False

    @property
    def requantized(self) -> bool:
        """Whether the file itself says that its weights were rounded again when it was exported."""
        return self.file_run_hash is not None and self.file_run_hash.startswith(REQUANTIZED)

    @property
    def ok(self) -> bool:
        """Whether all is as trained: every tensor what the format can hold of it, bit for bit, and none beside them."""
        return not self.mismatches and not self.requantized and not self.artifact_changed


def _compare(artifact: Artifact, name: str, found: NDArray[np.float32], half: bool) -> Mismatch | None:
    """Compare one tensor of the file with the artifact and with the trainer's hash.

    ``half``: The file can only hold the nearest fp16 values. Then the hash is that of the artifact's own.
    """
    exact = wanted = artifact.weight(name).numpy()
    if half:
        with np.errstate(over="ignore"):
            wanted = exact.astype(np.float16).astype(np.float32)
    hashed = exact if half else found
    if found.shape != wanted.shape:
        return Mismatch(name, f"shape {found.shape} in the file, {wanted.shape} in the artifact")
    differing = found.view(np.uint32) != wanted.view(np.uint32)
    count = int(np.count_nonzero(differing))
    if count:
        first = tuple(int(index) for index in np.unravel_index(int(differing.argmax()), differing.shape))
        rounded = " rounded to fp16" if half else ""
        return Mismatch(name, f"the file's weights are not the artifact's{rounded}", count, first)
    if name in artifact.grids and tensor_sha256(torch.from_numpy(hashed)) != artifact.forward_sha256.get(name):
        return Mismatch(name, "file and artifact agree, but the trainer's forward used other weights")
    return None


def verify(run: Path, file: Path, on_progress: OnProgress | None = None) -> VerifyResult:
    """Compare every tensor of an exported file with the run it should come from.

    Args:
        run: The run folder.
        file: The exported file.
        on_progress: Called with the tensors compared so far and in all.

    Raises:
        UserError: No artifact there, or the file is missing, damaged or of an unknown format.
    """
    artifact = open_artifact(run)
    if not file.exists():
        raise UserError(f"{file} is missing: export the run first (qad export), or check the path")
    exporter = exporter_for(file)
    decoded = exporter.read(file)
    names = [*artifact.grids, *artifact.kept]
    only_half = exporter.only_half(artifact)
    mismatches: list[Mismatch] = []
    half: dict[str, Rounding] = {}
    products = Rounding() if exporter.FP16_RUNTIMES else None
    for done, name in enumerate(names, start=1):
        if name in only_half:
            half[name] = Rounding.of(artifact.weight(name).numpy())
        if name in decoded:
            found = np.ascontiguousarray(decoded[name])
            mismatch = _compare(artifact, name, found, name in only_half)
            if products is not None and name not in only_half:
                products += Rounding.of(found)
        else:
            mismatch = Mismatch(name, "missing in the file")
        if mismatch is not None:
            mismatches.append(mismatch)
        if on_progress is not None:
            on_progress(done, len(names))
    wrong = {mismatch.name for mismatch in mismatches}
    mismatches += [Mismatch(name, "not in the artifact") for name in decoded if name not in set(names)]
    quantized, kept = artifact.grids.keys() - only_half, set(artifact.kept) - only_half
    return VerifyResult(
        quantized=len(quantized),
        exact=len(quantized - wrong),
        kept=len(kept),
        kept_exact=len(kept - wrong),
        run_hash=artifact.run_hash,
        file_run_hash=exporter.run_hash(file),
        mismatches=mismatches,
        half=half,
        products=products,
        computing=decoded.computing if isinstance(decoded, Computing) else None,
        artifact_changed=not artifact.is_whole(),
    )
