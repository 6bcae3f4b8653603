"""How close GGUF files stay to their teacher, judged by llama.cpp on the files themselves.

    python bench/quality.py TEACHER.gguf STUDENT.gguf... --text HELD_OUT.txt [--rival q4_0] [--json OUT.json]

For each file: size; mean KL(teacher || file) over the full vocabulary with its standard error; perplexity; how often
both rank the same token first. A rival is llama.cpp's own quantization of the same teacher, made on the spot.

A text is cut into chunks, each read from an empty context. As llama-perplexity does, the first half of a chunk is
context only (``--skip`` changes that), so that figures of both tools compare. Logits exist for one chunk at a time.

Shapes: T tokens of a chunk, V vocabulary.
"""

import argparse
import contextlib
import ctypes
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qad.agreement import log_softmax
from qad.errors import UserError
from qad.gguf_check import check_gguf, read_header
from qad.provenance import provenance
from qad.runtimes import _cores, _llama_api, llamacpp

_ROWS_AT_ONCE = 64
_TOTAL = "all texts"


@dataclass
class Tally:
    """Sums over judged positions of one file on one text."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    surprise: list[NDArray[np.float64]] = field(default_factory=list)
    same_top: int = 0

    def extend(self, other: "Tally") -> None:
        """Add another tally's positions."""
        self.kl += other.kl
        self.surprise += other.surprise
        self.same_top += other.same_top

    def row(self) -> dict[str, float]:
        """Return the figures: ``tokens, kl, kl_error, perplexity, same_top`` (a share)."""
        kl = np.concatenate(self.kl)
        return {
            "tokens": len(kl),
            "kl": float(kl.mean()),
            "kl_error": float(kl.std(ddof=1) / math.sqrt(len(kl))),
            "perplexity": float(np.exp(np.concatenate(self.surprise).mean())),
            "same_top": self.same_top / len(kl),
        }


def judge(teacher_TV: NDArray[np.float32], file_TV: NDArray[np.float32], next_T: NDArray[np.int64]) -> Tally:
    """Compare the logits of a chunk's judged positions.

    Args:
        teacher_TV, file_TV: Logits of both; only the vocabulary that both have is compared.
        next_T: The token that follows each position.
    """
    tally = Tally()
    width = min(teacher_TV.shape[1], file_TV.shape[1])
    for start in range(0, len(next_T), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        teacher = log_softmax(teacher_TV[rows, :width])
        other = log_softmax(file_TV[rows, :width])
        tally.kl.append((np.exp(teacher) * (teacher - other)).sum(axis=1))
        tally.surprise.append(-other[np.arange(len(other)), next_T[rows]])
        tally.same_top += int((teacher.argmax(axis=1) == other.argmax(axis=1)).sum())
    return tally


def quantize_by_llamacpp(source: Path, target: Path, kind: str, threads: int) -> None:
    """Write llama.cpp's own quantization of a GGUF file, a quantized one included.

    Args:
        source: A GGUF file of any type.
        target: The file to write.
        kind: llama.cpp's name of the mixture, such as ``q4_0``, ``q4_k_m``, ``f32``.
        threads: CPU threads.

    Raises:
        UserError: Unknown kind, or llama.cpp fails.
    """
    import llama_cpp
    from gguf import LlamaFileType

    kinds = {member.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower(): member for member in LlamaFileType}
    if kind.lower() not in kinds:
        raise UserError(f"llama.cpp has no quantization {kind!r}; it has {', '.join(sorted(kinds))}")
    _llama_api.quiet()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(kinds[kind.lower()])
    settings.nthread = threads
    settings.allow_requantize = True
    settings.pure = False
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.pointer(settings)) != 0:
        raise UserError(f"llama.cpp could not quantize {source} to {kind}: {_llama_api.last_failure()}")


def chunks_of(tokens: list[int], first: int | None, length: int, limit: int) -> list[list[int]]:
    """Cut tokens into chunks of one length, each beginning with ``first`` in place of its first token if given."""
    cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return [[first, *chunk[1:]] if first is not None else chunk for chunk in cut[:limit]]


def compare(
    teacher: Path,
    files: dict[str, Path],
    texts: dict[str, str],
    *,
    chunks: int,
    chunk_tokens: int,
    skip: int,
    threads: int,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Tally]]:
    """Judge files against a teacher.

    Returns:
        Text name -> file name -> tally. The teacher judges itself under its own name, ``teacher``.

    Raises:
        UserError: A text is shorter than a chunk, or a file has another tokenizer.
    """
    with contextlib.ExitStack() as stack:
        judge_session = stack.enter_context(llamacpp.open(teacher, threads=threads))
        sessions = {name: stack.enter_context(llamacpp.open(path, threads=threads)) for name, path in files.items()}
        cut = {}
        for text_name, text in texts.items():
            tokens = judge_session.tokenize(text)
            for name, session in sessions.items():
                if session.tokenize(text) != tokens:
                    raise UserError(f"{files[name]} and the teacher have different tokenizers: they cannot be compared")
            cut[text_name] = chunks_of(tokens, judge_session.first_token(), chunk_tokens, chunks)
            if not cut[text_name]:
                raise UserError(
                    f"{text_name} has {len(tokens)} tokens, fewer than a chunk of {chunk_tokens}: "
                    "give a longer text or a smaller --chunk-tokens"
                )
        total = sum(map(len, cut.values()))
        done = 0
        result: dict[str, dict[str, Tally]] = {name: {} for name in texts}
        for text_name, pieces in cut.items():
            tallies = {name: Tally() for name in ("teacher", *files)}
            for piece in pieces:
                following = np.array(piece[skip + 1 :], dtype=np.int64)
                truth = judge_session.logits([piece])[0, skip:-1]
                tallies["teacher"].extend(judge(truth, truth, following))
                for name, session in sessions.items():
                    tallies[name].extend(judge(truth, session.logits([piece])[0, skip:-1], following))
                done += 1
                on_chunk(done, total)
            result[text_name] = tallies
    return result


def table_of(rows: list[dict[str, str | float]], rivals: list[str]) -> Table:
    """Return the table that is printed; ratios compare the KL of a file with a rival's on the same text."""
    table = Table(title="KL to the teacher, judged by llama.cpp")
    ratio_names = [f"KL ÷ {name.split()[-1]}'s" for name in rivals]
    for heading in ("text", "file", "MB", "mean KL", "perplexity", "same top-1", *ratio_names):
        names = heading in ("text", "file")
        table.add_column(heading, justify="left" if names else "right", overflow="fold", no_wrap=not names)
    last = None
    for row in rows:
        if last not in (None, row["text"]):
            table.add_section()
        of_rivals = {other["file"]: other["kl"] for other in rows if other["text"] == row["text"]}
        ratios = [f"{float(row['kl']) / float(of_rivals[name]):.3f}" for name in rivals]
        table.add_row(
            str(row["text"]) if row["text"] != last else "",
            str(row["file"]),
            f"{row['megabytes']:.1f}",
            f"{row['kl']:.5f} ±{row['kl_error']:.5f}",
            f"{row['perplexity']:.3f}",
            f"{float(row['same_top']):.1%}",
            *(["" for _ in rivals] if row["file"] == "teacher" else ratios),
        )
        last = row["text"]
    return table


def unique_names(files: list[Path]) -> dict[str, Path]:
    """Return a short name for each file: its own, or its whole path where two share it."""
    names = [path.name for path in files]
    return {path.name if names.count(path.name) == 1 else str(path): path for path in files}


@contextlib.contextmanager
def made_files(teacher: Path, rivals: list[str], *, as_f32: bool, threads: int) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the teacher (dequantized if asked) and the rivals' files, which exist until the block ends."""
    with tempfile.TemporaryDirectory(prefix="qad-quality-") as folder:
        made = []
        for kind in rivals:
            target = Path(folder) / f"{kind}.gguf"
            quantize_by_llamacpp(teacher, target, kind, threads)
            made.append(target)
        if as_f32:
            dequantized = Path(folder) / "teacher-f32.gguf"
            quantize_by_llamacpp(teacher, dequantized, "f32", threads)
            teacher = dequantized
        yield teacher, made


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Do what the command line asks."""
    began = time.time()
    teacher: Path = arguments.teacher
    threads = arguments.threads or _cores.free_cores()
    skip = arguments.chunk_tokens // 2 if arguments.skip is None else arguments.skip
    if not 0 <= skip < arguments.chunk_tokens - 1:
        raise UserError(f"--skip {skip} leaves nothing of a chunk of {arguments.chunk_tokens} tokens")
    for path in (teacher, *arguments.files):
        check_gguf(path)
    texts = {name: path.read_text() for name, path in unique_names(arguments.text).items()}
    with made_files(teacher, arguments.rival, as_f32=arguments.teacher_f32, threads=threads) as (judge_file, made):
        files = unique_names(arguments.files)
        rivals = [f"llama.cpp {kind}" for kind in arguments.rival]
        files |= dict(zip(rivals, made, strict=True))
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("judging", total=None)
            tallies = compare(
                judge_file,
                files,
                texts,
                chunks=arguments.chunks,
                chunk_tokens=arguments.chunk_tokens,
                skip=skip,
                threads=threads,
                on_chunk=lambda done, total: progress.update(task, completed=done, total=total),
            )
        sizes = {"teacher": teacher.stat().st_size, **{name: path.stat().st_size for name, path in files.items()}}
    if len(tallies) > 1:
        summed = {name: Tally() for name in sizes}
        for of_text in tallies.values():
            for name, tally in of_text.items():
                summed[name].extend(tally)
        tallies[_TOTAL] = summed
    rows: list[dict[str, str | float]] = [
        {"text": text, "file": name, "megabytes": sizes[name] / 1e6, **tally.row()}
        for text, of_text in tallies.items()
        for name, tally in of_text.items()
    ]
    console.print(table_of(rows, rivals))
    console.print(
        f"{arguments.chunk_tokens} tokens a chunk, the first {skip} context only; teacher "
        f"{teacher.name}{' computed in F32' if arguments.teacher_f32 else ''} "
        f"({read_header(teacher).metadata['general.architecture']})"
    )
    if arguments.json:
        record = provenance(shlex.join(sys.argv), began) | {"teacher": str(teacher), "skip": skip, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Mean KL of GGUF files to their teacher, perplexity and same-top-1, judged by llama.cpp."
    )
    parser.add_argument("teacher", type=Path, help="the teacher's GGUF file")
    parser.add_argument("files", type=Path, nargs="*", help="GGUF files to judge")
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; may be repeated")
    parser.add_argument(
        "--rival", action="append", default=[], help="also judge llama.cpp's own quantization of the teacher: q4_0, …"
    )
    parser.add_argument(
        "--teacher-f32", action="store_true", help="compute the teacher in F32, free of run-time rounding"
    )
    parser.add_argument("--chunks", type=int, default=12, help="chunks of each text at most (default %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="tokens of a chunk (default %(default)s)")
    parser.add_argument("--skip", type=int, help="tokens of a chunk that are context only (default: half)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the free physical cores)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    # Written to a file or a pipe, a table needs no fold at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        run(parser.parse_args(), console)
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
