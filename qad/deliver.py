"""``qad export``: one run in one format or several, each whole or not at all, with a manifest beside several.

One command writes several formats to a folder at a time, so that the manifest tells of what that command wrote.

Everything that can be known beforehand is checked before the first byte is written: that each format carries the grids
and the architecture, and that the names fit the formats. ``manifest.json`` is written last, so that one that is there
describes what is there: an earlier one is deleted first.
"""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from qad import __version__, export, interrupts
from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.export import Exporter, OnProgress, Rounding
from qad.files import is_dropping, replacing_file, sha256_of_file
from qad.locks import locked

if TYPE_CHECKING:
    from qad.requantize import Cost

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Job:
    """One format to be written.

    Attributes:
        format: Its name.
        exporter: Its module.
        artifact: What is written: the run's, or what the nearest grids made of it.
        target: File or folder.
        changed: Name of each tensor that is on another grid than it was trained on -> that grid.
        cost: What the change cost, None if there was none.
    """

    format: str
    exporter: Exporter
    artifact: Artifact
    target: Path
    changed: Mapping[str, str]
    cost: "Cost | None"


def parse_formats(text: str) -> list[str]:
    """Return the formats of a list with commas, each once.

    Raises:
        UserError: None, or one that is not known.
    """
    names = list(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))
    if not names:
        raise UserError(f"--format names none: give one of {', '.join(export.names())}, or several with commas")
    for name in names:
        export.get(name)
    return names


def _target(exporter: Exporter, name: str, run: Path, output: Path | None, several: bool) -> Path:
    """Return where a format goes.

    Raises:
        UserError: A file named in a way that no reader of the format would take.
    """
    if output is None or several:
        target = (output or run) / f"student{exporter.SUFFIX}"
    else:
        _check_ending(exporter, name, output)
        target = output
    return target


def _check_ending(exporter: Exporter, name: str, output: Path) -> None:
    endings = {export.get(other).SUFFIX for other in export.names() if export.get(other).SUFFIX.startswith(".")}
    ending = output.suffix.lower()
    if exporter.SUFFIX in endings and ending != exporter.SUFFIX and not output.is_dir():
        raise UserError(f"{output} does not end in {exporter.SUFFIX}, by which every reader of {name} files knows them")
    if exporter.SUFFIX not in endings and ending in endings:
        raise UserError(f"{output} ends like a {ending[1:]} file, and {name} is a folder: name it otherwise with -o")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and not is_dropping(file))


def _entry(job: Job, rounded: Mapping[str, Rounding], beside: Path) -> dict[str, Any]:
    """Return what the manifest says of one export."""
    files = [
        {"path": file.relative_to(beside).as_posix(), "bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        for file in _files(job.target)
    ]
    entry: dict[str, Any] = {
        "format": job.format,
        "path": job.target.relative_to(beside).as_posix(),
        "bytes": sum(file["bytes"] for file in files),
        "exact": not job.changed,
        "grids": dict(Counter(job.artifact.grids.values())),
        "files": files,
        "held_as_fp16": {
            name: {
                "values": rounding.values,
                "changed": rounding.changed,
                "largest_relative_error": rounding.largest,
                "mean_relative_error": rounding.mean,
            }
            for name, rounding in rounded.items()
        },
    }
    if job.changed:
        entry["requantized"] = {"tensors": dict(job.changed), "cost": asdict(job.cost) if job.cost else None}
    return entry


def _tell(console: Console, job: Job, rounded: Mapping[str, Rounding]) -> None:
    """Say what was written, and what the format could not hold exactly."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    size = sum(file.stat().st_size for file in _files(job.target))
    say(f"{job.target}: {size / 1e6:.1f} MB, run {job.artifact.run_hash[:12] if not job.changed else 'requantized'}")
    if job.changed:
        grids = ", ".join(f"{count} to {grid}" for grid, count in Counter(job.changed.values()).items())
        say(f"  NOT the trained weights: {len(job.changed)} tensors were rounded again ({grids})", "bold red")
        if job.cost:
            say(f"  {job.cost}", "bold red")
    if rounded:
        quantized = [name for name in rounded if name in job.artifact.grids]
        say(f"held in fp16, as {job.format} holds all but linear layers: {len(rounded)} tensors")
        for name in quantized:
            say(f"  {name}: {rounded[name]}")
        others = sum((rounded[name] for name in rounded if name not in quantized), Rounding())
        say(f"  norms and biases: {others}")


def _jobs(
    artifact: Artifact, run: Path, formats: list[str], output: Path | None, scratch: Path, requantize: bool
) -> list[Job]:
    """Return what is to be written, all of it checked.

    Raises:
        UserError: A format cannot carry the artifact (and may not round again), or a name that does not fit.
    """
    jobs = []
    for name in formats:
        exporter = export.get(name)
        target = _target(exporter, name, run, output, len(formats) > 1)
        exporter.check_place(artifact, target)
        try:
            exporter.check(artifact)
        except UserError as error:
            if not requantize:
                raise UserError(f"{name}: {error}") from error
            # Only here: it loads torch models, which an export does without.
            from qad.requantize import measure_cost, requantized

            made, changed = requantized(artifact, name, scratch / name)
            exporter.check(made)
            jobs.append(Job(name, exporter, made, target, changed, measure_cost(artifact, made)))
        else:
            jobs.append(Job(name, exporter, artifact, target, {}, None))
    return jobs


def _write(job: Job, on_progress: OnProgress, options: Mapping[str, Any]) -> Mapping[str, Rounding]:
    # Typed as Any: what is beyond the protocol belongs to one format.
    write: Any = job.exporter.write
    return write(job.artifact, job.target, on_progress, **options)


def _forget(manifest: Path) -> None:
    """Delete the manifest of an earlier export.

    Raises:
        UserError: What stands there is something else's.
    """
    if not manifest.exists():
        return
    try:
        found = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "qad_version" not in found:
        raise UserError(
            f"{manifest} is no manifest of qad and would be overwritten: delete it, or name another folder with -o"
        )
    manifest.unlink()


@contextlib.contextmanager
def _alone(folder: Path, several: bool) -> Iterator[None]:
    """Let no other command write several formats to a folder while the block runs, nor, if this one does, a single one.

    Raises:
        UserError: Another one does.
    """
    with contextlib.suppress(OSError):  # who writes there says what is wrong with it
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock:
        if folder.is_dir():
            try:
                lock.enter_context(locked(folder, shared=not several))
            except BlockingIOError as error:
                raise UserError(
                    f"another export writes to {folder}: wait until it has ended, or name another folder with -o"
                ) from error
            except OSError:  # one that may not be read
                pass
        yield


def _interrupted(formats: list[str], finished: Mapping[str, Path]) -> str:
    """Return the one line that says what an interrupt left."""
    whole = [f"{name} is written and whole ({path})" for name, path in finished.items()]
    missing = [name for name in formats if name not in finished]
    parts = [*whole, f"{', '.join(missing)} not written"] if missing else whole
    return "interrupted: " + "; ".join([*parts, f"no {MANIFEST}"] if len(formats) > 1 else parts)


def export_command(
    run: Path, formats: str, output: Path | None, requantize: bool, onnx: Mapping[str, Any] | None = None
) -> int:
    """Export a run.

    Args:
        run: The run folder.
        formats: Names of formats, with commas.
        output: File or folder of a single format, or the folder in which several are put; in the run folder if None.
        requantize: Round again to the nearest grid where a format does not carry the trained one.
        onnx: Options of the ONNX folder: ``target``, ``accuracy_level``, ``wide_inputs``.

    Returns:
        The exit status: 0, or 130 after an interrupt, of which one line says what was finished.

    Raises:
        UserError: Bad names or options, an artifact that was changed, a format that cannot carry the run, or a place
            that cannot be written. Of several formats, those before it are then written and whole.
    """
    console = Console()
    names = parse_formats(formats)
    finished: dict[str, Path] = {}
    try:
        with interrupts.remembered():
            _export(console, run, names, output, requantize, onnx or {}, finished)
    except KeyboardInterrupt:
        console.print(_interrupted(names, finished), markup=False, highlight=False, soft_wrap=True)
        return 130
    return 0


def _export(
    console: Console,
    run: Path,
    names: list[str],
    output: Path | None,
    requantize: bool,
    onnx: Mapping[str, Any],
    finished: dict[str, Path],
) -> None:
    """Export a run; note in ``finished`` where each format is as soon as it is whole."""
    if onnx and "onnx" not in names:
        raise UserError("--target, --accuracy-level and --wide-inputs are options of --format onnx")
    if "onnx" in names:
        # Typed as Any: what is beyond the protocol belongs to one format.
        exporter: Any = export.get("onnx")
        exporter.check_options(**onnx)
    artifact = open_artifact(run)
    # What is written carries the run's hash: it must not vouch for weights that the run never had.
    with console.status("checking the artifact"):
        whole = artifact.is_whole()
    interrupts.check()
    if not whole:
        raise UserError(
            f"the artifact in {artifact.folder} is not what its run hash was taken of: a file in it was changed, added "
            "or lost; take out what was put there, or else copy the run again, or train it again"
        )
    several = len(names) > 1
    if several and output is not None and output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: for several formats name a folder with -o")
    with tempfile.TemporaryDirectory(prefix="qad-requantized-") as scratch, contextlib.ExitStack() as alone:
        jobs = _jobs(artifact, run, names, output, Path(scratch), requantize)
        alone.enter_context(_alone((output or run) if several else jobs[0].target.absolute().parent, several))
        manifest = (output or run) / MANIFEST if several else None
        if manifest is not None:
            _forget(manifest)
        entries = []
        with Progress(console=console) as progress:
            for job in jobs:
                # Shown with its first byte: an error before that must not leave an empty bar behind.
                task = progress.add_task(f"writing {job.target.name}", total=None, visible=False)

                def on_progress(done: int, total: int, task: TaskID = task) -> None:
                    interrupts.check()
                    progress.update(task, completed=done, total=total, visible=True)

                rounded = _write(job, on_progress, onnx if job.format == "onnx" else {})
                finished[job.format] = job.target
                interrupts.check()
                _tell(progress.console, job, rounded)
                if manifest is not None:
                    entries.append(_entry(job, rounded, manifest.parent))
        if manifest is None:
            return
        content = {
            "format_version": 1,
            "qad_version": __version__,
            "run_hash": artifact.run_hash,
            "grids": artifact.grids,
            "exports": entries,
        }
        with replacing_file(manifest) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"{manifest}: sizes and SHA-256 of all files", markup=False, highlight=False, soft_wrap=True)
