"""The student: a Hugging Face model whose quantized parameters are forward buffers filled from masters on a grid.

The model itself stays what transformers made it. Its quantized parameters hold, at any time, the fake-quantized
weights; the masters (and learned scales) live beside them in ``Masters`` and are what the optimizer moves. So the
weights that forward multiplies with can be read, hashed and compared directly, a tied head is tied by being the same
parameter, and quantizing happens once per optimizer step however many micro-batches it has. What is given up: one
copy of the weights more than a master alone needs.

Shapes: N output features, K input features, G blocks along K.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qad.errors import unknown_name
from qad.grid import Grid
from qad.noise import HARD, Noise
from qad.ops import FakeQuantizer, fake_quantize, fake_quantize_backward
from qad.rounding import Rounded
from qad.scale_search import find_scales
from qad.scales import StoredScales
from qad.tensor import QuantizedTensor, block_scales, mse_scales, quantize

SCALE_MODES = ("absmax", "mse", "learned")
_REFRESH = 20  # optimizer steps between two searches of scales; a search costs as much as some 30 roundings


@dataclass
class _Entry:
    """One quantized parameter: its grid, and its index among them (the tensor word of the noise).

    Scales are what forward uses, in float32. A grid that is not plain has their stored parts as well, which they and
    the offsets follow from.
    """

    name: str
    grid: Grid
    index: int
    forward: nn.Parameter
    master: nn.Parameter
    scales: nn.Parameter
    stored: dict[str, nn.Parameter]
    quantizer: FakeQuantizer | None = None  # of a plain grid, once it was needed

    def store(self, found: StoredScales) -> None:
        """Use other scales from now on."""
        for part, tensor in found.parts.items():
            self.stored[part].copy_(tensor)
        self.scales.copy_(found.decode()[0])

    def stored_scales(self) -> StoredScales:
        """Return the stored scales of a grid that is not plain."""
        return StoredScales.of(self.grid, {part: parameter.data for part, parameter in self.stored.items()})

    def decoded(self) -> tuple[Tensor, Tensor | None]:
        """Return the scales and offsets that forward uses."""
        return (self.scales.data, None) if self.grid.is_plain else self.stored_scales().decode()


class Masters(nn.Module):
    """The masters and scales of a model's quantized parameters.

    Args:
        model: The model whose parameters become forward buffers.
        start: For each quantized parameter, its codes and scales and where the masters start.
        scales: ``absmax`` follows the masters, ``mse`` searches every 20 steps, ``learned`` is trained. Grids of
            minimums or super-blocks have no scales that an optimizer could move by a little: there ``learned`` keeps
            what training starts with for 20 steps and then does as ``mse`` does; both change a super-block's scales
            only where the new ones fit its masters better.
    """

    def __init__(self, model: nn.Module, start: Mapping[str, Rounded], scales: str) -> None:
        super().__init__()
        if scales not in SCALE_MODES:
            raise unknown_name("scale mode", scales, list(SCALE_MODES))
        self.scale_mode = scales
        self.masters = nn.ParameterList()
        self.scales = nn.ParameterList()
        self.stored = nn.ModuleList()
        self._entries: list[_Entry] = []
        parameters = dict(model.named_parameters())
        for index, (name, rounded) in enumerate(start.items()):
            grid = rounded.quantized.grid
            master = nn.Parameter(rounded.target_NK.to(torch.float32).clone())
            learned = scales == "learned" and grid.is_plain
            scale = nn.Parameter(block_scales(rounded.quantized), requires_grad=learned)
            # Parameters and not buffers, because checkpoints hold parameters.
            parts = {} if grid.is_plain else rounded.quantized.stored.parts
            stored = {part: nn.Parameter(tensor.clone(), requires_grad=False) for part, tensor in parts.items()}
            self.masters.append(master)
            self.scales.append(scale)
            self.stored.append(nn.ParameterDict(stored))
            self._entries.append(_Entry(name, grid, index, parameters[name], master, scale, stored))

    @property
    def names(self) -> list[str]:
        """Names of the quantized parameters."""
        return [entry.name for entry in self._entries]

    @property
    def device(self) -> torch.device:
        """Where the masters are."""
        return self._entries[0].master.device

    def forward_parameters(self) -> list[nn.Parameter]:
        """Return the model's quantized parameters, which the optimizer must leave alone."""
        return [entry.forward for entry in self._entries]

    def groups(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
        """Yield (master, scales, mean grid step) of each tensor."""
        for entry in self._entries:
            yield entry.master, entry.scales, float(entry.scales.detach().abs().mean())

    @torch.no_grad()
    def refresh(self, *, step: int, noise: str = "none", hard_share: float = 0.0, seed: int = 0) -> None:
        """Fill the model's quantized parameters from the masters, for one optimizer step.

        Args:
            step: The optimizer step, a counter of the noise.
            noise: Noise mode.
            hard_share: Share of blocks that are rounded hard in spite of the noise.
            seed: Run seed.
        """
        for entry in self._entries:
            self._search(entry, step)
            self._fill(entry, Noise(noise, hard_share, seed, entry.index, step))

    @torch.no_grad()
    def harden(self) -> None:
        """Fill the model's quantized parameters with the weights the device decodes."""
        for entry in self._entries:
            self._fill(entry, HARD)

    def _search(self, entry: _Entry, step: int) -> None:
        """Search the scales of the grids that are searched, in the steps in which they are."""
        due = self.scale_mode != "absmax" and step % _REFRESH == 0
        if entry.grid.is_plain:
            if due and self.scale_mode == "mse":
                entry.scales.copy_(mse_scales(entry.master, entry.grid))
        elif due and (step or self.scale_mode == "mse"):
            entry.store(find_scales(entry.master, entry.grid, "mse", start=entry.stored_scales()))

    def _fill(self, entry: _Entry, noise: Noise) -> None:
        follow = self.scale_mode == "absmax"
        if entry.grid.is_plain:
            if entry.quantizer is None:
                given, used = (None, entry.scales) if follow else (entry.scales, None)
                entry.quantizer = FakeQuantizer(entry.master, given, entry.grid, entry.forward, used)
            entry.quantizer(noise)
            return
        if follow:
            entry.store(find_scales(entry.master, entry.grid, "range"))
        scales_NG, offsets_NG = entry.decoded()
        fake_quantize(entry.master, scales_NG, entry.grid, noise, out=entry.forward.data, offsets_NG=offsets_NG)

    @torch.no_grad()
    def collect_gradients(self, *, step: int, noise: str = "none", hard_share: float = 0.0, seed: int = 0) -> None:
        """Move the gradients of the forward weights, straight through, to masters and scales.

        To be called once, after the last micro-batch of an optimizer step. The gradient's memory moves along.
        """
        for entry in self._entries:
            grad = entry.forward.grad
            if grad is None:
                continue
            entry.forward.grad = None
            which = Noise(noise, hard_share, seed, entry.index, step)
            scales_NG, offsets_NG = entry.decoded()
            by_scale = fake_quantize_backward(
                grad,
                entry.master,
                scales_NG,
                entry.grid,
                which,
                learn_scales=entry.scales.requires_grad,
                offsets_NG=offsets_NG,
            )
            entry.master.grad = grad
            entry.scales.grad = by_scale

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedTensor]:
        """Return codes and scales of every quantized parameter, as hard rounding gives them.

        By the reference and not by a kernel: where an artifact is saved its weights are compared with those of
        forward, which thereby checks the kernels that made them.
        """
        return {
            entry.name: quantize(
                entry.master.data,
                entry.grid,
                # A copy, because the next search writes to what is stored.
                entry.scales.data if entry.grid.is_plain else entry.stored_scales().map(torch.clone),
                entry.name,
            )
            for entry in self._entries
        }

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of the float32 bytes that forward multiplies with, per quantized parameter."""
        return {
            entry.name: hashlib.sha256(
                entry.forward.detach().to("cpu", torch.float32).contiguous().numpy().data
            ).hexdigest()
            for entry in self._entries
        }
