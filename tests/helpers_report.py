"""Records of every kind, made by the commands that make them: tiny runs, exported, proved, timed and judged."""

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from typer.testing import CliRunner

from qad import export
from qad.artifact import open_artifact
from qad.bench import bench_command
from qad.cli import app
from qad.distill import distill
from qad.recipe import Recipe
from qad.verify_command import verify_command
from tests.helpers_rows import write_rows
from tests.helpers_runs import save_model, save_text

SCRIPT = Path(__file__).parent.parent / "bench" / "quality.py"
PROMPTS, NEW, KS = (24, 48), 4, (1, 2, 4)


@dataclass(frozen=True)
class Made:
    """Paths of records.

    Attributes:
        run, other: Run folders of 4 and of 8 bits.
        alone: Run folder of 4 bits without a teacher.
        bench, verify, quality, evaluation: JSON files; the proof is of one good and one bad file.
        bad: Name of the file that is not exact.
    """

    run: Path
    other: Path
    alone: Path
    bench: Path
    verify: Path
    quality: Path
    evaluation: Path
    bad: str

    @property
    def all(self) -> list[Path]:
        """All paths but that of the run without a teacher."""
        return [self.run, self.other, self.bench, self.verify, self.quality, self.evaluation]


def make_records(folder: Path) -> Made:
    """Make records, in some twenty seconds."""
    options: dict[str, Any] = {"batch_size": 4, "micro_batch": 2, "seq_len": 32, "lr": 0.02, "calibration_tokens": 256}
    recipe = Recipe(
        teacher=save_model(folder / "teacher"),
        data=(save_text(folder / "text.jsonl"),),
        steps=4,
        eval_every=2,
        **options,
    )
    run, other, alone = folder / "four", folder / "eight", folder / "alone"
    distill(recipe, run, resume=False, console=Console(quiet=True))
    distill(
        dataclasses.replace(recipe, bits=8, steps=2, eval_every=1), other, resume=False, console=Console(quiet=True)
    )
    untaught = dataclasses.replace(recipe, kl_weight=0.0, next_token_weight=1.0, steps=2, eval_every=1)
    distill(untaught, alone, resume=False, console=Console(quiet=True))
    four, eight = folder / "four.gguf", folder / "eight.gguf"
    export.get("gguf").write(open_artifact(run), four)
    export.get("gguf").write(open_artifact(other), eight)
    bad = folder / "flipped.gguf"
    content = bytearray(four.read_bytes())
    content[-1] ^= 0x10
    bad.write_bytes(content)
    made = Made(
        run,
        other,
        alone,
        folder / "bench.json",
        folder / "verify.json",
        folder / "quality.json",
        folder / "eval.json",
        bad.name,
    )
    assert verify_command(run, [four, bad], None, True, 1, made.verify, "qad verify four") == 1
    bench_command(
        [four, folder / "gone.gguf"],
        ks=",".join(map(str, KS)),
        prompt_tokens=",".join(map(str, PROMPTS)),
        new_tokens=NEW,
        threads=1,
        repeats=2,
        kv_type="f16",
        gpu=False,
        device="host",
        json_file=made.bench,
        command="qad bench four.gguf gone.gguf",
    )
    (folder / "words.txt").write_text(
        "The ledger says that seven baskets were sold, and three of them came back. " * 40
    )
    arguments = [str(eight), str(four), str(eight), "--text", str(folder / "words.txt"), "--json", str(made.quality)]
    _quality(
        [*arguments, "--rival", "q4_0", "--teacher-f32", "--chunks", "2", "--chunk-tokens", "128", "--threads", "1"]
    )
    _evaluate(folder, made.evaluation)
    return made


def _evaluate(folder: Path, output: Path) -> None:
    """Run ``qad eval`` on questions that random weights answer wrong, at such length that many answers end."""
    rows = [{"prompt": f"What is {n} + {n}?", "solution": str(2 * n), "level": n % 2, "task": "text"} for n in range(6)]
    write_rows(folder / "sums.jsonl", rows)
    arguments = ["eval", str(folder / "four.gguf"), "--reference", str(folder / "eight.gguf"), "--k", "2"]
    arguments += ["--trained", str(folder / "sums.jsonl"), "--new-tokens", "300", "--threads", "1"]
    arguments += ["--text", str(folder / "words.txt"), "--chunk-tokens", "64", "--chunks", "2"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(output), "-o", str(folder / "samples")])
    assert done.exit_code == 0, done.output


def _quality(arguments: list[str]) -> None:
    """Run bench/quality.py in this process, which has loaded what it needs."""
    spec = importlib.util.spec_from_file_location("quality_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with mock.patch.object(sys, "argv", [str(SCRIPT), *arguments]):
        assert script.main() == 0
