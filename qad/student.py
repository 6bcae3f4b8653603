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
from torch import nn

from qad.errors import unknown_name
from qad.grid import Grid
from qad.noise import HARD, Noise
from qad.ops import fake_quantize, fake_quantize_backward
from qad.rounding import Rounded
from qad.tensor import QuantizedTensor, mse_scales, quantize

SCALE_MODES = ("absmax", "mse", "learned")
_REFRESH_MSE = 20  # optimizer steps between two searches of mse scales; a search costs as much as some 30 roundings


@dataclass
class _Entry:
    """One quantized parameter: its grid, and its index among them (the tensor word of the noise)."""

    name: str
    grid: Grid
    index: int
    forward: nn.Parameter
    master: nn.Parameter
    scales: nn.Parameter


class Masters(nn.Module):
    """The masters and scales of a model's quantized parameters.

    Args:
        model: The model whose parameters become forward buffers.
        start: For each quantized parameter, its codes and scales and where the masters start.
        scales: ``absmax`` follows the masters, ``mse`` searches every few steps, ``learned`` is trained.
    """

    def __init__(self, model: nn.Module, start: Mapping[str, Rounded], scales: str) -> None:
        super().__init__()
        if scales not in SCALE_MODES:
            raise unknown_name("scale mode", scales, list(SCALE_MODES))
        self.scale_mode = scales
        self.masters = nn.ParameterList()
        self.scales = nn.ParameterList()
        self._entries: list[_Entry] = []
        parameters = dict(model.named_parameters())
        for index, (name, rounded) in enumerate(start.items()):
            grid = rounded.quantized.grid
            master = nn.Parameter(rounded.target_NK.to(torch.float32).clone())
            scale = nn.Parameter(rounded.quantized.scales_NG.to(torch.float32), requires_grad=scales == "learned")
            self.masters.append(master)
            self.scales.append(scale)
            self._entries.append(_Entry(name, grid, index, parameters[name], master, scale))

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
            if self.scale_mode == "mse" and step % _REFRESH_MSE == 0:
                entry.scales.copy_(mse_scales(entry.master, entry.grid))
            self._fill(entry, Noise(noise, hard_share, seed, entry.index, step))

    @torch.no_grad()
    def harden(self) -> None:
        """Fill the model's quantized parameters with the weights the device decodes."""
        for entry in self._entries:
            self._fill(entry, HARD)

    def _fill(self, entry: _Entry, noise: Noise) -> None:
        follow = self.scale_mode == "absmax"
        fake_quantize(
            entry.master,
            None if follow else entry.scales,
            entry.grid,
            noise,
            out=entry.forward.data,
            used_scales_NG=entry.scales.data if follow else None,
        )

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
            learn = self.scale_mode == "learned"
            by_scale = fake_quantize_backward(grad, entry.master, entry.scales, entry.grid, which, learn_scales=learn)
            entry.master.grad = grad
            entry.scales.grad = by_scale

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedTensor]:
        """Return codes and scales of every quantized parameter, as hard rounding gives them.

        By the reference and not by a kernel: where an artifact is saved its weights are compared with those of
        forward, which thereby checks the kernels that made them.
        """
        return {
            entry.name: quantize(entry.master.data, entry.grid, entry.scales.data, entry.name)
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
