"""The command line: what bad input says, what it leaves alone, and what the help mentions."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from qad import cli, distill, recipes
from qad.artifact import open_artifact
from qad.recipe import Recipe, load_recipe
from tests.helpers_commands import interrupted
from tests.helpers_models import make_artifact, make_tokenizer
from tests.helpers_rows import write_rows
from tests.helpers_runs import save_model, save_text, tiny


@dataclass(frozen=True)
class Result:
    """What a call of ``qad`` left."""

    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Iterator[None]:
    """Switch off what ``qad.cli`` switches off by the environment before it loads a library: here they are loaded."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def qad(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Return a function that calls the command line in this process, as a shell would."""

    def call(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["qad", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return Result(int(code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny teacher and ``text.jsonl``; not to be changed."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "teacher")
    save_text(folder / "text.jsonl")
    return folder


def options(model: Path, **changes: Any) -> list[str]:
    """Return flags of a tiny run."""
    chosen: dict[str, Any] = {
        "teacher": model / "teacher",
        "data": model / "text.jsonl",
        "steps": 2,
        "batch-size": 2,
        "seq-len": 32,
        "init": "rtn",
        **changes,
    }
    return [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]


def check_error(result: Result, message: str) -> None:
    """Check exit code 2 and that standard error is one message, without a traceback or a library's noise."""
    assert result.code == 2, result
    assert re.search(message, result.err), result.err
    assert result.err.startswith("error: "), result.err
    assert result.err.count("error:") == 1, result.err
    assert "Traceback" not in result.err + result.out
    assert len(result.err.strip().splitlines()) <= 6, result.err


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------------- help

FLAGS = (
    "bits teacher student data recipe steps batch-size seq-len lr noise init scales kl seed resume output "
    "next-token-weight temperature loss-on cache-top-k eval-every save-every gradient-checkpointing tensorboard "
    "grid plan budget formats tasks task-rows kl-weight lr-unit packed"
)


def test_help_of_train_mentions_every_flag(qad: Call) -> None:
    result = qad("train", "--help")
    assert result.code == 0
    for flag in FLAGS.split():
        assert f"--{flag}" in result.out, flag
    for name in recipes.names():
        assert name in result.out
    assert "-o" in result.out


def test_help_of_train_shows_the_defaults_of_the_recipe() -> None:
    command = typer.main.get_command(cli.app)
    options = {option.name: option for option in command.commands["train"].params}  # type: ignore[attr-defined]
    shown = {name: getattr(option, "show_default", None) for name, option in options.items()}
    numbers = {field.name for field in fields(Recipe)} - {"name", "teacher", "student", "data"}
    numbers -= {"grid", "plan", "budget", "formats"}  # in place of bits
    numbers -= {"tasks"}  # none
    for name in numbers & set(shown):
        if not isinstance(getattr(Recipe(), name), bool):
            assert shown[name] == str(getattr(Recipe(), name)), name


def test_help_mentions_every_verb(qad: Call) -> None:
    result = qad("--help")
    assert result.code == 0
    for verb in ("train", "quantize", "export", "verify", "run", "doctor"):
        assert re.search(rf"\b{verb}\b", result.out), verb
        assert qad(verb, "--help").code == 0


def test_every_argument_and_option_says_what_it_is_in_a_sentence() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert len(commands) > 8
    for name, command in commands.items():
        for parameter in command.params:
            told = getattr(parameter, "help", None)
            assert told, (name, parameter.name)
            assert told.endswith("."), (name, parameter.name, told)


def test_help_loads_no_heavy_library() -> None:
    code = "import sys; import qad.cli; print({'torch', 'transformers', 'trl', 'gguf', 'numpy'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--stepz", "3"],
        ["train", "--steps", "many"],
        ["trian"],
        ["export"],
        ["train", "--steps", "-1"],
        [],
        ["bench", "x.gguf", "--threads", "513"],
        ["think", "x.gguf", "hi", "--threads", "0"],
    ],
    ids=" ".join,
)
def test_typing_errors(qad: Call, arguments: list[str]) -> None:
    result = qad(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    if "--stepz" in arguments:
        assert "--steps" in result.err  # suggests what was meant


# ---------------------------------------------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("recipe", "slow", "unknown recipe 'slow'; known: quick, reasoning, thorough"),
        ("bits", "5", "no portable 5-bit grid; --bits takes 4 or 8"),
        ("grid", "q9", "unknown grid 'q9'; known: .*q4_0"),
        ("plan", "q4_k_x", "unknown plan 'q4_k_x'; known: a JSON file, .*q4_k_m"),
        ("plan", "nowhere.json", r"the plan nowhere\.json does not exist"),
        ("noise", "pink", "unknown noise mode 'pink'; known: none, partial, stochastic, uniform"),
        ("init", "awq", "unknown init mode 'awq'; known: gptq, mse, rtn"),
        ("scales", "max", "unknown scale mode 'max'; known: absmax, learned, mse"),
        ("kl", "both", "unknown divergence 'both'; known: forward, jsd, reverse"),
        ("loss-on", "prompt", "unknown choice for --loss-on 'prompt'; known: all, completion"),
        ("lr", "nan", "lr must be a number"),
        ("seed", "-1", "seed must lie between"),
        ("temperature", "0", "temperature must be a positive number"),
    ],
)
def test_unknown_names_list_the_known(
    qad: Call, tmp_path: Path, model: Path, flag: str, value: str, message: str
) -> None:
    result = qad("train", *options(model, **{flag: value}), "-o", tmp_path / "run")
    check_error(result, message)
    assert not (tmp_path / "run").exists()


def test_an_unknown_format(qad: Call, tmp_path: Path) -> None:
    make_artifact(tmp_path, "llama-tied")
    check_error(qad("export", tmp_path, "--format", "gguff"), "unknown format 'gguff'; known: .*gguf")


# ---------------------------------------------------------------------------------------------------- the run folder


def test_a_folder_that_holds_another_run(qad: Call, tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    assert qad("train", *options(model, steps=1), "-o", run).code == 0
    before = tree(run)
    check_error(qad("train", *options(model, steps=1), "-o", run), "holds another run: continue it with --resume")
    check_error(
        qad("train", *options(model), "-o", run, "--resume", "--steps", "5"), r"another recipe \(steps 1 -> 5\)"
    )
    check_error(qad("train", "-o", run, "--resume", "--recipe", "thorough"), r"\(name 'quick' -> 'thorough'\)")
    assert tree(run) == before
    finished = qad("train", "-o", run, "--resume")
    assert finished.code == 0
    assert "is finished" in finished.out
    assert tree(run) == before


def test_nothing_to_resume(qad: Call, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typo = tmp_path / "rnu"
    check_error(qad("train", "--resume", "-o", typo), r"rnu holds no run to continue: check -o, or give the options")
    assert not typo.exists()
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(distill, "distill", lambda recipe, *_, **__: started.append(recipe) or sys.exit(0))
        for option in (("--bits", "4"), ("--recipe", "quick"), ("--seed", "0")):  # defaults, but given
            assert qad("train", *option, "--resume", "-o", typo).code == 0
    assert started == [Recipe()] * 3
    assert qad("train", *options(model), "--steps", "1", "--resume", "-o", tmp_path / "run").code == 0


def test_a_text_that_is_a_folder(qad: Call, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "run", "llama-tied")
    assert qad("export", tmp_path / "run", "-o", tmp_path / "x.gguf").code == 0
    result = qad("verify", tmp_path / "run", tmp_path / "x.gguf", "--text", artifact.folder)
    check_error(result, r"artifact is a folder: give a text file with --text")


def test_standard_output_on_a_full_disk() -> None:
    done = subprocess.run(
        f"{sys.executable} -m qad.cli devices > /dev/full", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "disk is full while writing standard output" in done.stderr


def test_a_folder_that_is_not_empty(qad: Call, tmp_path: Path, model: Path) -> None:
    (tmp_path / "thesis.txt").write_text("final")
    check_error(qad("train", *options(model), "-o", tmp_path), "is not empty and holds no run")
    assert tree(tmp_path) == {"thesis.txt": b"final"}


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["", "resume"])
@pytest.mark.parametrize("place", ["thesis.txt", "thesis.txt/run"])
def test_an_output_that_is_or_lies_under_a_file(
    qad: Call, tmp_path: Path, model: Path, place: str, resume: tuple[str, ...]
) -> None:
    (tmp_path / "thesis.txt").write_text("final")
    check_error(qad("train", *options(model), "-o", tmp_path / place, *resume), "-o")
    assert tree(tmp_path) == {"thesis.txt": b"final"}


def test_a_damaged_recipe(qad: Call, tmp_path: Path, model: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    check_error(qad("train", *options(model), "-o", tmp_path, "--resume"), "cannot be read as a recipe")


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"rows": [{}]}'])
def test_a_damaged_result(qad: Call, tmp_path: Path, model: Path, content: str) -> None:
    assert qad("train", *options(model, steps=0), "-o", tmp_path).code == 0
    (tmp_path / "result.json").write_text(content)
    check_error(qad("train", "--resume", "-o", tmp_path), "result.json is damaged .*delete the file and train again")


def damage_missing(folder: Path) -> str:
    return str(folder / "nowhere.gguf")


def damage_truncated_gguf(folder: Path) -> str:
    from qad.export import get

    whole = folder / "whole.gguf"
    get("gguf").write(make_artifact(folder / "other", "llama-tied"), whole)
    cut = folder / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-20_000])
    return str(cut)


def damage_not_gguf(folder: Path) -> str:
    file = folder / "text.gguf"
    file.write_text("Dear diary")
    return str(file)


def damage_no_tokenizer(folder: Path) -> str:
    tiny().save_pretrained(folder / "bare")
    return str(folder / "bare")


def damage_nan(folder: Path) -> str:
    place = folder / "nan"
    save_model(place)
    file = place / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return str(place)


def damage_width(folder: Path) -> str:
    return save_model(folder / "narrow", hidden_size=48, head_dim=24, num_attention_heads=2)


def damage_architecture(folder: Path) -> str:
    place = folder / "other"
    save_model(place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    return str(place)


def damage_no_end(folder: Path) -> str:
    place = folder / "endless"
    save_model(place)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        settings.pop(name, None)
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(place)


def damage_weights(folder: Path) -> str:
    save_model(folder / "cut")
    os.truncate(folder / "cut" / "model.safetensors", 5000)
    return str(folder / "cut")


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"nowhere\.gguf"),
        (damage_truncated_gguf, r"cut\.gguf.*truncated"),
        (damage_not_gguf, r"text\.gguf"),
        (damage_no_tokenizer, "holds no tokenizer"),
        (damage_nan, r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"),
        (damage_architecture, "architecture 'gpt_neox'; supported are llama, qwen2, qwen3"),
        (damage_weights, "truncated or damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", "").removeprefix("damage_"),
)
def test_models_that_cannot_be_used(
    qad: Call, tmp_path: Path, model: Path, role: str, damage: Callable[[Path], str], message: str
) -> None:
    source = damage(tmp_path)
    check_error(qad("train", *options(model, **{role: source}), "-o", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_a_width_that_the_block_does_not_divide(qad: Call, tmp_path: Path, model: Path) -> None:
    result = qad("train", *options(model, teacher=damage_width(tmp_path)), "-o", tmp_path / "run")
    check_error(result, r"model\.embed_tokens\.weight: rows of 48 values are no multiple of 32 \(q8_0\); no grid fits")
    assert "model.layers.0.self_attn.q_proj.weight" in result.err
    assert not (tmp_path / "run").exists()


def test_different_tokenizers(qad: Call, tmp_path: Path, model: Path) -> None:
    student = save_model(tmp_path / "student", family="gpt2")
    check_error(
        qad("train", *options(model, student=student), "-o", tmp_path / "run"),
        "teacher and student must share one tokenizer",
    )
    assert not (tmp_path / "run").exists()


def test_a_sequence_longer_than_the_context(qad: Call, tmp_path: Path, model: Path) -> None:
    result = qad("train", *options(model, **{"seq-len": 513}), "-o", tmp_path / "run")
    check_error(result, "seq_len 513 exceeds the 512 tokens")


# ---------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b'{"text": " "}\n{"text": ""}\n', "is empty"),
        (
            "columns.jsonl",
            b'{"question": "?", "answer": "!"}\n',
            "wrong columns: found question, answer; expected `text`",
        ),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": "fi\n', "line 2: invalid JSON"),
        ("numbers.jsonl", b'{"text": 3}\n', "`text` is int"),
        ("one.jsonl", b'{"text": "only one row"}\n', "fewer than two different rows"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8"),
        ("cut.parquet", b"PAR1....", "truncated or not a Parquet file"),
        ("text.txt", b"just text", "unknown format"),
        (None, b"", "does not exist"),
    ],
)
def test_data_that_cannot_be_used(
    qad: Call, tmp_path: Path, model: Path, name: str | None, content: bytes, message: str
) -> None:
    file = tmp_path / (name or "nowhere.jsonl")
    if name:
        file.write_bytes(content)
    check_error(qad("train", *options(model, data=file), "-o", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_conversations_without_a_chat_template(qad: Call, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer("smollm")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.chat_template = template
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(8)]
    write_rows(tmp_path / "chat.jsonl", rows)
    flags = options(tmp_path, teacher=tmp_path / "base", data=tmp_path / "chat.jsonl")
    check_error(qad("train", *flags, "-o", tmp_path / "run"), "no chat template")


def test_the_corrected_command_runs_in_the_same_folder(qad: Call, tmp_path: Path, model: Path) -> None:
    """A mistake leaves no half-made run in the way."""
    run = tmp_path / "run"
    check_error(qad("train", *options(model, data=tmp_path / "nowhere.jsonl"), "-o", run), "does not exist")
    assert qad("train", *options(model, steps=1), "-o", run).code == 0
    run.joinpath("artifact", "artifact.json").stat()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert qad("train", *options(model, steps=0), "-o", empty).code == 0


def test_a_teacher_without_an_end_of_text(qad: Call, tmp_path: Path, model: Path) -> None:
    result = qad("train", *options(model, teacher=damage_no_end(tmp_path)), "-o", tmp_path / "run")
    check_error(result, "names no end-of-text token.*set eos_token")
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(
    qad: Call, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "tensorb" in name else find(name, *rest)
    )
    result = qad("train", *options(model), "--tensorboard", "-o", tmp_path / "run")
    check_error(result, r"pip install 'qad\[tensorboard\]'")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- a full disk


def test_a_disk_that_fills_up_while_training(qad: Call, small_disk: Path, model: Path) -> None:
    """The artifact fits, the first checkpoint does not. With more room the run continues."""
    run = small_disk / "run"
    flags = options(model, steps=4, **{"save-every": 2})
    check_error(
        qad("train", *flags, "-o", run), r"the disk is full while writing .*checkpoint-2; what was there before"
    )
    assert open_artifact(run).run_hash
    assert not list((run / "checkpoints").glob("checkpoint-*"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert qad("train", "--resume", "-o", run).code == 0
    assert (run / "result.json").is_file()


@pytest.mark.parametrize("free", [0, 4096, 60_000])
def test_a_full_disk_from_the_start(qad: Call, small_disk: Path, model: Path, free: int) -> None:
    (small_disk / "filler").write_bytes(bytes(512 * 1024 - free))
    run = small_disk / "run"
    check_error(qad("train", *options(model), "-o", run), "the disk is full while writing")
    assert not (run / "artifact").exists()


def test_a_full_disk_while_exporting(qad: Call, small_disk: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    assert artifact.weights_file.stat().st_size > 200_000
    target = small_disk / "student.gguf"
    assert qad("export", tmp_path, "-o", target).code == 0
    before = target.read_bytes()
    (small_disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 100_000)))
    check_error(qad("export", tmp_path, "-o", target), "the disk is full while writing .*student.gguf")
    assert target.read_bytes() == before
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "student.gguf"]


# ---------------------------------------------------------------------------------------------------- export, run


def test_export_and_what_it_says(qad: Call, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    result = qad("export", tmp_path)
    assert result.code == 0
    assert (tmp_path / "student.gguf").is_file()
    assert artifact.run_hash[:12] in result.out
    assert result.err == ""


def test_export_to_where_nothing_can_be_written(qad: Call, tmp_path: Path) -> None:
    make_artifact(tmp_path / "run", "llama-tied")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    check_error(qad("export", tmp_path / "run", "-o", tmp_path / "folder.gguf"), "is a folder: name a file with -o")
    check_error(qad("export", tmp_path / "run", "-o", tmp_path / "file" / "x.gguf"), "-o")
    check_error(qad("export", tmp_path / "run", "-o", tmp_path / ("x" * 300 + ".gguf")), "too long a name")


def test_export_of_nothing(qad: Call, tmp_path: Path) -> None:
    check_error(qad("export", tmp_path / "nowhere", "-o", tmp_path / "x.gguf"), "no such run")
    (tmp_path / "recipe.json").write_text("{}")
    check_error(qad("export", tmp_path, "-o", tmp_path / "x.gguf"), "unfinished: continue it with --resume")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("name", ["artifact.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}"])
def test_an_artifact_whose_json_is_something_else(qad: Call, tmp_path: Path, name: str, content: str) -> None:
    make_artifact(tmp_path, "llama-tied")
    (tmp_path / "artifact" / name).write_text(content)
    result = qad("export", tmp_path, "-o", tmp_path / "x.gguf")
    assert result.code == 2
    check_error(result, "")


def test_the_hash_of_a_run_covers_every_file(tmp_path: Path) -> None:
    """Two runs that differ in the tokenizer or the configuration alone are two runs."""
    hashes = {
        make_artifact(tmp_path / "a", "llama-tied").run_hash,
        make_artifact(tmp_path / "b", "llama-tied").run_hash,
    }
    assert len(hashes) == 1
    hashes.add(make_artifact(tmp_path / "c", "llama-tied", rms_norm_eps=1e-5).run_hash)
    assert len(hashes) == 2
    tokenizer = make_tokenizer("smollm")
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0].content }}"
    try:
        hashes.add(make_artifact(tmp_path / "d", "llama-tied").run_hash)
    finally:
        tokenizer.chat_template = template
    assert len(hashes) == 3


@pytest.mark.parametrize("place", ["nowhere.gguf", "folder", "text.gguf"])
def test_running_something_that_cannot_be_run(qad: Call, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.gguf").write_text("Dear diary")
    check_error(qad("run", tmp_path / place, "hello"), place)


def test_a_prompt_that_is_no_text(qad: Call, tmp_path: Path) -> None:
    run = make_artifact(tmp_path, "llama-tied").folder.parent
    check_error(qad("run", run, b"caf\xe9".decode(errors="surrogateescape")), "the prompt is not UTF-8")


def test_verifying_what_is_not_there(qad: Call, tmp_path: Path) -> None:
    make_artifact(tmp_path, "llama-tied")
    check_error(qad("verify", tmp_path, tmp_path / "nowhere.gguf"), "nowhere")
    check_error(qad("verify", tmp_path / "nowhere", tmp_path / "x.gguf"), "no such run")


# ---------------------------------------------------------------------------------------------------- output


def test_what_a_run_prints(qad: Call, tmp_path: Path, model: Path) -> None:
    result = qad("train", *options(model, steps=2), "-o", tmp_path / "run")
    assert result.code == 0
    assert result.err == ""  # no library's progress bars or warnings
    for wanted in (
        "teacher",
        "rounded to 4 bits",
        "trained on the grid",
        "KL",
        "perplexity",
        "same top-1",
        "artifact:",
    ):
        assert wanted in result.out
    assert f"qad export {tmp_path / 'run'} --format gguf" in result.out.replace("\n", "")
    assert load_recipe(tmp_path / "run").steps == 2
    log = (tmp_path / "run" / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if "loss" in json.loads(line)] == [1, 2]


def test_quantize_and_what_it_prints(qad: Call, tmp_path: Path, model: Path) -> None:
    """From rules in a file to an exported and verified file; the plan it saves is one for training."""
    (tmp_path / "rules.json").write_text('{"*.v_proj.*": "q8_0", "*": "q4_0"}')
    run = tmp_path / "run"
    flags = ("--data", model / "text.jsonl", "--seq-len", "32", "--init", "mse")
    result = qad("quantize", model / "teacher", *flags, "--plan", tmp_path / "rules.json", "-o", run)
    assert result.code == 0, result
    assert result.err == ""
    for wanted in ("plan: 13 q4_0, 2 q8_0;", "teacher", "a plan over 4 bits (mse)", "KL", f"--plan {run}/plan.json"):
        assert wanted in result.out, wanted
    assert qad("export", run).code == 0
    arguments = (run, run / "student.gguf", "--no-runtime", "--json", tmp_path / "proof.json")
    verified = qad("verify", *arguments)
    told = json.loads((tmp_path / "proof.json").read_text())["command"]
    assert told.split() == ["qad", "verify", *map(str, arguments)]
    assert (verified.code, "15 of 15" in verified.out) == (0, True)
    check_error(qad("quantize", model / "teacher", *flags, "-o", run), "holds another run")
    trained = qad("train", *options(model, steps=1), "--plan", run / "plan.json", "-o", tmp_path / "trained")
    assert trained.code == 0
    assert open_artifact(tmp_path / "trained").grids == open_artifact(run).grids
    check_error(qad("quantize", model / "teacher", "--resume", "-o", tmp_path / "trained"), "is a run of `qad train`")


def test_training_under_a_budget_resumes_with_its_plan(qad: Call, tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    flags = options(model, steps=1, budget=6.0, init="mse")
    assert "expected KL" in qad("train", *flags, "-o", run).out
    plan = json.loads((run / "plan.json").read_text())
    assert open_artifact(run).grids == {name: grid for name, grid in plan.items() if grid != "keep"}
    assert len(set(open_artifact(run).grids.values())) > 1
    # Without its result the run is unfinished. Its plan is read, not measured: another one would come out the same.
    (run / "result.json").unlink()
    swapped = {name: {"q4_0": "q8_0", "keep": "keep"}.get(grid, "q4_0") for name, grid in plan.items()}
    (run / "plan.json").write_text(json.dumps(swapped))
    again = qad("train", "--resume", "-o", run)
    assert (again.code, "expected KL" in again.out) == (0, False)
    assert open_artifact(run).grids == {name: grid for name, grid in swapped.items() if grid != "keep"}


def test_an_interrupt_says_how_to_continue(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    log = run / "run.jsonl"
    done = interrupted(
        *("train", *options(model, steps=5000), "-o", run),
        when=lambda: log.exists() and '"loss"' in log.read_text(),
    )
    assert done.returncode == 130
    assert f"interrupted; continue with: qad train --resume -o {run}" in done.stdout
    assert done.stderr == ""  # neither a traceback nor a library's bars and warnings
