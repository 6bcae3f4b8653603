"""The kernels of csrc/cpu, called by ctypes: the library that ``qad.cpu_compiler`` builds on first use, as functions.

Nothing happens on import. The first call compiles for a second or two where no library is in the cache.

Shapes: N output features, K input features, G blocks along K, T tokens, V vocabulary.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, get_num_threads

from qad.cpu_compiler import (
    NativeUnavailable,
    build,
    cache_folder,
    find_compiler,
    instruction_sets,
    is_whole,
    library_path,
)
from qad.errors import UserError
from qad.grid import Grid
from qad.noise import NOISE_MODES, Noise

API_VERSION = 2
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "neon", "avx512bf16")  # in the order of csrc/qad.h
LAYOUTS = ("gguf", "gptq", "onnx")
DIVERGENCES = ("forward", "reverse", "jsd")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MODES = {name: index for index, name in enumerate(NOISE_MODES)}


def _bind(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions."""
    library = ctypes.CDLL(str(path))
    # First, because an older library may lack functions.
    if (version := library.qad_api_version()) != API_VERSION:
        raise NativeUnavailable(
            f"{path} speaks version {version} of the kernels' interface, not {API_VERSION}; delete it"
        )
    pointer, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    word, real = ctypes.c_uint32, ctypes.c_float
    grid = noise = ctypes.c_char_p  # a pointer into bytes
    signatures = {
        "qad_api_version": (whole, []),
        "qad_get_isa": (whole, []),
        "qad_has_isa": (whole, [whole]),
        "qad_set_isa": (whole, [whole]),
        "qad_fake_quantize": (long, [pointer, whole, pointer, pointer, pointer, whole, long, grid, noise, whole]),
        "qad_fake_quantize_backward": (
            long,
            [pointer, whole, pointer, whole, pointer, pointer, long, grid, noise, whole],
        ),
        "qad_quantize": (long, [pointer, whole, pointer, pointer, pointer, long, grid, whole]),
        "qad_dequantize": (None, [pointer, pointer, pointer, whole, long, grid, whole]),
        "qad_pack": (whole, [pointer, long, pointer, pointer, long, long, grid, whole]),
        "qad_uniform16": (None, [pointer, long, word, word, word, word, word]),
        "qad_divergence": (
            None,
            [
                pointer,
                long,
                pointer,
                long,
                pointer,
                pointer,
                pointer,
                long,
                long,
                whole,
                real,
                real,
                real,
                whole,
                whole,
            ],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.qad_get_isa() < 0:
        raise NativeUnavailable(f"{path} holds no kernels that this processor can run")
    return library


@cache
def _load(sets: tuple[str, ...] | None = None) -> ctypes.CDLL | str:
    """Return a library, built if need be, or why there is none. Asked once per process."""
    try:
        compiler = find_compiler()
        path = library_path(compiler, sets)
        if not is_whole(path):
            build(path, compiler, sets=instruction_sets()[-1:] if sets is None else sets)
        return _bind(path)
    except NativeUnavailable as error:
        return str(error)
    except OSError as error:
        return f"{error}; the cache folder is {cache_folder()}, and XDG_CACHE_HOME can name another place"


_forced: list[ctypes.CDLL] = []  # the library of all instruction sets, once one was forced


def available() -> str | None:
    """Return None if the kernels can be called, else the reason. The first call may compile for a second or two."""
    loaded = _forced[0] if _forced else _load()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """Return the library.

    Raises:
        NativeUnavailable: See ``available``.
    """
    loaded = _forced[0] if _forced else _load()
    if isinstance(loaded, str):
        raise NativeUnavailable(loaded)
    return loaded


def instruction_set() -> str:
    """Return the name of the instruction set in use."""
    return INSTRUCTION_SETS[library().qad_get_isa()]


def force_instruction_set(name: str) -> None:
    """Use an instruction set until ``release_instruction_set``; the first call compiles all. For tests and benchmarks.

    All give the same bits, but for the divergence, which is accurate to 1e-6 on each. Calls that were prepared before
    (``prepare_fake_quantize``) go on as they were.

    Raises:
        ValueError: This machine cannot run it.
        NativeUnavailable: They cannot be compiled.
    """
    if name not in instruction_sets():
        raise ValueError(f"this machine cannot run {name}; it can run {', '.join(instruction_sets())}")
    loaded = _load(tuple(instruction_sets()))
    if isinstance(loaded, str):
        raise NativeUnavailable(loaded)
    if loaded.qad_set_isa(INSTRUCTION_SETS.index(name)):
        raise ValueError(f"the processor denies that it can run {name}")
    _forced[:] = [loaded]


def release_instruction_set() -> None:
    """Go back to the best instruction set."""
    _forced.clear()


# The structs of qad.h as bytes, which ctypes passes on faster than it builds a struct.
_GRID = struct.Struct("=6i2f")
_NOISE = struct.Struct("=if4I")


@cache
def _c_grid(grid: Grid) -> bytes:
    """Return qad_grid; see csrc/qad.h."""
    return _GRID.pack(
        grid.bits,
        grid.block,
        grid.code_min,
        grid.code_max,
        grid.signed_scale,
        grid.scale_bits,
        grid.scale_floor,
        grid.scale_ceiling,
    )


_NO_NOISE = _NOISE.pack(_MODES["none"], 0.0, 0, 0, 0, 0)


def _c_noise(noise: Noise) -> bytes:
    """Return qad_noise; see csrc/qad.h."""
    if noise.mode == "none":
        return _NO_NOISE
    seed, word = noise.seed, 0xFFFFFFFF
    return _NOISE.pack(
        _MODES[noise.mode],
        noise.hard_share,
        seed & word,
        seed >> 32 & word,
        noise.tensor & word,
        noise.step & word,
    )


# For a small weight the checks cost as much as the work: is_cpu takes a tenth of the time of device.type.


def _address(tensor: Tensor | None, count: int | None = None, dtype: torch.dtype | None = None) -> int | None:
    """Return a tensor's address, after making sure that C may walk over it."""
    if tensor is None:
        return None
    assert tensor.is_cpu, tensor.device
    assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    assert count is None or tensor.numel() == count, (tensor.shape, count)
    assert dtype is None or tensor.dtype is dtype, (tensor.dtype, dtype)
    address = tensor.data_ptr()
    assert address or not tensor.numel(), "a tensor whose storage was freed"
    return address


def supports(*tensors: Tensor | None) -> bool:
    """Return whether all these are contiguous CPU tensors of known float types, in memory as they read."""
    for tensor in tensors:  # a loop: a generator takes twice its time
        if tensor is None:
            continue
        if not (tensor.is_cpu and tensor.dtype in _DTYPES and tensor.is_contiguous()) or tensor.is_neg():
            return False
    return True


def _blocks(tensor: Tensor, grid: Grid) -> int:
    assert tensor.shape[-1] % grid.block == 0, (tensor.shape, grid)
    return tensor.numel() // grid.block


def _fake_quantize_arguments(
    master_NK: Tensor, scales_NG: Tensor | None, grid: Grid, out: Tensor, used_scales_NG: Tensor | None
) -> tuple[int | None, int, int | None, int | None, int | None, int, int, bytes]:
    """Return what C is told of these tensors, after making sure that it may walk over them."""
    blocks = _blocks(master_NK, grid)
    return (
        _address(master_NK),
        _DTYPES[master_NK.dtype],
        _address(scales_NG, blocks, torch.float32),
        _address(used_scales_NG, blocks, torch.float32),
        _address(out, master_NK.numel()),
        _DTYPES[out.dtype],
        blocks,
        _c_grid(grid),
    )


def fake_quantize(
    master_NK: Tensor, scales_NG: Tensor | None, grid: Grid, noise: Noise, out: Tensor, used_scales_NG: Tensor | None
) -> int:
    """Write the weights that forward uses to ``out``; see ``qad.fake_quant.fake_quantize``.

    Returns:
        How many blocks hold a number that is not finite.
    """
    arguments = _fake_quantize_arguments(master_NK, scales_NG, grid, out, used_scales_NG)
    return library().qad_fake_quantize(*arguments, _c_noise(noise), get_num_threads())


def prepare_fake_quantize(
    master_NK: Tensor, scales_NG: Tensor | None, grid: Grid, out: Tensor, used_scales_NG: Tensor | None
) -> Callable[[Noise], int]:
    """Return ``fake_quantize`` of these tensors on the instruction set of now, checked now and never again.

    The caller must make sure that they keep their memory.
    """
    weights, weights_dtype, scales, used_scales, to, out_dtype, blocks, c_grid = _fake_quantize_arguments(
        master_NK, scales_NG, grid, out, used_scales_NG
    )
    pointer = ctypes.c_void_p
    arguments = (
        pointer(weights),
        ctypes.c_int(weights_dtype),
        pointer(scales),
        pointer(used_scales),
        pointer(to),
        ctypes.c_int(out_dtype),
        ctypes.c_int64(blocks),
        ctypes.c_char_p(c_grid),
    )

    # The function once more without types, because the arguments have theirs: a call takes half of the time.
    function = library()["qad_fake_quantize"]
    function.restype = ctypes.c_int64

    def call(noise: Noise) -> int:
        return function(*arguments, _c_noise(noise), get_num_threads())

    return call


def fake_quantize_backward(
    grad_NK: Tensor,
    master_NK: Tensor,
    scales_NG: Tensor | None,
    grid: Grid,
    noise: Noise,
    grad_scales_NG: Tensor | None,
) -> int:
    """Mask ``grad_NK`` in place; fill ``grad_scales_NG`` if given. See ``qad.fake_quant.fake_quantize_backward``.

    Returns:
        How many blocks hold a number that is not finite.
    """
    blocks = _blocks(master_NK, grid)
    return library().qad_fake_quantize_backward(
        _address(grad_NK, master_NK.numel()),
        _DTYPES[grad_NK.dtype],
        _address(master_NK),
        _DTYPES[master_NK.dtype],
        _address(scales_NG, blocks, torch.float32),
        _address(grad_scales_NG, blocks, torch.float32),
        blocks,
        _c_grid(grid),
        _c_noise(noise),
        get_num_threads(),
    )


def quantize(weight_NK: Tensor, scales_NG: Tensor | None, grid: Grid, codes_NK: Tensor, stored_NG: Tensor) -> int:
    """Write int8 codes and float16 scales; see ``qad.tensor.quantize``.

    Returns:
        How many blocks hold a number that is not finite.
    """
    blocks = _blocks(weight_NK, grid)
    return library().qad_quantize(
        _address(weight_NK),
        _DTYPES[weight_NK.dtype],
        _address(scales_NG, blocks, torch.float32),
        _address(codes_NK, weight_NK.numel(), torch.int8),
        _address(stored_NG, blocks, torch.float16),
        blocks,
        _c_grid(grid),
        get_num_threads(),
    )


def dequantize(codes_NK: Tensor, scales_NG: Tensor, grid: Grid, out: Tensor) -> None:
    """Write the weights that a device decodes to ``out``; see ``qad.tensor.dequantize``."""
    blocks = _blocks(codes_NK, grid)
    library().qad_dequantize(
        _address(codes_NK, dtype=torch.int8),
        _address(scales_NG, blocks, torch.float16),
        _address(out, codes_NK.numel()),
        _DTYPES[out.dtype],
        blocks,
        _c_grid(grid),
        get_num_threads(),
    )


def pack(codes_NK: Tensor, scales_NG: Tensor, grid: Grid, layout: str) -> Tensor:
    """Return codes as a file stores them; see ``qad.pack``.

    Args:
        codes_NK: int8; its rows may lie apart, as those of some columns of a wider tensor do.
        scales_NG: float16; only the layout ``gguf`` stores them beside the codes, the others do not look at them.
        grid: The grid.
        layout: ``gguf``, ``gptq`` or ``onnx``.

    Returns:
        uint8 [N, bytes of a row] for gguf, uint8 [N, G, block * bits / 8] for onnx, int32 [K * bits / 32, N] for gptq.

    Raises:
        UserError: The layout cannot hold such a tensor.
    """
    rows, columns = codes_NK.shape
    groups = columns // grid.block
    assert codes_NK.is_cpu, codes_NK.device
    assert codes_NK.dtype is torch.int8, codes_NK.dtype
    assert codes_NK.stride(1) == 1 or columns == 1, codes_NK.stride()
    shapes = {
        "gguf": ((rows, groups * (2 + grid.block * grid.bits // 8)), torch.uint8),
        "gptq": ((columns * grid.bits // 32, rows), torch.int32),
        "onnx": ((rows, groups, grid.block * grid.bits // 8), torch.uint8),
    }
    shape, dtype = shapes[layout]
    out = torch.empty(shape, dtype=dtype)
    failed = library().qad_pack(
        codes_NK.data_ptr(),
        codes_NK.stride(0),
        _address(scales_NG, rows * groups, torch.float16) if layout == "gguf" else None,
        out.data_ptr(),
        rows,
        columns,
        _c_grid(grid),
        LAYOUTS.index(layout),
    )
    if failed:
        raise UserError(f"the layout {layout} cannot hold {rows} x {columns} codes of {grid.name}")
    return out


def uniform16(count: int, *, seed: int, tensor: int, step: int, stream: int = 0) -> Tensor:
    """Return the random values of ``qad.philox.uniform16``."""
    out = torch.empty(count, dtype=torch.float32)
    words = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, tensor, step, stream)
    library().qad_uniform16(out.data_ptr(), count, *words)
    return out


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
    """Overwrite float32 student logits with the gradient of the distillation loss; see csrc/qad.h.

    Args:
        student_TV, teacher_TV: float32 logits; rows may lie apart, a row's entries may not.
        labels_T: int64 next tokens, negative for none; None: none at all.
        kind: One of ``DIVERGENCES``.
        beta, temperature, next_token_weight: See ``qad.losses.LossSettings``.
        keep_logits: Leave the student's logits as they are.

    Returns:
        float64 divergence_T at that temperature and nll_T at temperature 1.
    """
    tokens, vocabulary = student_TV.shape
    for logits in (student_TV, teacher_TV):
        assert logits.shape == student_TV.shape, (logits.shape, student_TV.shape)
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.stride(1) == 1 or vocabulary == 1, logits.stride()
    value_T, nll_T = torch.empty(tokens, dtype=torch.float64), torch.empty(tokens, dtype=torch.float64)
    library().qad_divergence(
        student_TV.data_ptr(),
        student_TV.stride(0),
        teacher_TV.data_ptr(),
        teacher_TV.stride(0),
        _address(labels_T, tokens, torch.int64),
        value_T.data_ptr(),
        nll_T.data_ptr(),
        tokens,
        vocabulary,
        DIVERGENCES.index(kind),
        beta,
        temperature,
        next_token_weight,
        keep_logits,
        get_num_threads(),
    )
    return value_T, nll_T


def describe() -> str:
    """Return in a few words which kernels run on the CPU, or why none do."""
    if reason := available():
        return f"plain torch ({reason})"
    return f"native, {instruction_set()}"
