"""Rows of data sets, from files in their published shapes or from the hub, with the columns that a task needs."""

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qad.errors import UserError, json_fault

_HUB_SECONDS = 10
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Source:
    """Where a published data set is, and which of its columns mean what.

    Attributes:
        hub: Its id on the Hugging Face hub.
        columns: A task's name of a column to the data set's, or to several of which the first present one is taken.
        config: Its configuration there.
        splits: ``test`` and, if there is one, ``train``, by the data set's own names.
        files: Files within the data set by split, where it has no configuration that can be loaded without running
            its code.
    """

    hub: str
    columns: Mapping[str, str | tuple[str, ...]]
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"test": "test"})
    files: Mapping[str, str] | None = None


def _json_lines(path: Path) -> Iterator[Any]:
    form: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig"}
    with gzip.open(path, **form) if path.suffix == ".gz" else path.open(**form) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, row {number}: invalid JSON ({json_fault(error)})") from error


def _json_document(path: Path) -> Iterable[Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: invalid JSON ({json_fault(error)} of line {error.lineno})") from error
    # As the files of BIG-Bench Hard are.
    return document["examples"] if isinstance(document, dict) and "examples" in document else document


def _parquet(path: Path) -> Iterable[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is truncated or not a Parquet file ({str(error).splitlines()[0]})") from error


def _csv(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a file, each with what names it in errors.

    Raises:
        UserError: No such file, an unknown format, not UTF-8, invalid JSON, a row that is no object, or no row at all.
    """
    if not path.is_file():
        raise UserError(f"the file {path} does not exist: check the path")
    if not path.name.endswith(_SUFFIXES):
        raise UserError(f"{path} has an unknown format: give {', '.join(_SUFFIXES)}")
    readers = {".json": _json_document, ".parquet": _parquet, ".csv": _csv}
    rows = []
    try:
        for row_number, row in enumerate(readers.get(path.suffix, _json_lines)(path), 1):
            where = f"{path}, row {row_number}"
            if not isinstance(row, dict):
                raise UserError(f"{where} is {type(row).__name__}, not an object")
            rows.append((where, row))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (RecursionError, OSError, EOFError, zlib.error, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    return rows


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have the hub's libraries look in their cache only: without a network they would try for half a minute."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was


def _from_hub(name: str, source: Source, split: str) -> list[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    unreachable = False
    try:
        HfApi().dataset_info(source.hub, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        pass  # reachable: the error of what is asked for next says more
    except Exception:  # the hub's HTTP library changes between releases, and with it its errors' names
        unreachable = True
    try:
        with _offline() if unreachable else contextlib.nullcontext():
            if source.files is None:
                data = load_dataset(source.hub, source.config, split=source.splits[split])
            else:
                file = source.files[split]
                # The hub keeps the files that it made itself on a branch of that name.
                form, branch = ("parquet", "@~parquet") if file.endswith(".parquet") else ("json", "")
                data = load_dataset(form, data_files=f"hf://datasets/{source.hub}{branch}/{file}", split="train")
    except Exception as error:  # whatever a data set of the hub can raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if unreachable:
            raise UserError(
                f"no network: {name} is read from the Hugging Face hub ({source.hub}), which cannot be reached; give "
                "path=… with a file of its rows"
            ) from error
        raise UserError(
            f"the Hugging Face hub did not give {source.hub} ({reason}): set HF_TOKEN if it is gated, or give path=… "
            "with a file of its rows"
        ) from error
    return [(f"{source.hub}, row {number}", dict(row)) for number, row in enumerate(data, 1)]


def _file_of(path: Path, split: str) -> Path:
    """Return the file of a split: the path itself, or the one of that name in it."""
    if not path.is_dir():
        if split != "test":
            raise UserError(f"the split {split} needs both splits: give path=… with a folder of test.* and {split}.*")
        return path
    for suffix in _SUFFIXES:
        if (file := path / f"{split}{suffix}").is_file():
            return file
    raise UserError(f"{path} holds no file {split}.jsonl, nor one of another known format")


def rows_of(name: str, source: Source, path: Path | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a data set with the columns named as the task wants them.

    Args:
        name: Of the task, for errors.
        source: Where the set is and what its columns mean.
        path: A file, or a folder with a file for each split, to be read instead of the hub.
        split: ``test`` or ``train``.

    Raises:
        UserError: There is no such split, no network and no path, or the rows have other columns.
    """
    if split not in source.splits:
        raise UserError(f"{name} has no split {split}")
    found = read_rows(_file_of(path, split)) if path is not None else _from_hub(name, source, split)
    rows = []
    for where, row in found:
        renamed = {}
        for ours, theirs in source.columns.items():
            candidates = (theirs,) if isinstance(theirs, str) else theirs
            present = [each for each in candidates if row.get(each) is not None]
            if not present:
                raise UserError(
                    f"{where} has no column {' or '.join(map(repr, candidates))} (found {', '.join(map(str, row))}): "
                    f"{name} wants rows as {source.hub} has them"
                )
            renamed[ours] = row[present[0]]
        rows.append((where, renamed))
    return rows
