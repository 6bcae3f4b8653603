"""Plans: every parameter has its place, a tied head has none of its own, and what does not fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from qad.errors import UserError
from qad.grid import GRIDS
from qad.plan import (
    EMBEDDING_GRID,
    KEEP,
    Misfit,
    find_misfits,
    is_tied,
    make_plan,
    model_weights,
    plan_of_grid,
    read_rules,
    stored_bytes,
)

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
    fitting = [grid.name for grid in GRIDS.values() if 80 % grid.unit == 0]
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
    assert misfit == Misfit("c", 33, "q8_0", tuple(grid.name for grid in GRIDS.values() if 33 % grid.unit == 0))


def test_no_such_width(tiny_model: ModelMaker) -> None:
    with pytest.raises(UserError, match="--bits takes 4 or 8"):
        make_plan(tiny_model(), 5)


# ---------------------------------------------------------------------------------------------------- rules


def test_the_first_rule_that_matches_counts(tiny_model: ModelMaker) -> None:
    rules = (
        ("model.layers.1.self_attn.v_proj.weight", "q8_0"),
        ("*.v_proj.*", KEEP),
        ("*.layers.[0-9].mlp.*", "q8_0"),
        ("*.down_proj.*", "q4_0"),
    )
    plan, notes = plan_of_grid(tiny_model(), "q4_0", rules)
    assert notes == []
    assert plan["model.layers.1.self_attn.v_proj.weight"] == "q8_0"
    assert plan["model.layers.0.self_attn.v_proj.weight"] == KEEP
    assert plan["model.layers.0.mlp.down_proj.weight"] == "q8_0"
    assert plan["model.layers.0.self_attn.q_proj.weight"] == "q4_0"
    assert plan["model.embed_tokens.weight"] == EMBEDDING_GRID
    assert plan["model.norm.weight"] == KEEP


def test_a_rule_reaches_the_embedding_and_no_norm(tiny_model: ModelMaker) -> None:
    model = tiny_model("qwen2")
    plan, _ = plan_of_grid(model, "q8_0", (("*", "q4_0"),))
    weights = model_weights(model)
    assert {name for name, grid in plan.items() if grid == "q4_0"} == {n for n, w in weights.items() if w is not None}
    assert {name for name, grid in plan.items() if grid == KEEP} == {n for n, w in weights.items() if w is None}


@pytest.mark.parametrize(("grid", "ends"), [("q4_0", EMBEDDING_GRID), ("int4_g64", EMBEDDING_GRID), ("q8_0", "q8_0")])
def test_a_grid_of_the_linear_layers(tiny_model: ModelMaker, grid: str, ends: str) -> None:
    plan, _ = plan_of_grid(tiny_model(intermediate_size=128, tie_word_embeddings=False), grid)
    assert plan["model.embed_tokens.weight"] == plan["lm_head.weight"] == ends
    assert {planned for name, planned in plan.items() if "_proj" in name} == {grid}


@pytest.mark.parametrize(
    "rule", [("*.v_porj.*", "q8_0"), ("model.norm.weight", "q8_0"), ("lm_head.weight", "q8_0")], ids=lambda r: r[0]
)
def test_a_rule_that_matches_nothing_is_named(tiny_model: ModelMaker, rule: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="matches no weight of this model that can be quantized") as caught:
        plan_of_grid(tiny_model(), "q4_0", (("*.q_proj.*", "q8_0"), rule))
    assert repr(rule[0]) in str(caught.value)
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value)


def test_a_rule_that_keeps_a_norm_is_no_mistake(tiny_model: ModelMaker) -> None:
    """Else the plan that a run has saved could not be used again."""
    model = tiny_model("qwen2")
    plan = make_plan(model, 4)
    assert plan_of_grid(model, "q8_0", tuple(plan.items())) == (plan, [])


def test_a_plan_that_keeps_everything(tiny_model: ModelMaker) -> None:
    with pytest.raises(UserError, match="nothing is left to quantize"):
        plan_of_grid(tiny_model(), "q4_0", (("*", KEEP),))


def test_a_rule_with_a_grid_that_does_not_fit_names_the_tensor(tiny_model: ModelMaker) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: rows of 96 .* 64 \(int4_g64\)"):
        plan_of_grid(tiny_model(), "q4_0", (("*.0.*.down_proj.*", "int4_g64"),))


def test_stored_bytes(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    plan, _ = plan_of_grid(model, "q4_0", (("*.v_proj.*", KEEP),))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    by_hand = sum(sizes[name] * {"q4_0": 18 / 32, "q8_0": 34 / 32, KEEP: 4}[grid] for name, grid in plan.items())
    assert stored_bytes(model, plan) == by_hand


def test_rules_from_a_file_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"b": "q8_0", "a": KEEP, "*": "q4_0"}))
    assert read_rules(file) == (("b", "q8_0"), ("a", KEEP), ("*", "q4_0"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object of patterns and grids"),
        ("{}", "no JSON object of patterns and grids"),
        ('["q4_0"]', "no JSON object of patterns and grids"),
        ('{"*": 4}', r"the pattern '\*' has no grid's name beside it but 4"),
        ('{"*.v_proj.*": "q9_9"}', r"the pattern '\*\.v_proj\.\*' has the grid 'q9_9'; known: .*keep.*q4_0"),
        ('{"a": "q4_0", "a": "q8_0"}', "the pattern 'a' stands there twice"),
    ],
)
def test_files_that_are_no_rules(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rules(file)
    assert str(file) in str(caught.value)
