"""One call per operation: the kernel that fits the tensors, or else the plain-torch reference, with the same bits.

Two doors lead in. ``fake_quantize`` and ``fake_quantize_backward`` work on buffers that the caller owns, and so does
``FakeQuantizer``, for the same ones again and again; the trainer goes through them. ``torch.ops.qad.*`` are the same as
operators that PyTorch knows (schemas, shapes without data, gradients), so that a model that calls them can be traced by
``torch.compile(fullgraph=True)`` and exported; what they give up is the owned buffer: an operator returns new tensors.

Shapes: N output features, K input features, G blocks along K, C tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qad import divergence as plain_divergence
from qad import fake_quant as reference
from qad import native
from qad.errors import UserError
from qad.grid import Grid, get_grid
from qad.noise import HARD, Noise


def cuda_kernels() -> ModuleType:
    """Return the module of CUDA kernels, which only a machine that has such a device needs to load."""
    from qad import native_cuda

    return native_cuda


def _kernels(grid: Grid | None, first: Tensor, *others: Tensor | None) -> ModuleType | None:
    """Return the module of kernels that can take these tensors (on this grid), or None for the reference."""
    if grid is not None and not grid.is_plain:
        return None
    if first.is_cpu:  # takes a tenth of the time of device.type
        return native if native.supports(first, *others) and native.available() is None else None
    if first.is_cuda:
        kernels = cuda_kernels()
        return kernels if kernels.supports(first, *others) and kernels.available(first.device) is None else None
    return None


def _forward_kernels(
    grid: Grid, master_NK: Tensor, scales_NG: Tensor | None, out: Tensor, used_scales_NG: Tensor | None
) -> ModuleType | None:
    """Return the kernels for forward, or None for the reference, which alone can write over what it has yet to read."""
    kernels = _kernels(grid, master_NK, scales_NG, out, used_scales_NG)
    if kernels is None:
        return None
    # In place is all right: kernels read an element, or a scale, before they write it.
    master, to = master_NK.data_ptr(), out.data_ptr()
    master_end, to_end = master + master_NK.nbytes, to + out.nbytes
    if to < master_end and master < to_end and not (to == master and out.dtype == master_NK.dtype):
        return None
    if scales_NG is None and used_scales_NG is None:
        return kernels
    size = 4 * (master_NK.numel() // grid.block)
    given = None if scales_NG is None else scales_NG.data_ptr()
    used = None if used_scales_NG is None else used_scales_NG.data_ptr()
    if given is not None and to < given + size and given < to_end:
        return None
    if used is not None:
        if (to < used + size and used < to_end) or (master < used + size and used < master_end):
            return None
        if given is not None and given != used and given < used + size and used < given + size:
            return None
    return kernels


def describe(device: torch.device) -> str:
    """Return in a few words which implementation runs on a device, and why none better does."""
    if device.type == "cpu":
        return native.describe()
    if device.type == "cuda":
        return cuda_kernels().describe(device)
    return f"plain torch (there are no kernels for {device.type})"


def why_reference(device: torch.device) -> str | None:
    """Return why the slow reference runs on a device, or None if kernels do."""
    if device.type == "cpu":
        return native.available()
    if device.type == "cuda":
        return cuda_kernels().available(device)
    return f"there are no kernels for {device.type}"


def _refuse_gradients(*tensors: Tensor | None) -> None:
    for tensor in tensors:  # a loop: for a small weight, a generator takes a hundredth of the time
        if tensor is not None and tensor.requires_grad:
            raise UserError(
                "qad.ops.fake_quantize has no gradient: call torch.ops.qad.fake_quantize, which has one, or this one "
                "under torch.no_grad()"
            )


def _check_inputs(master: Tensor, scales: Tensor | None, grid: Grid, offsets: Tensor | None) -> None:
    """Say what is wrong with what forward was given: kernels count elements, and know no shapes.

    Raises:
        UserError: Something is.
    """
    if master.ndim != 2 or not master.is_floating_point():
        raise UserError(
            f"fake quantization is of floats in two dimensions, not of {master.dtype} {list(master.shape)}: reshape or "
            "convert the weight"
        )
    rows, columns = master.shape
    if columns % grid.unit:
        raise UserError(
            f"rows of {columns} values are no multiple of {grid.unit} ({grid.name}): choose a grid whose blocks divide "
            "them"
        )
    if scales is not None or offsets is not None:
        wanted = (rows, columns // grid.block)
        for what, given in (("scales", scales), ("offsets", offsets)):
            if given is not None and (given.dtype != torch.float32 or given.shape != wanted):
                raise UserError(
                    f"the {what} are {given.dtype} {list(given.shape)}; convert or reshape them to torch.float32 "
                    f"{list(wanted)}, one per block of {grid.block}"
                )
    if (offsets is not None) != (grid.minimum and scales is not None):
        if offsets is None:
            raise UserError(f"{grid.name} has minimums: give offsets with the scales")
        raise UserError(f"offsets go with the scales of a grid that has minimums, here ({grid.name}) leave them out")


def _check_buffers(master_NK: Tensor, grid: Grid, out: Tensor, used_scales_NG: Tensor | None) -> None:
    """Say what is wrong with what forward shall write to.

    Raises:
        UserError: Something is.
    """
    if out.shape != master_NK.shape or not out.is_floating_point():
        raise UserError(f"the buffer is {out.dtype} {list(out.shape)}; give one of floats {list(master_NK.shape)}")
    if used_scales_NG is not None:
        wanted = (master_NK.shape[0], master_NK.shape[1] // grid.block)
        if used_scales_NG.dtype != torch.float32 or used_scales_NG.shape != wanted:
            raise UserError(
                f"the buffer for scales is {used_scales_NG.dtype} {list(used_scales_NG.shape)}; give one of "
                f"torch.float32 {list(wanted)}"
            )


def fake_quantize(
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise = HARD,
    out: Tensor | None = None,
    used_scales_NG: Tensor | None = None,
    offsets_NG: Tensor | None = None,
) -> Tensor:
    """Return the weights that forward uses: ``qad.fake_quant.fake_quantize``, by the fastest kernel at hand.

    Args:
        master_NK: float32, bfloat16 or float16.
        scales_NG: float32 scales, or None for each block's absmax scale (that of its range, if the grid is not plain).
        grid: The grid.
        noise: The noise of this step.
        out: Buffer to write to, of any of these dtypes.
        used_scales_NG: float32 buffer that receives the rounded scales; may be ``scales_NG`` itself.
        offsets_NG: float32 offsets, for a grid with minimums; given if the scales are.

    Raises:
        UserError: A gradient is wanted, which what is written to a buffer cannot have; or shapes or dtypes do not go
            together.
    """
    if torch.is_grad_enabled():
        _refuse_gradients(master_NK, scales_NG, offsets_NG)
    _check_inputs(master_NK, scales_NG, grid, offsets_NG)
    out = torch.empty_like(master_NK, memory_format=torch.contiguous_format) if out is None else out
    _check_buffers(master_NK, grid, out, used_scales_NG)
    kernels = _forward_kernels(grid, master_NK, scales_NG, out, used_scales_NG)
    if kernels is None:
        return reference.fake_quantize(master_NK, scales_NG, grid, noise, out, used_scales_NG, offsets_NG)
    kernels.fake_quantize(master_NK, scales_NG, grid, noise, out, used_scales_NG)
    return out


def _fill(tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None], grid: Grid, noise: Noise) -> None:
    master_NK, scales_NG, out, used_scales_NG = tensors
    with torch.no_grad():
        fake_quantize(master_NK, scales_NG, grid, noise, out, used_scales_NG)


class FakeQuantizer:
    """``fake_quantize`` of the same tensors, step after step, as a trainer needs it.

    For a small weight, checking the tensors takes as long as the work. Here that is done once, and again whenever one
    of them has got other memory (has moved to a device, say). In the memory that it has, a tensor must keep its shape,
    strides and dtype. A copy, pickled or deep, fills the copies of the tensors.

    Args:
        master_NK, scales_NG, grid, out, used_scales_NG: See ``fake_quantize``.
    """

    def __init__(
        self,
        master_NK: Tensor,
        scales_NG: Tensor | None,
        grid: Grid,
        out: Tensor,
        used_scales_NG: Tensor | None = None,
    ) -> None:
        self._tensors = (master_NK, scales_NG, out, used_scales_NG)
        self._grid = grid
        self._with_gradient = (master_NK, scales_NG)
        self._prepare()

    def __getstate__(self) -> tuple[tuple[Tensor | None, ...], Grid]:
        # The rest are addresses, of this process and of these tensors.
        return self._tensors, self._grid

    def __setstate__(self, state: tuple[tuple[Tensor, Tensor | None, Tensor, Tensor | None], Grid]) -> None:
        (master_NK, scales_NG, out, used_scales_NG), grid = state
        self.__init__(master_NK, scales_NG, grid, out, used_scales_NG)

    def _prepare(self) -> Callable[[Noise], object]:
        """Return what fills ``out``, and remember it with the addresses that it goes by."""
        master_NK, scales_NG, out, used_scales_NG = self._tensors
        there = [tensor for tensor in self._tensors if tensor is not None]
        # While these live, nobody else is given the memory, so that an address stands for what was checked.
        memory = [tensor.detach() for tensor in there]
        places = [(tensor.data_ptr, tensor.data_ptr()) for tensor in there]
        _check_inputs(master_NK, scales_NG, self._grid, None)
        _check_buffers(master_NK, self._grid, out, used_scales_NG)
        if _forward_kernels(self._grid, master_NK, scales_NG, out, used_scales_NG) is native:
            run = native.prepare_fake_quantize(master_NK, scales_NG, self._grid, out, used_scales_NG)
        else:
            # Not a method: an object that refers to itself keeps its tensors until the garbage is collected.
            run = partial(_fill, self._tensors, self._grid)
        # At once and last: whatever fails above or calls meanwhile finds addresses beside what was checked of them.
        self._prepared = places, run, memory
        return run

    def __call__(self, noise: Noise = HARD) -> None:
        """Fill ``out``, and ``used_scales_NG`` if there is one.

        Raises:
            UserError: See ``fake_quantize``.
        """
        if torch.is_grad_enabled():
            _refuse_gradients(*self._with_gradient)
        places, run, _memory = self._prepared
        for address_of, address in places:
            if address_of() != address:
                run = self._prepare()
                break
        run(noise)


def fake_quantize_backward(
    grad_NK: Tensor,
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise = HARD,
    *,
    learn_scales: bool,
    offsets_NG: Tensor | None = None,
) -> Tensor | None:
    """Turn the gradient of the forward weights, in place, into that of the masters; return that of the scales.

    See ``qad.fake_quant.fake_quantize_backward``.
    """
    kernels = _kernels(grid, grad_NK, master_NK, scales_NG)
    if kernels is None:
        return reference.fake_quantize_backward(
            grad_NK, master_NK, scales_NG, grid, noise, learn_scales=learn_scales, offsets_NG=offsets_NG
        )
    grad_scales_NG = None
    if learn_scales:
        groups = master_NK.shape[1] // grid.block
        grad_scales_NG = torch.empty(master_NK.shape[0], groups, dtype=torch.float32, device=master_NK.device)
    kernels.fake_quantize_backward(grad_NK, master_NK, scales_NG, grid, noise, grad_scales_NG)
    return grad_scales_NG


def divergence(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    next_token_weight: float,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Overwrite student logits with the gradient of the distillation loss: ``qad.divergence.divergence``.

    Accurate to a millionth of the largest gradient there can be; unlike the other operations, its bits depend on the
    implementation. Kernels take float32.
    """
    float32 = student_CV.dtype == teacher_CV.dtype == torch.float32
    kernels = _kernels(None, student_CV, teacher_CV) if float32 else None
    step = plain_divergence.divergence if kernels is None else kernels.divergence
    return step(
        student_CV,
        teacher_CV,
        labels_C,
        kind=kind,
        beta=beta,
        temperature=temperature,
        next_token_weight=next_token_weight,
        keep_logits=keep_logits,
    )


# ---- operators of PyTorch. A grid goes in by name and noise by its fields: schemas know no classes of ours. ----


def _noise_of(mode: str, hard_share: float, seed: int, tensor: int, step: int) -> Noise:
    return Noise(mode, hard_share, seed & 0xFFFFFFFFFFFFFFFF, tensor, step)


@torch.library.custom_op("qad::fake_quantize", mutates_args=())
def fake_quantize_op(
    master: Tensor,
    scales: Tensor | None,
    grid: str,
    noise: str,
    hard_share: float,
    seed: int,
    tensor: int,
    step: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weights that forward uses, and the rounded scales that they are on, which have no gradient.

    Args:
        master: Weights [N, K]; float32, bfloat16 or float16, which the result has too.
        scales: float32 [N, G], or None for absmax scales. Receives a gradient if it requires one.
        grid: Name of the grid.
        noise: Noise mode. hard_share, seed, tensor, step: See ``qad.noise.Noise``; a seed beyond int64 wraps.
        offsets: float32 [N, G], with the scales of a grid that has minimums. Receives no gradient.
    """
    which = get_grid(grid)
    _check_inputs(master, scales, which, offsets)
    master = master.contiguous()
    used = torch.empty(master.shape[0], master.shape[1] // which.block, dtype=torch.float32, device=master.device)
    given = None if scales is None else scales.contiguous()
    drawn = _noise_of(noise, hard_share, seed, tensor, step)
    return fake_quantize(master, given, which, drawn, None, used, offsets), used


@fake_quantize_op.register_fake
def _(
    master: Tensor,
    scales: Tensor | None,
    grid: str,
    noise: str,
    hard_share: float,
    seed: int,
    tensor: int,
    step: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    which = get_grid(grid)
    _check_inputs(master, scales, which, offsets)
    used = master.new_empty((master.shape[0], master.shape[1] // which.block), dtype=torch.float32)
    return torch.empty_like(master, memory_format=torch.contiguous_format), used


@torch.library.custom_op("qad::fake_quantize_backward", mutates_args=())
def fake_quantize_backward_op(
    grad: Tensor,
    master: Tensor,
    scales: Tensor | None,
    grid: str,
    noise: str,
    hard_share: float,
    seed: int,
    tensor: int,
    step: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by the masters and by the scales; arguments as in ``qad::fake_quantize``."""
    drawn = _noise_of(noise, hard_share, seed, tensor, step)
    grad = grad.clone(memory_format=torch.contiguous_format)
    given = None if scales is None else scales.contiguous()
    by_scale = fake_quantize_backward(
        grad, master.contiguous(), given, get_grid(grid), drawn, learn_scales=True, offsets_NG=offsets
    )
    assert by_scale is not None
    return grad, by_scale


@fake_quantize_backward_op.register_fake
def _(
    grad: Tensor,
    master: Tensor,
    scales: Tensor | None,
    grid: str,
    noise: str,
    hard_share: float,
    seed: int,
    tensor: int,
    step: int,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    by_scale = master.new_empty((master.shape[0], master.shape[1] // get_grid(grid).block), dtype=torch.float32)
    return torch.empty_like(grad, memory_format=torch.contiguous_format), by_scale


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    master, scales, *ctx.settings, offsets = inputs
    # Nothing of the forward is kept: backward finds scales, codes and noise anew from the masters.
    ctx.save_for_backward(master, scales, offsets)
    # Rounding has no gradient of its own: nobody shall take the rounded scales for a way to those that are learned.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _straight_through(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    master, scales, offsets = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    by_master, by_scale = fake_quantize_backward_op(grad, master, scales, *ctx.settings, offsets)
    return by_master, by_scale if scales is not None else None, *(None,) * 7


fake_quantize_op.register_autograd(_straight_through, setup_context=_remember)


@torch.library.custom_op("qad::fake_quantize_into", mutates_args=("out", "used_scales"))
def fake_quantize_into_op(
    master: Tensor,
    scales: Tensor | None,
    out: Tensor,
    used_scales: Tensor,
    grid: str,
    noise: str,
    hard_share: float,
    seed: int,
    tensor: int,
    step: int,
    offsets: Tensor | None = None,
) -> None:
    """Like ``qad::fake_quantize``, into buffers that the caller owns; has no gradient."""
    drawn = _noise_of(noise, hard_share, seed, tensor, step)
    fake_quantize(master, scales, get_grid(grid), drawn, out, used_scales, offsets)


@fake_quantize_into_op.register_fake
def _(
    master: Tensor,
    scales: Tensor | None,
    out: Tensor,
    used_scales: Tensor,
    grid: str,
    noise: str,
    hard_share: float,
    seed: int,
    tensor: int,
    step: int,
    offsets: Tensor | None = None,
) -> None:
    return None
