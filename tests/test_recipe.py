"""Recipes: a name, some overrides, JSON in and out, and an error for every value that cannot be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qad import recipes
from qad.errors import UserError
from qad.grid import grid_for_bits
from qad.prepare import prepare_folder
from qad.recipe import RECIPE_FILE, Recipe, load_recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_its_json(name: str, tmp_path: Path) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe.steps > 0
    grid_for_bits(recipe.bits)
    recipe.save(tmp_path)
    assert load_recipe(tmp_path) == recipe
    assert json.loads((tmp_path / RECIPE_FILE).read_text()) == recipe.to_dict()


def test_every_field_survives_its_json(tmp_path: Path) -> None:
    recipe = Recipe(
        data=("a.jsonl", "b.parquet"),
        steps=7,
        lr=0.1,
        kl="jsd",
        jsd_beta=0.25,
        noise="uniform",
        tensorboard=True,
        seed=9,
        grid="q8_0",
        rules=(("*.v_proj.*", "q8_0"), ("*", "keep")),
        formats=("gguf", "onnx"),
        tasks=("gcd@1", "chain_sum"),
    )
    recipe.save(tmp_path)
    assert load_recipe(tmp_path) == recipe
    assert isinstance(load_recipe(tmp_path).data, tuple)
    older = {key: value for key, value in recipe.to_dict().items() if key not in ("grid", "rules", "formats")}
    (tmp_path / RECIPE_FILE).write_text(json.dumps(older))
    assert load_recipe(tmp_path) == dataclasses.replace(recipe, grid="", rules=(), formats=("gguf",))


def test_a_run_begins_in_a_folder_that_a_file_manager_has_shown(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    assert not prepare_folder(Recipe(), tmp_path, resume=False)
    (tmp_path / RECIPE_FILE).unlink()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no run"):
        prepare_folder(Recipe(), tmp_path, resume=False)


def test_labels_of_plans() -> None:
    assert Recipe().plan_label == "4 bits"
    assert Recipe(bits=8).plan_label == "8 bits"
    assert Recipe(grid="int4_g64").plan_label == "int4_g64"
    assert Recipe(plan="q4_k_m").plan_label == "q4_k_m"
    assert Recipe(budget=4.5).plan_label == "at most 4.5 bits per weight"
    assert Recipe(rules=(("*", "q8_0"),)).plan_label == "a plan over 4 bits"


def test_the_folder_is_the_registry() -> None:
    assert {"quick", "reasoning", "thorough"} <= set(recipes.names())
    with pytest.raises(UserError, match=f"unknown recipe 'slow'; known: {', '.join(recipes.names())}"):
        recipes.get("slow")


def test_overrides() -> None:
    recipe = Recipe(batch_size=8, micro_batch=4)
    assert recipe.override() == recipe
    assert recipe.override(steps=None, lr=None) == recipe
    assert recipe.override(steps=0, lr=0.5) == dataclasses.replace(recipe, steps=0, lr=0.5)
    assert recipe.override(gradient_checkpointing=True).gradient_checkpointing


@pytest.mark.parametrize("choice", [{"grid": "q8_0"}, {"plan": "q6_k"}, {"budget": 5.5}], ids=str)
def test_what_says_the_grids_is_given_once(choice: dict[str, Any]) -> None:
    (name,) = choice
    for bits in (4, 8):
        with pytest.raises(UserError, match=rf"--bits and --{name} each say which tensor gets which grid"):
            Recipe().override(bits=bits, **choice)
    # In place of the recipe's own.
    assert Recipe(bits=8).override(**choice) == dataclasses.replace(Recipe(), **choice)
    assert dataclasses.replace(Recipe(), **choice).override(bits=4) == Recipe()
    rules = (("*", "q8_0"),)
    other = Recipe(rules=rules).override(**choice)
    assert other.rules == (rules if name == "grid" else ())
    again = dataclasses.replace(Recipe(), **choice).override(rules=rules)
    assert again == (Recipe(rules=rules, **choice) if name == "grid" else Recipe(rules=rules))
    assert dataclasses.replace(Recipe(), **choice).override(steps=3) == dataclasses.replace(Recipe(steps=3), **choice)


@pytest.mark.parametrize(("batch", "micro"), [(8, 4), (6, 3), (7, 1), (2, 2), (1, 1), (12, 4)])
def test_a_new_batch_size_brings_a_micro_batch_that_divides_it(batch: int, micro: int) -> None:
    recipe = Recipe(batch_size=8, micro_batch=4).override(batch_size=batch)
    assert (recipe.batch_size, recipe.micro_batch) == (batch, micro)


def test_the_student_is_the_teacher_unless_named() -> None:
    assert Recipe(teacher="t").student_source == "t"
    assert Recipe(teacher="t", student="s").student_source == "s"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "q9"}, "unknown grid 'q9'; known: .*q4_0"),
        ({"plan": "q4_k_x"}, "unknown plan 'q4_k_x'; known: .*q4_k_m"),
        ({"rules": (("*", "q9"),)}, r"the pattern '\*' has the grid 'q9'"),
        ({"budget": -1.0}, "budget must be a number from 0 on"),
        ({"budget": NAN}, "budget must be a number from 0 on"),
        ({"budget": 5.0, "bits": 8}, "--bits and --budget each say"),
        ({"grid": "q4_0", "plan": "q6_k"}, "--grid and --plan each say"),
        ({"budget": 5.0, "rules": (("*", "q4_0"),)}, "a plan of rules goes with --bits or --grid"),
        ({"bits": 5}, "no portable 5-bit grid; --bits takes 4 or 8"),
        ({"init": "awq"}, "unknown init mode 'awq'; known: gptq, mse, rtn"),
        ({"scales": "max"}, "unknown scale mode 'max'; known: absmax, learned, mse"),
        ({"noise": "pink"}, "unknown noise mode 'pink'; known: none, partial, stochastic, uniform"),
        ({"kl": "both"}, "unknown divergence 'both'; known: forward, jsd, reverse"),
        ({"lr_unit": "meter"}, "unknown unit of the learning rate 'meter'; known: grid, weight"),
        ({"kl_weight": -1.0}, "kl_weight must be a number from 0 on"),
        ({"kl_weight": 0.0}, "kl_weight 0 leaves nothing to minimize: give --next-token-weight"),
        ({"kl_weight": 0.0, "next_token_weight": 1.0, "cache_top_k": 8}, "no teacher is run: leave --cache-top-k out"),
        ({"task_rows": 0}, "task_rows must be at least 1"),
        ({"loss_on": "prompt"}, "unknown choice for --loss-on 'prompt'; known: all, completion"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"micro_batch": 3}, "micro_batch 3 does not divide batch_size 4"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"steps": -1}, "steps must be a number from 0 on"),
        ({"lr": -0.1}, "lr must be a number from 0 on"),
        ({"lr": NAN}, "lr must be a number from 0 on, not nan"),
        ({"lr": INF}, "lr must be a number from 0 on, not inf"),
        ({"next_token_weight": -1.0}, "next_token_weight must be a number from 0 on"),
        ({"noise_until": 1.5}, "noise_until is a share of the steps"),
        ({"warmup": NAN}, "warmup is a share of the steps"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"jsd_beta": 1.0}, "beta must lie between 0 and 1"),
        ({"seed": -1}, "seed must lie between 0 and 4294967295, not -1"),
        ({"seed": 1 << 32}, "seed must lie between"),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b'{"steps": "many"}', b"\xff\xfe"])
def test_a_damaged_recipe_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECIPE_FILE).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a recipe.*-o"):
        load_recipe(tmp_path)


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a recipe"):
        load_recipe(tmp_path)


def test_a_recipe_of_a_newer_version_is_an_error(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(json.dumps(Recipe().to_dict() | {"sparkle": 1}))
    with pytest.raises(UserError, match="names options this version does not know: sparkle"):
        load_recipe(tmp_path)
