"""The operators that PyTorch sees: schemas, shapes without data, gradients, compilation; the dispatch to kernels."""

import copy
import gc
import io
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from qad import fake_quant as reference
from qad import native, ops
from qad.errors import UserError
from qad.fake_quant import fold_sum
from qad.grid import GRIDS, get_grid
from qad.noise import HARD, NOISE_MODES, Noise
from qad.tensor import absmax_scales

PLAIN = [name for name, grid in GRIDS.items() if grid.is_plain]
ROWS, SETTINGS = 5, ("uniform", 0.5, 2**63 - 1, 3, 4)


def case(grid: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return weights, some of them beyond the range of the scales that come with them."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, 3 * get_grid(grid).block, generator=random)
    return weight.to(dtype), absmax_scales(weight, get_grid(grid)) * 0.8


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", PLAIN)
@pytest.mark.parametrize("given", [False, True])
def test_operators_pass_opcheck(grid: str, dtype: torch.dtype, given: bool) -> None:
    weight, scales = case(grid, dtype)
    chosen = scales.requires_grad_() if given else None
    torch.library.opcheck(ops.fake_quantize_op, (weight.requires_grad_(), chosen, grid, *SETTINGS))
    weight, scales = weight.detach(), scales.detach() if given else None
    grad = torch.randn_like(weight)
    torch.library.opcheck(ops.fake_quantize_backward_op, (grad, weight, scales, grid, *SETTINGS))
    out, used = torch.empty_like(weight), torch.empty(ROWS, 3)
    torch.library.opcheck(ops.fake_quantize_into_op, (weight, scales, out, used, grid, *SETTINGS))


@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("grid", PLAIN)
def test_operator_and_its_gradient_are_those_of_the_reference(grid: str, mode: str) -> None:
    weight, scales = case(grid)
    noise = Noise(mode, 0.3, seed=9, tensor=2, step=7)
    settings = (grid, mode, 0.3, 9, 2, 7)
    weight.requires_grad_()
    scales.requires_grad_()
    out, used = torch.ops.qad.fake_quantize(weight, scales, *settings)
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    out.backward(slope)
    weight_data, scales_data = weight.detach(), scales.detach()
    expected_used = torch.empty_like(scales_data)
    expected = reference.fake_quantize(weight_data, scales_data, get_grid(grid), noise, None, expected_used)
    assert torch.equal(bits(out.detach()), bits(expected))
    assert torch.equal(bits(used), bits(expected_used))
    by_scale = reference.fake_quantize_backward(
        slope, weight_data, scales_data, get_grid(grid), noise, learn_scales=True
    )
    assert weight.grad is not None
    assert scales.grad is not None
    assert by_scale is not None
    assert torch.equal(bits(weight.grad), bits(slope))
    assert torch.equal(bits(scales.grad), bits(by_scale))


def test_the_gradient_of_the_callers_loss_is_left_alone() -> None:
    weight, scales = case("q4_0")
    weight.requires_grad_()
    out, _ = torch.ops.qad.fake_quantize(weight, scales, "q4_0", "none", 0.0, 0, 0, 0)
    slope = torch.ones_like(weight)
    out.backward(slope)
    assert bool((slope == 1).all())
    assert weight.grad is not None
    assert bool((weight.grad == 0).any()), "the case has weights outside the range"


def test_no_gradient_flows_to_absmax_scales() -> None:
    weight = case("q8_0")[0].requires_grad_()
    out, used = torch.ops.qad.fake_quantize(weight, None, "q8_0", "none", 0.0, 0, 0, 0)
    out.sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 1).all()), "absmax scales put every weight within the range"
    assert torch.equal(used, absmax_scales(weight.detach(), get_grid("q8_0")))


def test_rounded_scales_have_no_gradient() -> None:
    weight, scales = case("q4_0")
    out, used = torch.ops.qad.fake_quantize(weight, scales.requires_grad_(), "q4_0", "none", 0.0, 0, 0, 0)
    assert (out.requires_grad, used.requires_grad) == (True, False)


@pytest.mark.parametrize("given", [False, True])
def test_compiles_into_one_graph(given: bool) -> None:
    weight, scales = case("q4_0")
    inputs = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(3))

    def layer(weight: Tensor, scales: Tensor | None) -> Tensor:
        quantized, _ = torch.ops.qad.fake_quantize(weight, scales, "q4_0", *SETTINGS)
        return (torch.nn.functional.linear(inputs, quantized) ** 2).sum()

    results = []
    # aot_eager traces forward, fakes and gradient like the default backend, without a minute of code generation.
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        master = weight.clone().requires_grad_()
        chosen = scales.clone().requires_grad_() if given else None
        loss = run(master, chosen)
        loss.backward()
        results.append((loss.detach(), master.grad, None if chosen is None else chosen.grad))
    assert torch.equal(results[0][0], results[1][0])
    for eager, compiled in zip(results[0][1:], results[1][1:], strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None and compiled is not None:
            assert torch.equal(bits(eager), bits(compiled))


def test_compiles_with_generated_code() -> None:
    weight, scales = case("int4_g64", torch.bfloat16)

    def double(weight: Tensor) -> Tensor:
        return torch.ops.qad.fake_quantize(weight * 2, scales, "int4_g64", "none", 0.0, 0, 0, 0)[0] + 1

    assert torch.equal(torch.compile(double, fullgraph=True)(weight), double(weight))


def test_buffers_of_the_caller_are_filled() -> None:
    weight, scales = case("q8_0")
    out, used = torch.empty_like(weight), torch.empty_like(scales)
    torch.ops.qad.fake_quantize_into(weight, scales, out, used, "q8_0", "none", 0.0, 0, 0, 0)
    assert torch.equal(bits(out), bits(reference.fake_quantize(weight, scales, get_grid("q8_0"))))
    assert (
        ops.fake_quantize(weight, scales, get_grid("q8_0"), HARD, out=used.new_empty(weight.shape)).shape == out.shape
    )
    assert ops.fake_quantize(weight, scales, get_grid("q8_0"), out=out) is out


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", PLAIN)
def test_the_same_tensors_step_after_step(grid: str, dtype: torch.dtype, given: bool) -> None:
    weight, scales = case(grid, dtype)
    out, used = torch.full_like(weight, 7.0), torch.full_like(scales, 7.0)
    fill = ops.FakeQuantizer(weight, scales if given else None, get_grid(grid), out, used)
    for step, mode in enumerate([*NOISE_MODES, "none", "uniform"]):
        weight.add_(0.1)
        noise = Noise(mode, 0.3, seed=2**64 - 1, tensor=2**32 - 1, step=step)
        fill(noise)
        expected_used = torch.empty_like(scales)
        expected = reference.fake_quantize(
            weight, scales if given else None, get_grid(grid), noise, None, expected_used
        )
        assert torch.equal(bits(out), bits(expected)), mode
        assert torch.equal(bits(used), bits(expected_used)), mode


@pytest.mark.parametrize("which", ["weight", "scales", "out", "used"])
def test_tensors_that_got_other_memory_are_noticed(which: str) -> None:
    weight, scales = case("q4_0")
    tensors = {"weight": weight, "scales": scales, "out": torch.zeros_like(weight), "used": torch.zeros_like(scales)}
    fill = ops.FakeQuantizer(tensors["weight"], tensors["scales"], get_grid("q4_0"), tensors["out"], tensors["used"])
    fill()
    moved = tensors[which]
    before, address = moved.clone(), moved.data_ptr()
    moved.data = moved.data * 1.5  # frees what it had, unless that is still held
    assert moved.data_ptr() != address
    assert all(torch.empty_like(moved).data_ptr() != address for _ in range(8))
    fill()
    expected_used = torch.empty_like(scales)
    expected = reference.fake_quantize(weight, scales, get_grid("q4_0"), HARD, None, expected_used)
    assert torch.equal(bits(tensors["out"]), bits(expected))
    assert torch.equal(bits(tensors["used"]), bits(expected_used))
    if which in ("weight", "scales"):
        assert not torch.equal(before, moved)


def test_tensors_that_got_another_dtype_with_other_memory() -> None:
    weight, _ = case("q4_0")
    out = torch.zeros_like(weight)
    fill = ops.FakeQuantizer(weight, None, get_grid("q4_0"), out)
    weight.data, out.data = weight.to(torch.bfloat16), out.to(torch.float16)
    fill()
    expected = torch.empty_like(out)
    reference.fake_quantize(weight, None, get_grid("q4_0"), HARD, expected)
    assert out.dtype == torch.float16
    assert torch.equal(bits(out), bits(expected))


def test_the_same_views_that_no_kernel_takes() -> None:
    weight, scales = case("q4_0")
    wide = torch.cat([weight, weight], dim=1)
    view, out = wide[:, : weight.shape[1]], torch.empty_like(weight)
    ops.FakeQuantizer(view, scales, get_grid("q4_0"), out)()
    assert torch.equal(bits(out), bits(reference.fake_quantize(weight, scales, get_grid("q4_0"))))


def test_step_after_step_without_a_gradient() -> None:
    weight, scales = case("q4_0")
    out = torch.nn.Parameter(torch.zeros_like(weight))  # may want one: what is written to it has none to give
    fill = ops.FakeQuantizer(weight, scales, get_grid("q4_0"), out)
    fill()
    assert torch.equal(bits(out.detach()), bits(reference.fake_quantize(weight, scales, get_grid("q4_0"))))
    scales.requires_grad_()
    with pytest.raises(UserError, match=r"has no gradient: call torch\.ops\.qad\.fake_quantize"):
        fill()
    with torch.no_grad():
        fill()


def pickled(fill: ops.FakeQuantizer, tensors: list[Tensor]) -> tuple[ops.FakeQuantizer, list[Tensor]]:
    written = io.BytesIO()
    torch.save((fill, tensors), written)
    written.seek(0)
    return torch.load(written, weights_only=False)


@pytest.mark.parametrize("copied", [lambda *both: copy.deepcopy(both), pickled], ids=["deep", "pickled"])
@pytest.mark.parametrize("taken", [True, False], ids=["kernel", "reference"])
def test_a_copy_fills_the_copies_of_the_tensors(copied: Callable[..., Any], taken: bool) -> None:
    weight, _ = case("q4_0")
    weight = weight if taken else torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
    assert native.supports(weight) == taken
    tensors = [weight, torch.zeros(weight.shape)]
    fill = ops.FakeQuantizer(weight, None, get_grid("q4_0"), tensors[1])
    fill()
    other, (other_weight, other_out) = copied(fill, tensors)
    other_weight.mul_(-3.0)
    before = tensors[1].clone()
    other()
    assert torch.equal(bits(other_out), bits(reference.fake_quantize(other_weight, None, get_grid("q4_0"))))
    assert torch.equal(bits(tensors[1]), bits(before)), "the first one's is left alone"
    assert not torch.equal(before, other_out)


@pytest.mark.parametrize("taken", [True, False], ids=["kernel", "reference"])
def test_nothing_outlives_the_last_who_refers_to_it(taken: bool) -> None:
    weight = case("q4_0")[0].to(torch.float32 if taken else torch.float64)
    fill = ops.FakeQuantizer(weight, None, get_grid("q4_0"), torch.zeros(weight.shape))
    fill()
    gone = weakref.ref(weight)
    gc.disable()  # which would find a circle, but late, and a device's memory is short
    try:
        del fill, weight
        assert gone() is None
    finally:
        gc.enable()


def test_tensors_whose_storage_was_freed_are_refused() -> None:
    weight, _ = case("q4_0")
    fill = ops.FakeQuantizer(weight, None, get_grid("q4_0"), torch.zeros_like(weight))
    fill()
    weight.untyped_storage().resize_(0)  # as sharded training does between uses
    with pytest.raises(AssertionError, match="whose storage was freed"):
        fill()


def test_views_that_no_kernel_takes_go_to_the_reference() -> None:
    weight, scales = case("q4_0")
    wide = torch.cat([weight, weight], dim=1)
    view = wide[:, : weight.shape[1]]
    assert not native.supports(view)
    got, _ = torch.ops.qad.fake_quantize(view, scales, "q4_0", "none", 0.0, 0, 0, 0)
    assert torch.equal(bits(got), bits(reference.fake_quantize(weight, scales, get_grid("q4_0"))))


def test_kernels_run_where_there_is_a_compiler() -> None:
    # The machines that run these tests have one, or the tests of the kernels would pass by never running.
    assert ops.why_reference(torch.device("cpu")) is None
    assert "native" in ops.describe(torch.device("cpu"))
    assert ops.why_reference(torch.device("meta")) == "there are no kernels for meta"
    assert "plain torch" in ops.describe(torch.device("meta"))


@pytest.mark.parametrize(
    ("grid", "change", "message"),
    [
        ("q4_0", {"scales": torch.ones(3, 5)}, r"scales are torch.float32 \[3, 5\]; convert or reshape .* \[5, 3\]"),
        ("q4_0", {"scales": torch.ones(5, 3).bfloat16()}, r"scales are torch.bfloat16 \[5, 3\]; convert or reshape"),
        ("q4_0", {"weight": torch.ones(2, 5, 96)}, r"two dimensions, not of torch.float32 \[2, 5, 96\]"),
        ("q4_0", {"weight": torch.ones(5, 96, dtype=torch.int32)}, r"of floats in two dimensions, not of torch.int32"),
        ("q4_0", {"weight": torch.ones(5, 90)}, r"rows of 90 values are no multiple of 32 \(q4_0\)"),
        ("q4_k", {"scales": None}, r"rows of 96 values are no multiple of 256 \(q4_k\)"),
        ("q4_0", {"offsets": torch.ones(5, 3)}, r"here \(q4_0\) leave them out"),
        ("q4_1", {}, r"q4_1 has minimums: give offsets"),
        ("q4_1", {"offsets": torch.ones(5)}, r"offsets are torch.float32 \[5\]; convert or reshape"),
    ],
)
def test_inputs_that_do_not_belong_together_are_named(
    grid: str, change: dict[str, Tensor | None], message: str
) -> None:
    # [3, 5] scales have as many numbers as [5, 3] have: the kernels, which count, would take them.
    given = {"weight": torch.ones(5, 96), "scales": torch.ones(5, 3), "offsets": None} | change
    settings = (grid, "none", 0.0, 0, 0, 0)
    with pytest.raises(UserError, match=message):
        torch.ops.qad.fake_quantize(given["weight"], given["scales"], *settings, given["offsets"])
    out, used = torch.empty(5, 96), torch.empty(5, 3)
    with pytest.raises(UserError, match=message):
        torch.ops.qad.fake_quantize_into(given["weight"], given["scales"], out, used, *settings, given["offsets"])


def test_buffers_of_another_shape_are_named() -> None:
    weight, used = torch.ones(5, 96), torch.empty(5, 3)
    for out, scales, message in (
        (torch.empty(96, 5), used, r"buffer is torch.float32 \[96, 5\]; give one of floats \[5, 96\]"),
        (weight.to(torch.int32), used, r"buffer is torch.int32 \[5, 96\]; give one of floats"),
        (
            weight.clone(),
            torch.empty(3, 5),
            r"for scales is torch.float32 \[3, 5\]; give one of torch.float32 \[5, 3\]",
        ),
        (weight.clone(), used.half(), r"for scales is torch.float16 \[5, 3\]; give one of torch.float32 \[5, 3\]"),
    ):
        with pytest.raises(UserError, match=message):
            torch.ops.qad.fake_quantize_into(weight, None, out, scales, "q4_0", "none", 0.0, 0, 0, 0)
        with pytest.raises(UserError, match=message):
            ops.fake_quantize(weight, None, get_grid("q4_0"), HARD, out, scales)
        with pytest.raises(UserError, match=message):
            ops.FakeQuantizer(weight, None, get_grid("q4_0"), out, scales)


def test_a_shape_that_cannot_be_is_named_while_tracing() -> None:
    def forward(weight: Tensor) -> Tensor:
        return torch.ops.qad.fake_quantize(weight, None, "q4_0", "none", 0.0, 0, 0, 0)[0]

    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend="eager")
    with pytest.raises(Exception, match=r"floats in two dimensions, not of torch.float32 \[64\]"):
        compiled(torch.ones(64))
    with pytest.raises(Exception, match=r"rows of 90 values are no multiple of 32 \(q4_0\)"):
        compiled(torch.ones(2, 90))


@pytest.mark.parametrize("shift", [1, 32, 256, 1024, -1, -256])
def test_buffers_that_overlap(shift: int) -> None:
    memory = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    weight, out = memory[2048:4096].view(8, 256), memory[2048 + shift : 4096 + shift].view(8, 256)
    weight[3, 7] = torch.inf
    expected = reference.fake_quantize(weight.clone(), None, get_grid("q4_0"))
    ops.fake_quantize(weight, None, get_grid("q4_0"), out=out)
    assert torch.equal(bits(out), bits(expected))
    memory.copy_(torch.randn(8192, generator=torch.Generator().manual_seed(1)))
    weight[3, 7] = torch.inf
    expected = reference.fake_quantize(weight.clone(), None, get_grid("q4_0"))
    ops.FakeQuantizer(weight, None, get_grid("q4_0"), out)()
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["q4_0", "q8_0", "int4_g128"])
def test_in_place(grid: str, dtype: torch.dtype, mode: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(257, 2 * get_grid(grid).block, generator=random).to(dtype)
    weight[3, 7] = torch.inf
    noise = Noise(mode, 0.4, 1, 2, 3)
    expected = reference.fake_quantize(weight.clone(), None, get_grid(grid), noise)
    again = reference.fake_quantize(expected.clone(), None, get_grid(grid), noise)
    ops.fake_quantize(weight, None, get_grid(grid), noise, out=weight)
    assert torch.equal(bits(weight), bits(expected))
    ops.FakeQuantizer(weight, None, get_grid(grid), weight)(noise)
    assert torch.equal(bits(weight), bits(again))


def test_scales_may_be_overwritten_by_those_used_and_by_nothing_else() -> None:
    weight, scales = case("q4_0")
    scales = scales * 1.01
    expected_used = torch.empty_like(scales)
    expected = reference.fake_quantize(weight, scales, get_grid("q4_0"), HARD, None, expected_used)
    memory = torch.zeros(scales.numel() + 1)
    given, used = memory[:-1].view(scales.shape).copy_(scales), memory[1:].view(scales.shape)
    assert torch.equal(bits(ops.fake_quantize(weight, given, get_grid("q4_0"), HARD, None, used)), bits(expected))
    assert torch.equal(bits(used), bits(expected_used))
    assert torch.equal(bits(ops.fake_quantize(weight, scales, get_grid("q4_0"), HARD, None, scales)), bits(expected))
    assert torch.equal(bits(scales), bits(expected_used))


def test_a_view_that_is_negated_when_read() -> None:
    weight, scales = case("q4_0")
    view = torch._neg_view(weight)  # pyright: ignore[reportPrivateImportUsage]
    assert view.is_contiguous()
    assert not native.supports(view)
    got = ops.fake_quantize(view, None, get_grid("q4_0"))
    assert torch.equal(bits(got), bits(reference.fake_quantize(-weight, None, get_grid("q4_0"))))
    for noise in (HARD, Noise("uniform", 0.3)):
        negated = torch._neg_view(scales)  # pyright: ignore[reportPrivateImportUsage]
        got = ops.fake_quantize(weight, negated, get_grid("q4_0"), noise)
        assert torch.equal(bits(got), bits(ops.fake_quantize(weight, -scales, get_grid("q4_0"), noise)))


@pytest.mark.parametrize("which", ["weight", "out"])
def test_tensors_that_no_longer_go_together_are_refused_until_they_do(which: str) -> None:
    weight, _ = case("q4_0")
    tensors = {"weight": weight, "out": torch.zeros_like(weight)}
    fill = ops.FakeQuantizer(weight, None, get_grid("q4_0"), tensors["out"])
    fill()
    before = tensors[which].data
    tensors[which].data = torch.ones(before.shape[0], before.shape[1] // 3)
    for _ in range(3):  # the first refusal must not let the next one through
        with pytest.raises(UserError, match=r"give one of floats \[5, "):
            fill()
    tensors[which].data = before * 2
    fill()
    assert torch.equal(bits(tensors["out"]), bits(reference.fake_quantize(weight, None, get_grid("q4_0"))))


def test_threads_that_meet_other_memory_at_once() -> None:
    weight = torch.ones(4, 64)
    out = torch.zeros_like(weight)
    fill = ops.FakeQuantizer(weight, None, get_grid("q4_0"), out)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for number in range(2, 500):
                weight.data = torch.full_like(weight, float(number))
                expected = reference.fake_quantize(weight, None, get_grid("q4_0"))
                for done in [pool.submit(fill) for _ in range(4)]:
                    done.result()
                assert torch.equal(out, expected), number
    finally:
        sys.setswitchinterval(interval)


def test_an_unknown_grid_or_mode_is_named() -> None:
    weight, _ = case("q4_0")
    with pytest.raises(UserError, match="unknown grid 'q3_9'"):
        torch.ops.qad.fake_quantize(weight, None, "q3_9", "none", 0.0, 0, 0, 0)
    with pytest.raises(UserError, match="unknown noise mode 'loud'"):
        torch.ops.qad.fake_quantize(weight, None, "q4_0", "loud", 0.0, 0, 0, 0)


def test_fold_sum_folds_in_halves() -> None:
    # In this order, and in no other, each large term meets its opposite first.
    values = torch.tensor([1e30, 3.0, 1e20, 4.0, -1e30, 5.0, -1e20, 6.0])
    assert float(fold_sum(values)) == 18.0


@pytest.mark.parametrize("wants", ["master", "scales"])
def test_the_call_without_a_gradient_says_so(wants: str) -> None:
    """It would drop the gradient of a master that requires one, and nobody would know."""
    weight, scales = case("q4_0")
    (weight if wants == "master" else scales).requires_grad_()
    with pytest.raises(UserError, match=r"has no gradient: call torch\.ops\.qad\.fake_quantize"):
        ops.fake_quantize(weight, scales, get_grid("q4_0"))
    with torch.no_grad():
        ops.fake_quantize(weight, scales, get_grid("q4_0"))
