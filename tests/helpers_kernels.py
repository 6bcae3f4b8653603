"""Cases and comparisons for kernels that claim the bits of the plain-torch reference, wherever they run.

Needs torch and qad alone, so that the tests of the CUDA kernels run on a machine that has little else.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qad import fake_quant as reference
from qad import native_cuda
from qad.grid import Grid
from qad.noise import HARD, Noise
from qad.tensor import QuantizedTensor, absmax_scales, damaged_blocks, dequantize, round_scales

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GUARD = 0xA5


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits, on the CPU."""
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return tensor.detach().cpu().contiguous().view(widths[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    wrong = (bits(actual) != bits(expected)).flatten().nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        pair = actual.detach().cpu().flatten()[first].item(), expected.detach().cpu().flatten()[first].item()
        raise AssertionError(f"{what}: {len(wrong)} of {expected.numel()} differ, the first at {first}: {pair}")


class Guarded:
    """A buffer with guard bytes around it, that begins a number of elements beyond an aligned address."""

    def __init__(self, values: Tensor, device: torch.device, shift: int) -> None:
        size = values.element_size()
        start = 64 + shift * size
        self._bytes = torch.full((start + values.numel() * size + 64,), _GUARD, dtype=torch.uint8, device=device)
        self._inside = slice(start, start + values.numel() * size)
        self.tensor = self._bytes[self._inside].view(values.dtype).view(values.shape)
        self.tensor.copy_(values)

    def assert_intact(self) -> None:
        outside = torch.cat([self._bytes[: self._inside.start], self._bytes[self._inside.stop :]])
        assert bool((outside == _GUARD).all()), "written outside the buffer"


def awkward_weights(grid: Grid, dtype: torch.dtype, damaged: bool) -> Tensor:
    """Return [7, 3 blocks] of ties, mirror images, zeros, subnormals, extremes and, on demand, what is not finite.

    21 blocks fill neither a warp nor its last tile.
    """
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 3 * grid.block, generator=random)
    weight[1] *= 1e-3
    weight[2, : grid.block] = 0.0
    weight[2, grid.block : 2 * grid.block] = -0.0
    weight[2, 2 * grid.block :] *= 1e-39  # subnormal
    # Multiples of half a step under a power-of-two scale: ties; the largest twice, with both signs.
    weight[3] = torch.randint(-16, 17, (3 * grid.block,), generator=random) * 2.0**-6
    weight[3, 5], weight[3, 7] = 2.0**-2, -(2.0**-2)
    weight[4] *= 2e4
    weight[5, : grid.block] *= 1e37
    weight[5, grid.block :] *= 1e-7
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    if damaged:
        weight[6, 3] = torch.nan
        weight[6, grid.block + 31] = torch.inf
        weight[0, 2 * grid.block] = -torch.inf
    return weight


def given_scales(weight: Tensor, grid: Grid, damaged: bool) -> Tensor:
    """Return scales that leave some weights out of range, some of them not on the grid, some absurd."""
    random = torch.Generator().manual_seed(2)
    absmax = absmax_scales(weight.float().nan_to_num(1.0, 1.0, 1.0), grid)
    scales = absmax * (0.6 + 0.5 * torch.rand(absmax.shape, generator=random))
    scales[1, 0], scales[1, 1], scales[1, 2] = 0.0, -1e-30, 1e30
    scales[4, 0] = -scales[4, 0]
    scales[4, 1] = torch.inf
    if damaged:
        scales[3, 0] = torch.nan
        scales[3, 1] = -torch.nan
    return scales


def check_fake_quantize(
    weight: Tensor,
    scales: Tensor | None,
    grid: Grid,
    noise: Noise,
    out_dtype: torch.dtype,
    device: torch.device,
    shift: int = 0,
    reference_device: torch.device = CPU,
) -> None:
    """Compare forward and both backwards with the reference, to the bit."""
    there = weight.to(reference_device)
    scales_there = None if scales is None else scales.to(reference_device)
    blocks = (weight.shape[0], weight.shape[1] // grid.block)
    expected = torch.empty_like(there, dtype=out_dtype)
    expected_used = torch.empty(blocks, device=reference_device)
    reference.fake_quantize(there, scales_there, grid, noise, expected, expected_used)
    expected_damaged = int(damaged_blocks(there.float(), expected_used, grid).sum())

    master = Guarded(weight, device, shift)
    given = None if scales is None else Guarded(scales, device, shift)
    given_tensor = None if given is None else given.tensor
    out = Guarded(torch.zeros_like(weight, dtype=out_dtype), device, shift)
    used = Guarded(torch.zeros(blocks), device, shift)
    damaged = torch.full((1,), 5, dtype=torch.int64, device=device)
    native_cuda.fake_quantize(master.tensor, given_tensor, grid, noise, out.tensor, used.tensor, damaged)
    assert_same_bits(out.tensor, expected, "weights")
    assert_same_bits(used.tensor, expected_used, "scales")
    assert int(damaged) - 5 == expected_damaged
    for buffer in (master, given, out, used):
        if buffer is not None:
            buffer.assert_intact()
    assert_same_bits(master.tensor, weight, "masters")

    random = torch.Generator().manual_seed(3)
    slope = torch.randn(weight.shape, generator=random).to(out_dtype)
    expected_grad = slope.to(reference_device, copy=True)
    by_scale = reference.fake_quantize_backward(expected_grad, there, scales_there, grid, noise, learn_scales=True)
    assert by_scale is not None
    for learn_scales in (False, True):
        grad = Guarded(slope, device, shift)
        grad_scales = Guarded(torch.zeros(blocks), device, shift)
        wanted = grad_scales.tensor if learn_scales else None
        native_cuda.fake_quantize_backward(grad.tensor, master.tensor, given_tensor, grid, noise, wanted)
        assert_same_bits(grad.tensor, expected_grad, "gradient")
        grad.assert_intact()
        grad_scales.assert_intact()
        if learn_scales:
            assert_same_bits(grad_scales.tensor, by_scale, "gradient of the scales")
    assert_same_bits(master.tensor, weight, "masters")
    if given is not None:
        # In place: the rounded scales overwrite those given.
        native_cuda.fake_quantize(master.tensor, given.tensor, grid, noise, out.tensor, given.tensor)
        assert_same_bits(given.tensor, expected_used, "scales in place")
        assert_same_bits(out.tensor, expected, "weights, scales in place")


def check_quantize(
    weight: Tensor, scales: Tensor | None, grid: Grid, device: torch.device, shift: int = 0, damaged: bool = False
) -> None:
    """Compare codes, stored scales and decoded weights with the reference, to the bit."""
    wide = weight.float()
    used = absmax_scales(wide, grid) if scales is None else round_scales(scales, grid)
    bad = damaged_blocks(wide, used, grid)
    blocks = wide.view(*bad.shape, grid.block)
    codes = (blocks * used.reciprocal().unsqueeze(-1)).round().clamp(grid.code_min, grid.code_max)
    codes = codes.masked_fill(bad.unsqueeze(-1), 0.0).view(weight.shape).to(torch.int8)
    stored = used.to(torch.float16).masked_fill(bad, torch.nan)
    assert bool(bad.any()) == damaged

    master = Guarded(weight, device, shift)
    given = None if scales is None else scales.to(device)
    out_codes = Guarded(torch.full(weight.shape, 99, dtype=torch.int8), device, shift)
    out_scales = Guarded(torch.zeros(bad.shape, dtype=torch.float16), device, shift)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    native_cuda.quantize(master.tensor, given, grid, out_codes.tensor, out_scales.tensor, count)
    assert_same_bits(out_codes.tensor, codes, "codes")
    assert_same_bits(out_scales.tensor, stored, "stored scales")
    assert int(count) == int(bad.sum())
    out_codes.assert_intact()
    out_scales.assert_intact()

    exact = dequantize(QuantizedTensor(codes, stored, grid))
    for dtype in DTYPES:
        decoded = Guarded(torch.zeros(weight.shape, dtype=dtype), device, shift)
        native_cuda.dequantize(out_codes.tensor, out_scales.tensor, grid, decoded.tensor)
        # torch's conversions keep no particular NaN.
        assert_same_bits(decoded.tensor, exact.to(dtype).masked_fill_(exact.isnan(), torch.nan), f"decoded {dtype}")
        decoded.assert_intact()
    if not damaged:
        # The promise: what forward used is what a device decodes.
        forward = torch.empty(weight.shape, device=device)
        native_cuda.fake_quantize(master.tensor, given, grid, HARD, forward)
        assert_same_bits(forward, exact, "forward and decoded")


def plain_divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    kind: str,
    beta: float,
    temperature: float,
    next_token_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return divergence, next-token loss and the gradient of the loss, in float64 by autograd."""
    logits = student_TV.double().requires_grad_()
    log_q, log_p = F.log_softmax(logits / temperature, -1), F.log_softmax(teacher_TV.double() / temperature, -1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward":
        value = (p * (log_p - log_q)).sum(-1)
    elif kind == "reverse":
        value = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        value = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    nll = F.cross_entropy(logits, labels_T, reduction="none", ignore_index=-100)
    (temperature**2 * value + next_token_weight * nll).sum().backward()
    assert logits.grad is not None
    return value.detach(), nll.detach(), logits.grad


def check_divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    device: torch.device,
    *,
    kind: str,
    beta: float = 0.3,
    temperature: float = 1.0,
    next_token_weight: float = 0.0,
    padding: int = 0,
) -> None:
    """Compare with float64: losses to 1e-6 of themselves, gradients to 1e-6 of probabilities times temperature.

    bfloat16 gradients are compared with the float64 ones to their own precision.
    """
    value, nll, grad = plain_divergence(student_TV, teacher_TV, labels_T, kind, beta, temperature, next_token_weight)
    vocabulary = student_TV.shape[1]
    # Rows that lie apart: with the padding odd, most of them are not aligned.
    student = Guarded(F.pad(student_TV, (0, padding), value=7.0), device, 0)
    teacher = F.pad(teacher_TV, (0, padding), value=9.0).to(device)
    rest = {"kind": kind, "beta": beta, "temperature": temperature, "next_token_weight": next_token_weight}
    labels = labels_T.to(device)
    for keep_logits in (True, False):
        actual = native_cuda.divergence(
            student.tensor[:, :vocabulary], teacher[:, :vocabulary], labels, keep_logits=keep_logits, **rest
        )
        torch.testing.assert_close(actual[0].cpu(), value, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(actual[1].cpu(), nll, rtol=1e-6, atol=1e-7)
        if keep_logits:
            assert_same_bits(student.tensor[:, :vocabulary], student_TV, "student's logits")
    student.assert_intact()
    assert bool((student.tensor[:, vocabulary:] == 7.0).all()), "written beyond the row"
    got = student.tensor[:, :vocabulary].cpu().double()
    if student_TV.dtype == torch.bfloat16:
        torch.testing.assert_close(got, grad, rtol=2.0**-8, atol=1e-6)
    else:
        # A gradient is a difference of probabilities: in float32 it is as exact as those are.
        error = float((got - grad).abs().max()) / (temperature + next_token_weight)
        assert error < 1e-6, error
