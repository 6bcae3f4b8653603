"""``qad verify``: proves files, runs them, prints what was found, and ends with an exit code."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from qad import __version__, runtimes
from qad.agreement import EXPECTED_KL, IMPOSSIBLE_KL, QUESTION, Agreement, Judge
from qad.artifact import open_artifact
from qad.errors import UserError
from qad.export import Rounding
from qad.files import check_output, replacing_file
from qad.provenance import provenance
from qad.verify import VerifyResult, verify


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: not folded, which would part what scripts look for, and without markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_rounding(console: Console, result: VerifyResult) -> None:
    """Tell what the format, and what runtimes that compute in fp16, take from the exact values."""
    if result.half:
        wrong = {mismatch.name for mismatch in result.mismatches}
        equal = len(result.half.keys() - wrong)
        _say(console, f"held in fp16 only: {equal} of {len(result.half)} tensors are the nearest fp16 values")
        total = sum(result.half.values(), Rounding())
        large = [name for name, rounding in result.half.items() if rounding.values > total.values / 10]
        for name in large:
            _say(console, f"  {name}: {result.half[name]}")
        rest = sum((rounding for name, rounding in result.half.items() if name not in large), Rounding())
        _say(console, f"  the {len(result.half) - len(large)} small ones: {rest}")
    if result.products is not None:
        share = result.products.changed / max(1, result.products.values)
        said = f"rounds {share:.1%} of them ({result.products})" if share else "keeps every one of them too"
        _say(console, f"code * scale: exact in float32; a runtime that multiplies in fp16 {said}")
    if result.computing:
        _say(console, f"asked of the runtime: {result.computing}")


def _print_proof(console: Console, result: VerifyResult) -> None:
    _say(console, f"bit-exact: {result.exact} of {result.quantized} tensors", "green" if result.ok else "red")
    if result.kept:
        _say(console, f"kept in float32: {result.kept_exact} of {result.kept} tensors equal")
    _print_rounding(console, result)
    shown = 3 if result.requantized else 20
    for mismatch in result.mismatches[:shown]:
        _say(console, f"  {mismatch}", "red")
    if len(result.mismatches) > shown:
        _say(console, f"  and {len(result.mismatches) - shown} more", "red")
    if result.artifact_changed:
        told = "the run's artifact was changed after it was made: a file in it (weights, tokenizer, configuration)"
        _say(console, f"{told} is another, or was added or lost; copy the run again, or train it again", "bold red")
    ours, theirs = result.run_hash[:16], result.file_run_hash and result.file_run_hash[:16]
    if result.requantized:
        told = "NOT EXACT: the file says that its weights were rounded again when it was exported (--requantize)"
        _say(console, f"{told}; they are not the trained ones", "bold red")
    elif theirs == ours:
        _say(console, f"run hash: {ours} in both")
    else:
        origin = "another run" if theirs else "no run of qad"
        _say(console, f"run hash: {ours} in the run, {theirs} in the file: it was exported from {origin}", "yellow")


def _print_agreement(console: Console, agreement: Agreement) -> None:
    figures = f"mean KL {agreement.kl:.2e}, same top-1 {agreement.same_top:.1%} ({agreement.tokens} tokens)"
    _say(console, f"runtime on the file against torch on the artifact: {figures}")
    if not agreement.same_tokens:
        _say(console, "the runtime cuts text into other tokens than the tokenizer of the run", "red")
    if not agreement.kl < IMPOSSIBLE_KL:  # so written, NaN is told too
        _say(console, "that is not rounding: the file's metadata, or the runtime, describes another model", "red")
    elif agreement.kl >= EXPECTED_KL:
        _say(console, f"that is more than the {EXPECTED_KL} which rounding of activations explains", "yellow")
    if agreement.torch_answer and agreement.runtime_answer:
        same, longest = agreement.greedy_same, agreement.greedy_tokens
        _say(console, f"greedy answers: the first {same} of {longest} tokens are the same")
        table = Table(title=QUESTION, show_lines=True)
        table.add_column("torch on the artifact", ratio=1)
        table.add_column("runtime on the file", ratio=1)
        table.add_row(Text(agreement.torch_answer.text), Text(agreement.runtime_answer.text))
        console.print(table)


@dataclass(frozen=True)
class FileReport:
    """All that was found about one file.

    Attributes:
        file: The file or folder.
        proof: The comparison with the artifact, None if the file cannot be read.
        agreement: That of its runtime with torch, None if it was not run.
        error: Why the file cannot be read, or not be run although a runtime is there; else None.
        not_run: Why no runtime took it, None if one did or none was asked for.
    """

    file: Path
    proof: VerifyResult | None
    agreement: Agreement | None = None
    error: str | None = None
    not_run: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was looked at holds."""
        proved = self.proof is not None and self.proof.ok and self.error is None
        return proved and (self.agreement is None or self.agreement.ok)

    @property
    def verdict(self) -> str:
        """The outcome in a word or two."""
        if self.proof is None:
            return "unreadable"
        if self.proof.requantized:
            return "not exact: requantized"
        if not self.proof.ok:
            return "not exact"
        if self.error or (self.agreement and not self.agreement.ok):
            return "exact, but runs wrong"
        return "exact" if self.agreement else "exact, not run"

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        found: dict[str, Any] = {
            "file": str(self.file),
            "ok": self.ok,
            "verdict": self.verdict,
            "error": self.error,
            "not_run": self.not_run,
        }
        if self.proof is not None:
            found["proof"] = asdict(self.proof) | {"ok": self.proof.ok, "requantized": self.proof.requantized}
        if self.agreement is not None:
            same = {"greedy_same": self.agreement.greedy_same, "greedy_tokens": self.agreement.greedy_tokens}
            found["agreement"] = asdict(self.agreement) | same | {"ok": self.agreement.ok}
        return found


def _print_summary(console: Console, reports: Sequence[FileReport]) -> None:
    table = Table(title="summary", box=SIMPLE_HEAD)
    longest = max((len(word) for report in reports for word in report.verdict.split()), default=0)
    for title in ("file", "exact", "kept", "fp16", "KL to torch", "same top-1", "greedy", "verdict"):
        side = "left" if title in ("file", "verdict") else "right"
        # Only paths are broken within words, also at 80 columns.
        width = max(longest, len(title)) if title == "verdict" else None
        table.add_column(title, justify=side, overflow="fold", no_wrap=title in ("exact", "kept"), min_width=width)
    for report in reports:
        proof, run = report.proof, report.agreement
        table.add_row(
            Text(str(report.file)),
            f"{proof.exact}/{proof.quantized}" if proof else "-",
            f"{proof.kept_exact}/{proof.kept}" if proof else "-",
            str(len(proof.half)) if proof else "-",
            f"{run.kl:.2e}" if run else "-",
            f"{run.same_top:.1%}" if run else "-",
            f"{run.greedy_same}/{run.greedy_tokens}" if run else "-",
            Text(report.verdict, style="green" if report.ok else "bold red"),
        )
    console.print(table)


def _read_text(file: Path | None) -> str:
    if file is None:
        return resources.files("qad.data").joinpath("verify.txt").read_text(encoding="utf-8")
    if not file.is_file():
        raise UserError(f"{file} is {'a folder' if file.is_dir() else 'missing'}: give a text file with --text")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def _prove(console: Console, run: Path, file: Path) -> VerifyResult:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing tensors", total=None)
        result = verify(run, file, lambda done, total: progress.update(task, completed=done, total=total))
    _print_proof(console, result)
    return result


def _run(
    console: Console, file: Path, proof: VerifyResult, judge: Callable[[], Judge], threads: int | None
) -> FileReport:
    """Compare a proved file in its runtime with torch, and tell."""
    try:
        runtimes.runtime_for(file)
    except UserError as error:
        _say(console, f"not run: {error}", "yellow")
        return FileReport(file, proof, not_run=str(error))
    reference = judge()
    try:
        with console.status("running the file and the artifact"):
            agreement = reference.compare(file, threads)
    except UserError as error:
        # What was found above is the answer; that a wrong file does not run either is no news.
        _say(console, f"not compared in the runtime: {error}", "red" if proof.ok else "yellow")
        return FileReport(file, proof, error=str(error))
    _print_agreement(console, agreement)
    return FileReport(file, proof, agreement)


def verify_command(
    run: Path,
    files: Sequence[Path],
    text: Path | None = None,
    runtime: bool = True,
    threads: int | None = None,
    json_file: Path | None = None,
    command: str = "",
) -> int:
    """Verify files, print what was found, and return the exit code.

    Args:
        run: The run folder.
        files: The exported files and folders.
        text: Text to compare logits on; the built-in one if None.
        runtime: Whether to run the files as well.
        threads: CPU threads; the free physical cores if None.
        json_file: Where to write all of it as JSON.
        command: What was typed, for the record.

    Returns:
        0 if everything holds, 2 if one of several files cannot be read, else 1.

    Raises:
        UserError: No artifact, no text, or the only file cannot be read; see ``verify``.
    """
    if json_file is not None:
        check_output(json_file, "--json")
    began = time.time()
    console = Console()
    sample = _read_text(text)
    artifact = open_artifact(run)
    reports: list[FileReport] = []
    with contextlib.ExitStack() as stack:
        opened: list[Judge] = []

        def judge() -> Judge:
            if not opened:
                opened.append(stack.enter_context(Judge(run, sample, threads)))
            return opened[0]

        for file in files:
            if len(files) > 1:
                console.rule(Text(str(file)))
            try:
                proof = _prove(console, run, file)
            except UserError as error:
                if len(files) == 1:
                    raise
                _say(console, f"unreadable: {error}", "red")
                reports.append(FileReport(file, None, error=str(error)))
                continue
            reports.append(_run(console, file, proof, judge, threads) if runtime else FileReport(file, proof))
    if len(files) > 1:
        _print_summary(console, reports)
    if json_file is not None:
        content = {
            "qad_version": __version__,
            **provenance(command, began),
            "run": str(run),
            "run_hash": artifact.run_hash,
            "ok": all(report.ok for report in reports),
            "files": [report.to_dict() for report in reports],
        }
        with replacing_file(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if all(report.ok for report in reports):
        return 0
    return 2 if any(report.proof is None for report in reports) else 1
