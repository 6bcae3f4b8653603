"""Masters beside forward buffers: the model holds fake-quantized weights, the optimizer moves what stands behind."""

import hashlib

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qad.errors import UserError
from qad.fake_quant import Noise, fake_quantize, fake_quantize_backward
from qad.gptq_init import initialize
from qad.grid import get_grid
from qad.plan import KEEP, make_plan
from qad.student import SCALE_MODES, Masters
from qad.tensor import absmax_scales, dequantize, mse_scales
from tests.helpers_runs import tiny


def make(
    scales: str = "learned", mode: str = "rtn", bits: int = 4, case: str = "llama-tied"
) -> tuple[PreTrainedModel, Masters]:
    model = tiny(case)
    return model, Masters(model, initialize(model, make_plan(model, bits), mode), scales)


def move(masters: Masters, amount: float, seed: int = 0) -> None:
    """Move masters and scales as an optimizer would: by shares of a grid step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for master, scales, step in masters.groups():
            master.add_(torch.randn(master.shape, generator=generator) * step * amount)
            if scales.requires_grad:
                scales.mul_(1 + 0.05 * torch.randn(scales.shape, generator=generator))


def forward_of(model: PreTrainedModel, masters: Masters) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in masters.names}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("scales", SCALE_MODES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["llama-tied", "qwen3"])
def test_hardened_buffers_are_what_the_device_decodes(scales: str, bits: int, case: str) -> None:
    model, masters = make(scales, bits=bits, case=case)
    plan = make_plan(model, bits)
    for round_ in range(3):
        move(masters, 0.4, seed=round_)
        masters.refresh(step=round_, noise="uniform", hard_share=0.3, seed=1)
        move(masters, 0.4, seed=10 + round_)
        masters.harden()
        stored, forward, prints = masters.quantized(), forward_of(model, masters), masters.fingerprint()
        assert list(stored) == masters.names == [name for name, grid in plan.items() if grid != KEEP]
        assert list(prints) == masters.names
        for name, tensor in stored.items():
            assert tensor.grid == get_grid(plan[name])
            assert same_bits(dequantize(tensor), forward[name]), name
            assert hashlib.sha256(forward[name].numpy().tobytes()).hexdigest() == prints[name]
        again = masters.fingerprint()
        masters.harden()
        assert masters.fingerprint() == again


def test_the_model_starts_with_the_weights_of_its_initialisation() -> None:
    _, masters = make(mode="mse")
    before = masters.fingerprint()
    masters.harden()
    assert masters.fingerprint() == before


def test_absmax_scales_follow_the_masters() -> None:
    model, masters = make("absmax")
    for refill in (lambda: masters.refresh(step=5), masters.harden):
        move(masters, 3.0)
        refill()
        for (master, scales, _), name in zip(masters.groups(), masters.names, strict=True):
            grid = get_grid(make_plan(model, 4)[name])
            assert torch.equal(scales, absmax_scales(master.detach(), grid))


def test_mse_scales_are_searched_every_twenty_steps() -> None:
    model, masters = make("mse")
    plan = make_plan(model, 4)

    def is_fresh() -> list[bool]:
        return [
            torch.equal(scales, mse_scales(master.detach(), get_grid(plan[name])))
            for (master, scales, _), name in zip(masters.groups(), masters.names, strict=True)
        ]

    for step, fresh in ((0, True), (1, False), (19, False), (20, True), (21, False)):
        move(masters, 1.0, seed=step)
        masters.refresh(step=step)
        assert all(is_fresh()) if fresh else not any(is_fresh()), step


def test_learned_scales_are_left_to_the_optimizer() -> None:
    _, masters = make("learned")
    before = [scales.detach().clone() for _, scales, _ in masters.groups()]
    move(masters, 0.0)
    moved = [scales.detach().clone() for _, scales, _ in masters.groups()]
    masters.refresh(step=0)
    masters.harden()
    for (_, scales, _), old, new in zip(masters.groups(), before, moved, strict=True):
        assert torch.equal(scales, new)
        assert not torch.equal(scales, old)


@pytest.mark.parametrize("scales", SCALE_MODES)
def test_gradients_move_to_masters_and_scales(scales: str) -> None:
    model, masters = make(scales)
    noise = {"step": 3, "noise": "uniform", "hard_share": 0.5, "seed": 2}
    masters.refresh(**noise)
    for parameter in masters.forward_parameters():
        parameter.requires_grad_(True)
    ids = torch.arange(40).view(2, 20)
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(masters.names) <= set(grads)
    masters.collect_gradients(**noise)
    plan = make_plan(model, 4)
    for index, ((master, scale, _), name) in enumerate(zip(masters.groups(), masters.names, strict=True)):
        expected = grads[name].clone()
        by_scale = fake_quantize_backward(
            expected,
            master.detach(),
            scale.detach(),
            get_grid(plan[name]),
            Noise("uniform", 0.5, 2, index, 3),
            learn_scales=True,
        )
        assert master.grad is not None
        assert torch.equal(master.grad, expected)
        if scales == "learned":
            assert scale.grad is not None
            assert torch.equal(scale.grad, by_scale)  # type: ignore[arg-type]
        else:
            assert scale.grad is None
            assert not scale.requires_grad
    assert all(p.grad is None for p in masters.forward_parameters())
    masters.collect_gradients(**noise)  # nothing to move: what was collected stays
    assert all(master.grad is not None for master, _, _ in masters.groups())


def test_noise_differs_between_tensors_steps_and_seeds_and_matches_the_reference() -> None:
    model, masters = make()
    plan = make_plan(model, 4)
    seen = []
    for step, seed in ((1, 0), (2, 0), (1, 1)):
        masters.refresh(step=step, noise="stochastic", hard_share=0.25, seed=seed)
        forward = forward_of(model, masters)
        for index, ((master, scales, _), name) in enumerate(zip(masters.groups(), masters.names, strict=True)):
            expected = fake_quantize(
                master.detach(), scales.detach(), get_grid(plan[name]), Noise("stochastic", 0.25, seed, index, step)
            )
            assert same_bits(forward[name], expected)
        seen.append(masters.fingerprint())
    assert all(len({prints[name] for prints in seen}) == 3 for name in masters.names)


def test_a_tied_head_is_one_parameter() -> None:
    model, masters = make()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert "lm_head.weight" not in masters.names
    move(masters, 0.5)
    masters.refresh(step=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    untied_model, untied = make(case="llama-untied")
    assert "lm_head.weight" in untied.names
    assert untied_model.get_output_embeddings().weight is not untied_model.get_input_embeddings().weight  # type: ignore[union-attr]


def test_an_unknown_scale_mode() -> None:
    model = tiny()
    with pytest.raises(UserError, match="unknown scale mode 'median'; known: absmax, learned, mse"):
        Masters(model, initialize(model, make_plan(model, 4), "rtn"), "median")
