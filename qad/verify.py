"""Prove that an exported file holds the weights the trainer saw, and show that a runtime computes with them.

The proof has two halves. The artifact recorded the SHA-256 of each tensor as the trainer's forward multiplied with it;
a decoder that shares no code with the exporter must reproduce these hashes from the file. And it must agree with the
artifact's own codes and scales bit for bit, which tells where a mismatch lies. What a runtime does with the weights
(it rounds activations) is then measured rather than proved.

Shapes: T tokens, V vocabulary.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from qad import __version__, runtimes
from qad.artifact import Artifact, open_artifact, tensor_sha256
from qad.errors import UserError
from qad.export import REQUANTIZED, OnProgress, Rounding, exporter_for
from qad.files import replacing_file

QUESTION = "Explain in two sentences why leaves are green."
ANSWER_TOKENS = 64
# Run-time rounding of activations stays below; what lies far above is wrong metadata or a wrong engine.
EXPECTED_KL = 1e-2
IMPOSSIBLE_KL = 1e-1
_CHUNK = 256
_CHUNKS = 4


@dataclass(frozen=True)
class Mismatch:
    """A tensor that the file does not hold as trained.

    Attributes:
        name: The tensor.
        reason: What is wrong, in words.
        differing: How many weights have other bits than the artifact's.
        first: Position of the first of them.
    """

    name: str
    reason: str
    differing: int = 0
    first: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" ({self.differing} weights, the first at {list(self.first)})" if self.differing else ""
        return f"{self.name}: {self.reason}{where}"


@dataclass(frozen=True)
class VerifyResult:
    """What comparing a file with its run found.

    Attributes:
        quantized, exact: Quantized tensors that the format carries as such, and those of them that are bit-exact.
        kept, kept_exact: The same of the tensors kept in float32.
        mismatches: One entry for each tensor that is not.
        half: Name of each tensor that the format holds only as fp16 -> by how much that moved it. Those among
            ``mismatches`` are not the nearest fp16 values.
        products: What fp16 makes of the decoded weights; None where the format's runtimes compute with all bits.
        run_hash: Of the artifact.
        file_run_hash: As the file's metadata has it, None if it has none.
    """

    quantized: int
    exact: int
    kept: int
    kept_exact: int
    run_hash: str
    file_run_hash: str | None
    mismatches: list[Mismatch] = field(default_factory=list)
    half: dict[str, Rounding] = field(default_factory=dict)
    products: Rounding | None = None

    @property
    def requantized(self) -> bool:
        """Whether the file itself says that its weights were rounded again when it was exported."""
        return self.file_run_hash is not None and self.file_run_hash.startswith(REQUANTIZED)

    @property
    def ok(self) -> bool:
        """Whether every tensor is what the format can hold of it, bit for bit, and nothing is missing or added."""
        return not self.mismatches and not self.requantized


def _compare(artifact: Artifact, name: str, found: NDArray[np.float32], half: bool) -> Mismatch | None:
    """Compare one tensor of the file with the artifact and with the trainer's hash.

    ``half``: The file can only hold the nearest fp16 values. Then the hash is that of the artifact's own.
    """
    exact = wanted = artifact.weight(name).numpy()
    if half:
        with np.errstate(over="ignore"):
            wanted = exact.astype(np.float16).astype(np.float32)
    hashed = exact if half else found
    if found.shape != wanted.shape:
        return Mismatch(name, f"shape {found.shape} in the file, {wanted.shape} in the artifact")
    differing = found.view(np.uint32) != wanted.view(np.uint32)
    count = int(np.count_nonzero(differing))
    if count:
        first = tuple(int(index) for index in np.unravel_index(int(differing.argmax()), differing.shape))
        rounded = " rounded to fp16" if half else ""
        return Mismatch(name, f"the file's weights are not the artifact's{rounded}", count, first)
    if name in artifact.grids and tensor_sha256(torch.from_numpy(hashed)) != artifact.forward_sha256.get(name):
        return Mismatch(name, "file and artifact agree, but the trainer's forward used other weights")
    return None


def verify(run: Path, file: Path, on_progress: OnProgress | None = None) -> VerifyResult:
    """Compare every tensor of an exported file with the run it should come from.

    Args:
        run: The run folder.
        file: The exported file.
        on_progress: Called with the tensors compared so far and in all.

    Raises:
        UserError: No artifact there, or the file is missing, damaged or of an unknown format.
    """
    artifact = open_artifact(run)
    if not file.exists():
        raise UserError(f"{file} is missing: export the run first (qad export), or check the path")
    exporter = exporter_for(file)
    decoded = exporter.read(file)
    names = [*artifact.grids, *artifact.kept]
    only_half = exporter.only_half(artifact)
    mismatches: list[Mismatch] = []
    half: dict[str, Rounding] = {}
    products = Rounding() if exporter.FP16_RUNTIMES else None
    for done, name in enumerate(names, start=1):
        if name in only_half:
            half[name] = Rounding.of(artifact.weight(name).numpy())
        if name in decoded:
            found = np.ascontiguousarray(decoded[name])
            mismatch = _compare(artifact, name, found, name in only_half)
            if products is not None and name not in only_half:
                products += Rounding.of(found)
        else:
            mismatch = Mismatch(name, "missing in the file")
        if mismatch is not None:
            mismatches.append(mismatch)
        if on_progress is not None:
            on_progress(done, len(names))
    wrong = {mismatch.name for mismatch in mismatches}
    mismatches += [Mismatch(name, "not in the artifact") for name in decoded if name not in set(names)]
    quantized, kept = artifact.grids.keys() - only_half, set(artifact.kept) - only_half
    return VerifyResult(
        quantized=len(quantized),
        exact=len(quantized - wrong),
        kept=len(kept),
        kept_exact=len(kept - wrong),
        run_hash=artifact.run_hash,
        file_run_hash=exporter.run_hash(file),
        mismatches=mismatches,
        half=half,
        products=products,
    )


def log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log probabilities in float64: differences of nearly equal ones are what is measured."""
    shifted = logits_TV.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Its tokens.
        text: The same, decoded.
    """

    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Agreement:
    """How a runtime on the file agrees with torch on the artifact.

    Attributes:
        tokens: Positions compared.
        kl: Mean KL(torch || runtime) over the full vocabulary.
        same_top: Share of positions where both rank the same token first.
        same_tokens: Whether both cut the text, and the question under the chat template, into the same tokens.
        torch_answer, runtime_answer: Greedy answers to ``QUESTION``, None if it does not fit the model's context.
    """

    tokens: int
    kl: float
    same_top: float
    same_tokens: bool
    torch_answer: Answer | None
    runtime_answer: Answer | None

    @property
    def greedy_tokens(self) -> int:
        """Length of the longer answer, in tokens."""
        return max(len(answer.tokens) for answer in self._answers) if self._answers else 0

    @property
    def greedy_same(self) -> int:
        """How many tokens the answers share before they part."""
        if not self._answers:
            return 0
        pairs = list(zip(*(answer.tokens for answer in self._answers), strict=False))
        return next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))

    @property
    def _answers(self) -> list[Answer]:
        both = [self.torch_answer, self.runtime_answer]
        return [answer for answer in both if answer is not None] if None not in both else []

    @property
    def ok(self) -> bool:
        """Whether the runtime computes the same model, its rounding aside."""
        return self.same_tokens and self.kl < IMPOSSIBLE_KL


def _answer(session: runtimes.Session, prompt: list[int]) -> Answer:
    pieces = list(session.stream(prompt, ANSWER_TOKENS))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    return Answer(tokens, "".join(piece.text for piece in pieces).strip())


class Judge:
    """Torch on a run's artifact, opened once for all files that are compared with it.

    Attributes:
        session: The opened model.
        text: The text on which logits are compared.
        tokens, question: Its tokens, and those of ``QUESTION`` under the chat template.
    """

    def __init__(self, run: Path, text: str, threads: int | None = None) -> None:
        """Open the artifact of a run.

        Raises:
            UserError: No artifact there, or the text is too short to compare anything.
        """
        self.text = text
        self._limit = int(open_artifact(run).config["max_position_embeddings"])
        self.session = runtimes.get("reference").open(run, threads=threads)
        self.tokens = self.session.tokenize(text)
        self.question = self.session.chat_prompt(QUESTION)
        self._length = min(_CHUNK, self._limit, len(self.tokens))
        if self._length < 2:
            self.session.close()
            raise UserError("the text is too short to compare anything: give some sentences with --text")

    @functools.cached_property
    def answer(self) -> Answer | None:
        """The greedy answer, None if it does not fit the context."""
        fits = len(self.question) + ANSWER_TOKENS <= self._limit
        return _answer(self.session, self.question) if fits else None

    def compare(self, file: Path, threads: int | None = None) -> Agreement:
        """Run a file in its engine on the same text and question.

        Raises:
            UserError: No runtime opens the file, or it is of a model with another vocabulary.
        """
        with runtimes.runtime_for(file).open(file, threads=threads) as session:
            if session.vocabulary != self.session.vocabulary:
                raise UserError(
                    f"the file's model has {session.vocabulary} tokens, the run's {self.session.vocabulary}: verify a "
                    "file that was exported from this run"
                )
            same_tokens = session.tokenize(self.text) == self.tokens
            same_tokens &= session.chat_prompt(QUESTION) == self.question
            kl, same = [], []
            last = min(len(self.tokens) - self._length + 1, _CHUNKS * self._length)
            for start in range(0, last, self._length):
                chunk = [self.tokens[start : start + self._length]]
                ours, theirs = log_softmax(self.session.logits(chunk)[0]), log_softmax(session.logits(chunk)[0])
                kl.append((np.exp(ours) * (ours - theirs)).sum(axis=1))
                same.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
            return Agreement(
                tokens=sum(map(len, kl)),
                kl=float(np.concatenate(kl).mean()),
                same_top=float(np.concatenate(same).mean()),
                same_tokens=same_tokens,
                torch_answer=self.answer,
                runtime_answer=_answer(session, self.question) if self.answer is not None else None,
            )

    def close(self) -> None:
        """Free the model."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compare_runtime(run: Path, file: Path, text: str, threads: int | None = None) -> Agreement:
    """Run a file in its engine and the artifact in torch on the same text and question.

    Raises:
        UserError: No runtime opens the file, it is of a model with another vocabulary, or the text is too short.
    """
    with Judge(run, text, threads) as judge:
        return judge.compare(file, threads)


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
        raise UserError(f"{file} is missing: give a text file with --text")
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
) -> int:
    """Verify files, print what was found, and return the exit code.

    Args:
        run: The run folder.
        files: The exported files and folders.
        text: Text to compare logits on; the built-in one if None.
        runtime: Whether to run the files as well.
        threads: CPU threads; the free physical cores if None.
        json_file: Where to write all of it as JSON.

    Returns:
        0 if everything holds, 2 if one of several files cannot be read, else 1.

    Raises:
        UserError: No artifact, no text, or the only file cannot be read; see ``verify``.
    """
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
