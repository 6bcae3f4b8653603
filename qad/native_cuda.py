"""The kernels of csrc/cuda as operations on tensors.

Nothing happens on import. The first use compiles (``qad.cuda_compiler``) and loads (``qad.cuda_driver``). What is given
up: Windows, and GPUs older than compute capability 8.0, which have no instruction to round to bfloat16.

Shapes: N output features, K input features, G blocks along K, T tokens, V vocabulary.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from qad.cpu_compiler import NativeUnavailable
from qad.cuda_driver import Gpu, Launch, Source
from qad.grid import Grid
from qad.noise import HARD, NOISE_MODES, Noise

DIVERGENCES = ("forward", "reverse", "jsd")
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_LOGITS = (torch.float32, torch.bfloat16)
_BLOCK_THREADS, _ROW_THREADS = 256, 1024
_OCTET = 8  # elements of a thread


class BlockArguments(ctypes.Structure):
    """The struct of that name in csrc/cuda/fake_quant.cu."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scales_out", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("stored_scales", ctypes.c_void_p),
        ("damaged", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("code_min", ctypes.c_float),
        ("code_max", ctypes.c_float),
        ("scale_bits", ctypes.c_uint32),
        ("signed_scale", ctypes.c_uint32),
        ("floor_bits", ctypes.c_uint32),
        ("ceiling_bits", ctypes.c_uint32),
        ("lanes_log2", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("hard_share", ctypes.c_float),
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("tensor", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("aligned", ctypes.c_uint32),
    )


class RowArguments(ctypes.Structure):
    """The struct of that name in csrc/cuda/divergence.cu."""

    _fields_ = (
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("divergence", ctypes.c_void_p),
        ("nll", ctypes.c_void_p),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("beta", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("next_token_weight", ctypes.c_float),
        ("keep_logits", ctypes.c_uint32),
    )


def sources() -> list[Source]:
    """Return the source files and their kernels."""
    blocks: list[str] = []
    for master in _TYPES.values():
        blocks += [f"qad_quantize_{master}", f"qad_dequantize_{master}"]
        for other in _TYPES.values():
            blocks += [f"qad_fake_quantize_{master}_{other}_{mode}" for mode in NOISE_MODES]
            blocks += [f"qad_fake_quantize_backward{scales}_{master}_{other}" for scales in ("", "_scales")]
    rows = [f"qad_divergence_{kind}_{_TYPES[dtype]}" for kind in DIVERGENCES for dtype in _LOGITS]
    return [
        Source("fake_quant", tuple(blocks), _BLOCK_THREADS),
        Source("divergence", tuple(rows), _ROW_THREADS),
    ]


@cache
def _gpu(index: int) -> Gpu | str:
    """Return a GPU, its kernels loaded, or why they cannot be. Asked once per process."""
    try:
        return Gpu(index, sources())
    except NativeUnavailable as error:
        return str(error)


def _index_of(device: torch.device | None) -> int:
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def available(device: torch.device | None = None) -> str | None:
    """Return None if the kernels can run on a GPU, else the reason.

    The first call on a machine compiles for some seconds.
    """
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install a CUDA build of it"
    if not torch.cuda.is_available():
        return "no usable GPU: nvidia-smi says more"
    loaded = _gpu(_index_of(device))
    return loaded if isinstance(loaded, str) else None


def describe(device: torch.device | None = None) -> str:
    """Return in a few words which kernels run on a GPU, or why none do."""
    if reason := available(device):
        return f"plain torch ({reason})"
    gpu = _gpu(_index_of(device))
    assert isinstance(gpu, Gpu)
    codes = list(gpu.codes.values())
    return f"native, {codes[0].origin}, {'cached' if all(code.cached for code in codes) else 'compiled just now'}"


def _run(device: torch.device, launch: Launch) -> None:
    assert device.type == "cuda", device
    gpu = _gpu(_index_of(device))
    if isinstance(gpu, str):
        raise NativeUnavailable(gpu)
    gpu.run(launch)


def supports(*tensors: Tensor | None) -> bool:
    """Return whether all these are contiguous CUDA tensors of known float types, in memory as they read."""
    return all(
        t is None or (t.device.type == "cuda" and t.is_contiguous() and t.dtype in _TYPES and not t.is_neg())
        for t in tensors
    )


def _address(tensor: Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Return a tensor's address, after making sure that a kernel may walk over it."""
    if tensor is None:
        return None
    assert tensor.device == device, (tensor.device, device)
    assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    assert tensor.numel() == count, (tensor.shape, count)
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    return tensor.data_ptr()


def _float_bits(value: float) -> int:
    return ctypes.c_uint32.from_buffer_copy(ctypes.c_float(value)).value


def _run_blocks(
    kernel: str,
    first: Tensor,
    grid: Grid,
    noise: Noise,
    damaged: Tensor | None,
    **arrays: tuple[Tensor | None, torch.dtype],
) -> None:
    """Launch a kernel of fake_quant.cu.

    Args:
        kernel: Its name.
        first: A tensor of one element per weight: says how many there are, and where.
        grid, noise: Numbers to give it.
        damaged: The counter to give it.
        arrays: Tensor and dtype of each pointer of ``BlockArguments``; those of scales hold one element per block.
    """
    device, count = first.device, first.numel()
    assert first.shape[-1] % grid.block == 0, (first.shape, grid)
    blocks = count // grid.block
    seed = noise.seed & 0xFFFFFFFFFFFFFFFF
    addresses = {
        name: _address(tensor, blocks if "scales" in name else count, dtype, device)
        for name, (tensor, dtype) in arrays.items()
    }
    arguments = BlockArguments(
        damaged=_address(damaged, 1, torch.int64, device),
        blocks=blocks,
        code_min=grid.code_min,
        code_max=grid.code_max,
        scale_bits=grid.scale_bits,
        signed_scale=grid.signed_scale,
        floor_bits=_float_bits(grid.scale_floor),
        ceiling_bits=_float_bits(grid.scale_ceiling),
        lanes_log2=(grid.block // _OCTET).bit_length() - 1,
        mode=NOISE_MODES.index(_mode(noise)),
        hard_share=noise.hard_share,
        seed_low=seed & 0xFFFFFFFF,
        seed_high=seed >> 32,
        tensor=noise.tensor & 0xFFFFFFFF,
        step=noise.step & 0xFFFFFFFF,
        aligned=all((address or 0) % 16 == 0 for address in addresses.values()),
        **addresses,
    )
    if blocks:
        ctas = -(-count // (_OCTET * _BLOCK_THREADS))
        _run(device, Launch(kernel, arguments, _BLOCK_THREADS, ctas))


def _mode(noise: Noise) -> str:
    return "none" if noise.is_hard else noise.mode


def fake_quantize(
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise,
    out: Tensor,
    used_scales_NG: Tensor | None = None,
    damaged: Tensor | None = None,
) -> None:
    """Write the weights that forward uses to ``out``; see ``qad.fake_quant.fake_quantize``.

    Args:
        master_NK, scales_NG, grid, noise, out, used_scales_NG: As there, on one GPU.
        damaged: None, or an int64 tensor of one element to which the number of blocks that hold a number that is not
            finite is added. Not returned, because the CPU would have to wait for it.
    """
    _run_blocks(
        f"qad_fake_quantize_{_TYPES[master_NK.dtype]}_{_TYPES[out.dtype]}_{_mode(noise)}",
        master_NK,
        grid,
        noise,
        damaged,
        weights=(master_NK, master_NK.dtype),
        scales=(scales_NG, torch.float32),
        scales_out=(used_scales_NG, torch.float32),
        values=(out, out.dtype),
    )


def fake_quantize_backward(
    grad_NK: Tensor,
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise,
    grad_scales_NG: Tensor | None,
    damaged: Tensor | None = None,
) -> None:
    """Mask ``grad_NK`` in place; fill ``grad_scales_NG`` if given. See ``qad.fake_quant.fake_quantize_backward``.

    Args:
        grad_NK, master_NK, scales_NG, grid, noise: As there, on one GPU.
        grad_scales_NG: None, or a float32 buffer.
        damaged: As in ``fake_quantize``.
    """
    which = "" if grad_scales_NG is None else "_scales"
    _run_blocks(
        f"qad_fake_quantize_backward{which}_{_TYPES[master_NK.dtype]}_{_TYPES[grad_NK.dtype]}",
        master_NK,
        grid,
        noise,
        damaged,
        weights=(master_NK, master_NK.dtype),
        scales=(scales_NG, torch.float32),
        scales_out=(grad_scales_NG, torch.float32),
        values=(grad_NK, grad_NK.dtype),
    )


def quantize(
    weight_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    codes_NK: Tensor,
    stored_NG: Tensor,
    damaged: Tensor | None = None,
) -> None:
    """Write int8 codes and float16 scales; see ``qad.tensor.quantize``. ``damaged``: as in ``fake_quantize``."""
    _run_blocks(
        f"qad_quantize_{_TYPES[weight_NK.dtype]}",
        weight_NK,
        grid,
        HARD,
        damaged,
        weights=(weight_NK, weight_NK.dtype),
        scales=(scales_NG, torch.float32),
        codes=(codes_NK, torch.int8),
        stored_scales=(stored_NG, torch.float16),
    )


def dequantize(codes_NK: Tensor, scales_NG: Tensor, grid: Grid, out: Tensor) -> None:
    """Write the weights that a device decodes to ``out``; see ``qad.tensor.dequantize``."""
    _run_blocks(
        f"qad_dequantize_{_TYPES[out.dtype]}",
        codes_NK,
        grid,
        HARD,
        None,
        codes=(codes_NK, torch.int8),
        stored_scales=(scales_NG, torch.float16),
        values=(out, out.dtype),
    )


def divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor | None,
    *,
    kind: str,
    beta: float,
    temperature: float,
    next_token_weight: float,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Overwrite student logits with the gradient of the distillation loss; see csrc/qad.h.

    Args:
        student_TV, teacher_TV: Logits, both float32 or both bfloat16; rows may lie apart, a row's entries may not.
        labels_T: int64 next tokens, negative for none; None: none at all.
        kind: One of ``DIVERGENCES``.
        beta, temperature, next_token_weight: See ``qad.losses.LossSettings``.
        keep_logits: Leave the student's logits as they are.

    Returns:
        float64 divergence_T at that temperature and nll_T at temperature 1; NaN for a label outside the vocabulary.
    """
    tokens, vocabulary = student_TV.shape
    device = student_TV.device
    assert kind in DIVERGENCES, kind
    assert student_TV.dtype in _LOGITS, student_TV.dtype
    for logits in (student_TV, teacher_TV):
        assert logits.device == device, (logits.device, device)
        assert logits.shape == student_TV.shape, (logits.shape, student_TV.shape)
        assert logits.dtype == student_TV.dtype, (logits.dtype, student_TV.dtype)
        assert logits.stride(1) == 1 or vocabulary == 1, logits.stride()
    value_T = torch.empty(tokens, dtype=torch.float64, device=device)
    nll_T = torch.empty(tokens, dtype=torch.float64, device=device)
    arguments = RowArguments(
        student=student_TV.data_ptr(),
        teacher=teacher_TV.data_ptr(),
        labels=_address(labels_T, tokens, torch.int64, device),
        divergence=value_T.data_ptr(),
        nll=nll_T.data_ptr(),
        student_stride=student_TV.stride(0),
        teacher_stride=teacher_TV.stride(0),
        tokens=tokens,
        vocabulary=vocabulary,
        beta=beta,
        temperature=temperature,
        next_token_weight=next_token_weight,
        keep_logits=keep_logits,
    )
    if tokens:
        kernel = f"qad_divergence_{kind}_{_TYPES[student_TV.dtype]}"
        _run(device, Launch(kernel, arguments, _ROW_THREADS, tokens))
    return value_T, nll_T
