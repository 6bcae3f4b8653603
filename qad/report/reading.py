"""Recognize what was given: run folders and JSON files of several tools, told by their keys."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from qad.errors import UserError
from qad.files import sha256_of_file
from qad.report import bench_record, eval_record, quality_record, verify_record
from qad.report.bench_record import BenchRecord
from qad.report.eval_record import EvalRecord
from qad.report.quality_record import QualityRecord
from qad.report.run_record import RunRecord, read_run
from qad.report.source import Source
from qad.report.verify_record import VerifyRecord

Record = BenchRecord | EvalRecord | QualityRecord | RunRecord | VerifyRecord
R = TypeVar("R", BenchRecord, EvalRecord, QualityRecord, RunRecord, VerifyRecord)

READERS: tuple[ModuleType, ...] = (bench_record, verify_record, quality_record, eval_record)
ACCEPTED = (
    "the report takes run folders and what `qad bench --json`, `qad verify --json`, `qad eval --json` and "
    "bench/quality.py --json wrote"
)
# A page is for people: no record of ours comes near.
_LARGEST = 64 << 20
# Of an unknown file, that are told.
_NAMES = 5


def read(path: Path) -> Record:
    """Return the record of one path.

    Raises:
        UserError: It is missing, damaged, or nothing that a report is made of.
    """
    if path.is_dir():
        return read_run(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: {ACCEPTED}")
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path} has {path.stat().st_size / 1e6:,.0f} MB, far more than a record has: {ACCEPTED}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON, or a damaged one ({error}): {ACCEPTED}") from error
    for reader in READERS:
        if reader.recognizes(values):
            return reader.read(values, Source(str(path), reader.KIND, sha256_of_file(path)))
    raise UserError(f"{path} is JSON of another kind ({_kind(values)}): {ACCEPTED}")


def _kind(values: Any) -> str:
    """Return what is seen of a JSON file that is no record: what it calls itself, or its names."""
    if not isinstance(values, dict):
        return {list: "a list", str: "a text"}.get(type(values), "a single value")
    if isinstance(values.get("kind"), str):
        return f"it calls itself {values['kind']!r:.40}"
    names = ", ".join(map(str, list(values)[:_NAMES]))
    return f"with {names:.100}{' and others' if len(values) > _NAMES else ''}" if names else "with nothing in it"


def read_all(paths: Sequence[Path]) -> list[Record]:
    """Return the records of several paths, each once.

    Raises:
        UserError: See ``read``.
    """
    return [read(path) for path in {path.resolve(): path for path in paths}.values()]


def of_kind(records: Sequence[Record], kind: type[R]) -> list[R]:
    """Return the records of one kind."""
    return [record for record in records if isinstance(record, kind)]
