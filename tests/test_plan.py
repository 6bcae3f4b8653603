"""Plans: every parameter has its place, a tied head has none of its own, and what does not fit is named."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from qad.errors import UserError
from qad.grid import GRIDS
from qad.plan import EMBEDDING_GRID, KEEP, Misfit, find_misfits, is_tied, make_plan

ModelMaker = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("bits", "grid"), [(4, "q4_0"), (8, "q8_0")])
def test_every_parameter_is_planned(
    tiny_model: ModelMaker, architecture: str, tied: bool, bits: int, grid: str
) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    assert is_tied(model) == tied
    plan = make_plan(model, bits)
    # Hugging Face lists a shared parameter once, under its first name.
    assert list(plan) == [name for name, _ in model.named_parameters()]
    assert plan["model.embed_tokens.weight"] == EMBEDDING_GRID
    assert plan.get("lm_head.weight") == (None if tied else EMBEDDING_GRID)
    for name, planned in plan.items():
        if name.endswith(("norm.weight", ".bias")):
            assert planned == KEEP
        elif name.endswith("_proj.weight"):
            assert planned == grid
    assert sum(planned == grid for planned in plan.values()) >= 2 * 7


def test_biases_are_kept(tiny_model: ModelMaker) -> None:
    plan = make_plan(tiny_model("qwen2"), 4)
    assert plan["model.layers.1.self_attn.q_proj.bias"] == KEEP


def test_every_misfit_is_named_with_its_remedy(tiny_model: ModelMaker) -> None:
    model = tiny_model(intermediate_size=80)
    with pytest.raises(UserError, match="2 tensors do not fit their grid") as caught:
        make_plan(model, 4)
    message = str(caught.value)
    for layer in (0, 1):
        assert f"model.layers.{layer}.mlp.down_proj.weight: rows of 80 values are no multiple of 32 (q4_0)" in message
    assert "up_proj" not in message
    fitting = [grid.name for grid in GRIDS.values() if 80 % grid.block == 0]
    assert (f"grids that fit: {', '.join(fitting)}" if fitting else "no grid fits this width") in message


def test_a_long_list_of_misfits_is_cut(tiny_model: ModelMaker) -> None:
    model = tiny_model(hidden_size=72, num_attention_heads=4, head_dim=24)
    with pytest.raises(UserError) as caught:
        make_plan(model, 4)
    assert len(str(caught.value).splitlines()) == 6


def test_find_misfits() -> None:
    plan = {"a": "q4_0", "b": KEEP, "c": "q8_0"}
    assert find_misfits(plan, {"a": 64, "b": 7, "c": 96}) == []
    (misfit,) = find_misfits(plan, {"a": 64, "b": 7, "c": 33})
    assert misfit == Misfit("c", 33, "q8_0", tuple(grid.name for grid in GRIDS.values() if 33 % grid.block == 0))


def test_no_such_width(tiny_model: ModelMaker) -> None:
    with pytest.raises(UserError, match="--bits takes 4 or 8"):
        make_plan(tiny_model(), 5)
