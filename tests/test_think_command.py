"""``qad think``: presets, what it prints and writes, and bad input."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qad.cli import main
from qad.errors import UserError
from qad.final_answer import extract
from qad.model import resolve_source
from qad.runtimes import Sampling, llamacpp
from qad.think import ThinkOptions
from qad.think.command import think_command
from qad.think.options import PRESETS, preset_for
from tests.helpers_runtimes import needs
from tests.helpers_server import interrupting
from tests.helpers_think import SUM

# --- presets


def test_presets_go_by_parameters(random_run: Path) -> None:
    assert preset_for(random_run)[0] == "tiny"
    assert "M parameters" in preset_for(random_run)[1]
    assert preset_for("http://nowhere:1/v1") == ("tiny", "the number of its parameters is not known")
    assert PRESETS["tiny"].temperature <= 0.6
    assert PRESETS["large"] == Sampling(temperature=1.0, top_p=0.95, top_k=10)


def test_the_preset_of_a_model_of_seven_billions(tmp_path: Path) -> None:
    # Headers are all that is read: a folder in the sizes of a 7B model, whose weights are a hole in the file.
    config = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)}
    for layer in range(28):
        for name, shape in (("gate", (18944, 3584)), ("up", (18944, 3584)), ("down", (3584, 18944))):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
    at, header = 0, {}
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + 2 * rows * columns]}
        at += 2 * rows * columns
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    name, why = preset_for(tmp_path)
    assert name == "large", why


# --- the verb


def command(
    source: Path | str, question: str = SUM, output: Path | None = None, threads: int | None = 1, **changes: object
) -> int:
    options: dict[str, object] = {"k": 4, "new_tokens": 24, **changes}
    return think_command(
        str(source),
        question,
        options=ThinkOptions(**options),  # type: ignore[arg-type]
        sampling={"temperature": 0.7, "seed": 1},
        preset=None,
        kind="math",
        threads=threads,
        gpu=False,
        kv_type="f16",
        json_file=output,
        command="qad think",
    )


@needs("llamacpp")
def test_the_verb(smollm: llamacpp.LlamaSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(resolve_source("smollm2"))
    assert command(path, output=tmp_path / "out.json", method="vote", certainty=None) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    out, err = capsys.readouterr()
    assert out == told["text"] + "\n"
    assert "preset tiny (134M parameters)" in err.replace("135M", "134M")
    for row in told["trajectories"]:
        assert f"trajectory {row['index'] + 1}: {row['n_tokens']} tokens" in err
        assert row["mean_logprob"] <= 0
        assert row["lowest_window_logprob"] <= row["mean_logprob"] + 1e-9
        assert row["answer"] == extract(row["text"], "math", marked=row["reason"] != "stop")
    assert "4 of 4 trajectories ended" in err
    assert f"{told['tokens']} tokens" in err
    assert told["options"]["sampling"] == {
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 0,
        "seed": 1,
        "min_p": 0.0,
        "first": 0,
    }
    assert told["vote"]["answer"] == told["answer"]
    # The same seed, the same text.
    session_text = smollm.sample(
        smollm.chat_prompt(SUM), 1, Sampling(temperature=0.7, top_p=0.95, seed=1), new_tokens=24
    )[0].text
    assert told["trajectories"][0]["text"] == session_text


def test_bad_input_is_told(random_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="gone.gguf is missing"):
        command(tmp_path / "gone.gguf")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="deep is no folder: make it"):
        command(random_run, output=tmp_path / "deep" / "out.json")
    with pytest.raises(UserError, match="question is empty"):
        command(random_run, "  ")
    with pytest.raises(UserError, match="not UTF-8"):
        command(random_run, "\udce4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--k", "0"], "--k"),
        (["--method", "votes"], "did you mean vote"),
        (["--kind", "maths"], "did you mean math"),
        (["--preset", "huge"], "known: large, tiny"),
        (["--drop"], "exact"),
        (["--full", "--confidence", "0.9"], "--full stops nothing early"),
        (["--full", "--confidence", "1"], "--full stops nothing early"),
        (["--method", "vote", "--summary-k", "2"], "the method vote deliberates on nothing"),
        (["--method", "best", "--iterations", "2"], "the method best deliberates on nothing"),
        (["--temperature", "0"], "all the same"),
    ],
)
def test_impossible_flags_are_told(
    random_run: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["qad", "think", str(random_run), "Hi?", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@needs("remote")
def test_an_interrupt_while_the_model_loads_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with interrupting() as url:
        try:
            status = command(url, output=tmp_path / "out.json", threads=None)
        except KeyboardInterrupt:
            pytest.fail("the interrupt went through")
    assert status == 130
    _, err = capsys.readouterr()
    assert "interrupted: none of 4 trajectories had begun, so there is no answer" in err
    assert "out.json was not written" in err
    assert list(tmp_path.iterdir()) == []


@needs("llamacpp")
def test_ctrl_c(random_run: Path) -> None:
    # Two of eight have ended when the signal comes: they are voted on, and it is said. The others would take seconds.
    arguments = [
        "think",
        str(random_run / "model.gguf"),
        "Hi?",
        "--kind",
        "text",
        "--k",
        "8",
        "--method",
        "vote",
        "--full",
    ]
    arguments += ["--temperature", "2", "--top-p", "1", "--new-tokens", "1900", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "qad.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    guard = threading.Timer(180, process.kill)
    guard.start()
    told, ended = "", 0
    for line in process.stderr:
        told += line
        ended += "done" in line
        if ended == 2:
            os.killpg(process.pid, signal.SIGINT)
            break
    out, rest = process.communicate()
    guard.cancel()
    assert process.returncode == 130, told + rest
    assert "interrupted:" in rest
    assert "of 8 trajectories had ended" in rest
    assert "what follows is a partial vote, of these alone" in rest
    assert "votes (partial)" in rest
    assert "nothing is kept: --json FILE does that" in rest
    assert out.strip()
    assert "Traceback" not in rest
