"""Read ``--data``: JSON Lines and Parquet files and hub dataset ids, checked row by row, mixed, and split.

A row is plain ``text``, or ``prompt`` and ``completion`` as lists of {role, content} messages; plain strings are taken
for one message each. Other columns are ignored. Rows are checked one by one in Python, so that an error names the row:
what is given up is speed on data sets of many millions of rows.
"""

import gzip
import hashlib
import json
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DownloadConfig, Features, List, Value, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from qad.data.rows import Message, Row, identity, with_id
from qad.errors import UserError, json_fault

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {"text": Value("string"), "prompt": _MESSAGES, "completion": _MESSAGES, "sample_id": Value("string")}
)
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_EXPECTED = "expected `text`, or `prompt` and `completion`"
_HUB_SECONDS = 10


def rows_to_dataset(rows: Iterable[Row]) -> Dataset:
    """Return rows (see ``qad.data.rows``) as a dataset of fixed columns."""
    rows = list(rows)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


def _check_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a surrogate pair ({text[error.start]!a}), which is no character: repair or drop it"
        ) from error
    return text


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _messages(value: Any, column: str, role: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": _check_text(value, where)}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{column}` is {_kind(value)}; expected a string or a list of role/content messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: `{column}` holds a message that is not {{role, content}} of two strings")
    return [{key: _check_text(message[key], where) for key in ("role", "content")} for message in value]


def check_row(record: Any, where: str) -> Row:
    """Return a record as a row with all columns and its ``sample_id``.

    Args:
        record: What a file or data set holds.
        where: Names the row in errors.

    Raises:
        UserError: Not an object, other columns than expected, or values of another type.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_kind(record)}, not an object; {_EXPECTED}")
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt = _messages(record["prompt"], "prompt", "user", where)
        completion = _messages(record["completion"], "completion", "assistant", where)
        return with_id({"prompt": prompt, "completion": completion})
    if "text" in record:
        if not isinstance(record["text"], str):
            raise UserError(f"{where}: `text` is {_kind(record['text'])}; expected a string")
        return with_id({"text": _check_text(record["text"], where)})
    found = ", ".join(str(name) for name in record) or "none"
    raise UserError(f"{where} has the wrong columns: found {found}; {_EXPECTED}")


def _parse(text: str, path: Path, line: int) -> Any:
    """Return what a JSON text that begins on a line of a file says."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line + error.lineno - 1}: invalid JSON ({json_fault(error)})") from error
    except (RecursionError, ValueError) as error:  # brackets too deep, a number too long
        raise UserError(f"{path}, line {line}: JSON that cannot be taken in ({str(error)[:80]})") from error


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    # utf-8-sig drops the byte order mark that Windows programs begin with.
    form: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig"}
    try:
        with gzip.open(path, **form) if path.suffix == ".gz" else path.open(**form) as lines:
            if path.suffix == ".json" and (start := lines.read(1024).lstrip()[:1]) != "":
                lines.seek(0)
                if start == "[":
                    records = _parse(lines.read(), path, 1)
                    yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, 1))
                    return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, row {number}", _parse(line.rstrip(), path, number)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is truncated or not a Parquet file ({str(error).splitlines()[0]})") from error
    wanted = [name for name in ("text", "prompt", "completion") if name in table.column_names]
    if "text" not in wanted and len(wanted) < 2:
        raise UserError(f"{path} has the wrong columns: found {', '.join(table.column_names) or 'none'}; {_EXPECTED}")
    number = 0
    for batch in table.select(wanted).to_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    local_only = False
    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except HFValidationError as error:
        raise UserError(
            f"{source!r} is neither a file here nor a possible hub data set id: check the spelling"
        ) from error
    except HfHubHTTPError:
        pass  # reachable: the error of what is asked for next says more
    except Exception:  # the hub's HTTP library changes between releases, and with it its errors' names
        local_only = True
    try:
        data = load_dataset(
            name, config or None, split=split or "train", download_config=DownloadConfig(local_files_only=local_only)
        )
    except Exception as error:  # whatever a hub data set's format can raise
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source!r} is not a file here, and the Hugging Face hub did not give it ({reason}): check the spelling and "
            "the network, name config and split as name:config@split, set HF_TOKEN for gated data, or give a file"
        ) from error
    assert isinstance(data, Dataset)
    for number, record in enumerate(data, 1):
        yield f"{source}, row {number}", record


def read_source(source: str) -> list[Row]:
    """Return the rows of one file or hub data set (``name``, ``name:config``, ``name@split``).

    Raises:
        UserError: Missing file, unknown format, invalid JSON (with the line), wrong columns (with those found), a
            value of the wrong type (with the row), no row at all, or an unreachable hub.
    """
    path = Path(source).expanduser()
    looks_like_file = source.endswith(_SUFFIXES) or source.startswith((".", "/", "~"))
    if path.is_dir():
        raise UserError(f"{source} is a folder: name the files in it ({', '.join(_SUFFIXES)})")
    if not path.is_file() and looks_like_file:
        raise UserError(f"the data file {source} does not exist: check the path")
    if path.is_file() and not source.endswith(_SUFFIXES):
        raise UserError(f"{source} has an unknown format: give {', '.join(_SUFFIXES)} or a hub data set id")
    if not path.is_file():
        records = _hub_records(source)
    else:
        records = _parquet_records(path) if source.endswith(".parquet") else _json_records(path)
    rows = [check_row(record, where) for where, record in records]
    if not rows:
        raise UserError(f"{source} is empty: it holds no row; {_EXPECTED}")
    return rows


def shuffled(rows: list[Row], seed: int) -> Dataset:
    """Return rows in an order that the seed decides."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows_to_dataset(rows)


def read_data(sources: Sequence[str], seed: int = 0) -> Dataset:
    """Return the rows of several sources, mixed and shuffled by the seed.

    Raises:
        UserError: See ``read_source``; or every text is blank.
    """
    rows = [row for source in sources for row in read_source(source)]
    if not any(row["prompt"] is not None or row["text"].strip() for row in rows):
        raise UserError(f"{', '.join(sources) or 'the data'} is empty: every text is blank")
    return shuffled(rows, seed)


def split_held_out(data: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split rows into training and held-out rows.

    Rows that say the same (white space and case aside; of conversations, the prompt) fall on the same side, and the
    held-out side keeps one of them. Which side depends on the seed and the content, not on the order.

    Args:
        data: Rows; see ``qad.data.rows``.
        share: Share of the distinct rows to hold out, at least one of them.
        seed: Of the choice.

    Returns:
        Training rows and held-out rows, both in the order of ``data``.

    Raises:
        UserError: Fewer than two distinct rows.
    """
    identities = [identity(row) for row in data]  # type: ignore[arg-type]
    distinct = sorted(set(identities), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    if len(distinct) < 2:
        raise UserError("the data has fewer than two different rows, so none can be held out for evaluation: add rows")
    held = set(distinct[: min(max(1, math.ceil(share * len(distinct))), len(distinct) - 1)])
    seen: set[str] = set()
    held_rows: list[int] = []
    for number, key in enumerate(identities):
        if key in held and key not in seen:
            seen.add(key)
            held_rows.append(number)
    return data.select([i for i, key in enumerate(identities) if key not in held]), data.select(held_rows)
