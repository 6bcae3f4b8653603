"""What the sensitivity foretells, against what rounding then costs."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qad.gptq_init import initialize
from qad.grid import get_grid
from qad.measure import measure, shifted_labels
from qad.plan import KEEP, model_weights
from qad.rounding import RoundingSettings, round_with_hessian, round_without_hessian
from qad.sensitivity import Costs, measure_costs
from qad.tensor import dequantize
from tests.helpers_runs import tiny

GRIDS = ("q4_0", "q8_0")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Return a model of four layers whose weights differ in how much they matter; not to be changed."""
    made = tiny("llama-untied", num_hidden_layers=4)
    with torch.no_grad():
        for layer, factor in zip(made.model.layers, (0.5, 1.0, 1.5, 2.0), strict=True):
            layer.mlp.down_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.mul_(factor)
    return made


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Return random sequences [B, T]."""
    return torch.randint(0, 600, (64, 32), generator=torch.Generator().manual_seed(0))


def candidates(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    return {name: GRIDS for name, weight in model_weights(model).items() if weight is not None}


@pytest.fixture(scope="module")
def costs(model: PreTrainedModel, tokens: Tensor) -> Costs:
    """Return the costs of plain rounding."""
    return measure_costs(model, candidates(model), tokens, mode="mse")


def measured(model: PreTrainedModel, plan: dict[str, str], tokens: Tensor) -> float:
    """Return the KL of a model rounded to nearest under a plan for some of its weights."""
    rounded = copy.deepcopy(model)
    initialize(rounded, {name: plan.get(name, KEEP) for name in model_weights(model)}, "mse")
    ones = torch.ones_like(tokens)
    batch = {"input_ids": tokens, "attention_mask": ones, "labels": shifted_labels(tokens, ones)}
    return measure(rounded, model, [batch]).kl


def test_single_tensors_cost_what_was_foretold(model: PreTrainedModel, tokens: Tensor, costs: Costs) -> None:
    """Every linear layer within a factor of 2, most within a tenth; on other text than the costs were taken on.

    Attention values are the exception: their errors add up over the tokens that attention averages.
    """
    fresh = torch.randint(0, 600, (32, 32), generator=torch.Generator().manual_seed(5))
    linears = [name for name in costs if ".layers." in name]
    found = {name: measured(model, {name: "q4_0"}, fresh) for name in linears}
    ratios = torch.tensor([costs[name]["q4_0"] / found[name] for name in linears])
    assert len(linears) == 28
    assert 0.5 < ratios.min()
    assert ratios.max() < 1.6
    assert 0.9 < ratios.quantile(0.25)
    assert ratios.quantile(0.75) < 1.2
    foretold = torch.tensor([costs[name]["q4_0"] for name in linears])
    actual = torch.tensor(list(found.values()))
    assert actual.max() > 5 * actual.min()  # so that there is an order to be found
    assert float(torch.corrcoef(torch.stack([foretold.log(), actual.log()]))[0, 1]) > 0.98


def test_the_whole_costs_what_its_tensors_cost(model: PreTrainedModel, tokens: Tensor, costs: Costs) -> None:
    """As long as the whole is small: 4 bits move this random model so far that costs no longer add up."""
    linears = [name for name in costs if ".layers." in name]
    whole = measured(model, dict.fromkeys(linears, "q8_0"), tokens)
    assert sum(costs[name]["q8_0"] for name in linears) == pytest.approx(whole, rel=0.25)


def test_embedding_and_head_are_measured(model: PreTrainedModel, tokens: Tensor, costs: Costs) -> None:
    """On the finer grid here; the coarser one's cost follows from the squared errors, and so knows no saturation."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert costs[name]["q8_0"] == pytest.approx(measured(model, {name: "q8_0"}, tokens), rel=1e-3)
        assert 1 < costs[name]["q4_0"] / measured(model, {name: "q4_0"}, tokens) < 2


def test_a_tied_embedding_is_measured_once_as_both(tokens: Tensor) -> None:
    model = tiny("llama-tied")
    name = "model.embed_tokens.weight"
    costs = measure_costs(model, {name: ("q4_0",)}, tokens, mode="mse")
    assert costs == {name: {"q4_0": pytest.approx(measured(model, {name: "q4_0"}, tokens), rel=1e-4)}}


def test_compensation_saves_what_was_foretold(tokens: Tensor) -> None:
    """Of correlated inputs: the ratio of both modes' costs against the output errors of both roundings."""
    model = tiny("llama-untied")
    with torch.no_grad():
        # A few strong directions in every hidden state.
        model.model.embed_tokens.weight.copy_(torch.randn(len(model.model.embed_tokens.weight), 6) @ torch.randn(6, 64))
    names = [f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name].append(args[0].detach().flatten(0, 1))

    for name in names:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(partial(keep, name))
    grids = dict.fromkeys(names, ("q4_0",))
    plain, compensated = (measure_costs(model, grids, tokens, mode=mode) for mode in ("mse", "gptq"))
    for name in names:
        x_TK = torch.cat(inputs[name])
        hessian_KK = x_TK.t() @ x_TK
        weight_NK = model.get_parameter(name).data
        grid = get_grid("q4_0")
        errors = []
        for rounded in (
            round_without_hessian(weight_NK, grid, "mse", name),
            round_with_hessian(weight_NK, hessian_KK, grid, RoundingSettings(refits=0)),
        ):
            residual_NK = weight_NK - dequantize(rounded.quantized)
            errors.append(float((residual_NK @ hessian_KK * residual_NK).sum()))
        saved = errors[1] / errors[0]
        assert saved < 0.8, name
        assert compensated[name]["q4_0"] / plain[name]["q4_0"] == pytest.approx(saved, rel=0.35), name


def test_the_model_is_left_as_it_was(model: PreTrainedModel, tokens: Tensor) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    grids = {"model.layers.0.mlp.up_proj.weight": GRIDS, "lm_head.weight": GRIDS}
    seen: list[tuple[int, int]] = []
    first = measure_costs(model, grids, tokens, mode="gptq", seed=3, on_progress=lambda *done: seen.append(done))
    assert first == measure_costs(model, grids, tokens, mode="gptq", seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1))


def test_groups_that_do_not_fit_into_memory_change_nothing(
    model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {name: ("q4_0",) for name in candidates(model) if ".layers.0." in name}
    whole = measure_costs(model, grids, tokens, mode="gptq")
    monkeypatch.setattr("qad.sensitivity._MOMENT_BYTES", 4 * 64 * 64)
    apart = measure_costs(model, grids, tokens, mode="gptq")
    for name in grids:
        assert apart[name]["q4_0"] == pytest.approx(whole[name]["q4_0"], rel=1e-4)
