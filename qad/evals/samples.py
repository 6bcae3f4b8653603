"""Samples on disk: what a model answered, row by row, so that no answer is ever asked for twice.

A file of JSON lines holds the rows, and a file beside it what they were made with. Rows are written as soon as an item
is answered, as far as it is, and flushed to the disk: whatever ends the program, a killed process, a server that goes
away or a full disk, costs no answer that was complete. A torn end is cut off when the file is opened again, and what an
item still lacks is asked for. Rows that were made with something else than what is asked for now are never mixed in:
that is an error. Rows that were judged by other rules keep their texts and are judged anew.

Memory holds where each item's rows lie, and not the rows.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from qad.closing import Closing
from qad.errors import UserError
from qad.evals.setting import FORMAT, Setting, agreed
from qad.evals.task import JUDGING, Item, Task
from qad.files import explain, replacing_file

try:
    import fcntl
except ImportError:  # Windows: two programs that write one file are then not told apart
    fcntl = None

DELIBERATION = "deliberation"


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        id, task, model: Of what and by whom; the model by its name in the table.
        k: How many were made side by side.
        index: Which of them.
        text: All of it, thoughts included, with the tag that opens them also where the prompt ended with that.
        answer, correct, format_ok, detail: What the task's judge said.
        level: Of the item.
        n_tokens: Of the answer.
        mean_logprob: Mean log-probability of its tokens under the model; None where the engine tells none.
        lowest_window_logprob: The mean of the least likely stretch of it.
        reason: Why it ended.
        seconds: From the question until it ended.
        item: Fingerprint of the question and its judge's data.
        judged: By which rules: ``judging`` of the item. Empty in rows that were made before there were several.
        deliberation: Whether it was deliberated from the trajectories.
    """

    id: str
    task: str
    model: str
    k: int
    index: int
    text: str
    answer: str | None
    correct: bool
    format_ok: bool
    detail: str
    level: int | None
    n_tokens: int
    mean_logprob: float | None
    lowest_window_logprob: float | None
    reason: str
    seconds: float
    item: str
    judged: str = ""
    deliberation: bool = False

    def to_row(self) -> dict[str, Any]:
        """Return the row of the file."""
        row = asdict(self)
        if row.pop("deliberation"):
            row["pass"] = DELIBERATION
        return row


_FIELDS = tuple(one.name for one in fields(Sample) if one.name not in ("deliberation", "judged"))


def sample_of(row: dict[str, Any]) -> Sample:
    """Return the sample of a row; columns that it does not know are left out.

    Raises:
        KeyError, TypeError: It is no row of samples.
    """
    return Sample(
        **{name: row[name] for name in _FIELDS},
        judged=row.get("judged", ""),
        deliberation=row.get("pass") == DELIBERATION,
    )


def fingerprint(item: Item) -> str:
    """Return what tells an item from a changed one: 16 hexadecimal digits of its prompt, solutions and judge's data."""
    told = [item.prompt, item.solution, dict(item.meta), *([list(item.others)] if item.others else [])]
    parts = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def judging(task: Task, item: Item) -> str:
    """Return by which rules an item's answers are judged now."""
    return f"{JUDGING} {task.judge(item)}"


# Signs besides the line feed at which readers of text may end a line.
_LINE_ENDS = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"})


def _line(sample: Sample) -> bytes:
    """Return the line of a sample."""
    text = json.dumps(sample.to_row(), ensure_ascii=False).translate(_LINE_ENDS)
    # Half a character, as a model may write it, has no bytes: it becomes a question mark.
    return f"{text}\n".encode("utf-8", "replace")


def _read(line: bytes) -> Sample | None:
    """Return the sample of a line; None if it is torn or something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        return sample_of(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def no_samples(path: Path) -> UserError:
    """Return the error for a file that holds something else than samples."""
    return UserError(f"{path} is no file of samples, for it holds no answers of `qad eval`: give one that it made")


class Rows:
    """Where the rows of each item lie in a file.

    Args:
        file: Opened for reading bytes; it stays the caller's.
        path: Its name, for messages.

    Attributes:
        end: Where the whole rows end.
        torn: How many lines follow that are none.

    Raises:
        UserError: It is damaged elsewhere than at its end, or no file of samples.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.end = self.torn = 0
        # By pass, then by item: the place of each index.
        self._places: dict[bool, dict[str, dict[int, tuple[int, int]]]] = {False: {}, True: {}}
        self._judged: dict[str, Counter[str]] = {}
        position = 0
        file.seek(0)
        for number, line in enumerate(file, 1):
            position += len(line)
            sample = _read(line)
            if sample is None:
                if not self.end and line.endswith(b"\n"):
                    raise no_samples(path)
                self.torn += 1
            elif self.torn:
                raise UserError(
                    f"line {number - self.torn} of {path} is damaged: delete it, the answer is then asked for again, "
                    "or choose another folder with -o"
                )
            elif sample.index in self._places[sample.deliberation].get(sample.id, {}):
                raise UserError(f"line {number} of {path} is there twice: delete it")
            else:
                self.add(sample, position - len(line), position)

    def add(self, sample: Sample, start: int, end: int) -> None:
        """Note where the row of a sample lies, at the end of the file."""
        self._places[sample.deliberation].setdefault(sample.id, {})[sample.index] = (start, end)
        self._judged.setdefault(sample.id, Counter())[sample.judged] += 1
        self.end = end

    def judged(self, item: str) -> Counter[str]:
        """Return by which rules how many rows of an item were judged."""
        return self._judged.get(item, Counter())

    def lines(self) -> Iterator[Sample]:
        """Yield every whole row, in the order of the file."""
        self._file.seek(0)
        while self._file.tell() < self.end:
            yield sample_of(json.loads(self._file.readline()))

    def ids(self) -> list[str]:
        """Return the items that have trajectories, in the order in which they were answered."""
        return list(self._places[False])

    def read(self, item: str, *, deliberation: bool = False) -> tuple[Sample, ...]:
        """Return the rows of an item by index, none if it has none."""
        found = []
        for _, (start, end) in sorted(self._places[deliberation].get(item, {}).items()):
            self._file.seek(start)
            found.append(sample_of(json.loads(self._file.read(end - start))))
        return tuple(found)


class SampleFile(Closing):
    """A file of samples, open for more.

    Args:
        path: The JSONL file; what it was made with stands in a file of the same name that ends in ``.json``.
        setting: What is asked for.

    Attributes:
        path: The file.
        cut: Torn rows that were cut off its end.

    Raises:
        Mismatch: It was made with something else.
        UserError: It is damaged in its middle, is being written by somebody else, or cannot be written.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path = path
        self.cut = 0
        self._setting = setting
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
        except OSError as error:
            raise explain(error, path) or error from error
        try:
            self._lock()
            self._settle()
            self._scan()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        assert self._file is not None
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path} is being written by another qad eval: wait for it") from error

    def _settle(self) -> None:
        """Hold the setting against the stored one, and store what is agreed.

        Raises:
            UserError: They differ; see ``agreed``.
        """
        self._setting = agreed(self.path, self._setting)
        beside = self.path.with_suffix(".json")
        content = json.dumps({"format": FORMAT, "setting": asdict(self._setting)}, indent=1) + "\n"
        if not beside.is_file() or beside.read_bytes() != content.encode():
            with replacing_file(beside) as temporary:
                temporary.write_text(content, encoding="utf-8")

    def _scan(self) -> None:
        """Find where each item's rows lie, and cut off what an interrupted write left."""
        assert self._file is not None
        self._rows = Rows(self._file, self.path)
        self.cut = self._rows.torn
        if self.cut:
            self._file.truncate(self._rows.end)
            os.fsync(self._file.fileno())

    def samples(self, item: Item, *, deliberation: bool = False) -> tuple[Sample, ...]:
        """Return the rows of an item by index, as far as there are any.

        Raises:
            UserError: They were made of another item of that name.
        """
        found = self._rows.read(item.id, deliberation=deliberation)
        if found:
            self._check(found[0], item)
        return found

    def outdated(self, task: Task) -> int:
        """Return how many rows of a task's items were judged by other rules than there are now."""
        found = 0
        for item in task.items:
            judged = self._rows.judged(item.id)
            found += judged.total() - judged[judging(task, item)]
        return found

    def judge_anew(self, task: Task, judge: Callable[[Item, Sample], Sample]) -> None:
        """Judge the rows of a task's items that were judged by other rules than there are now.

        The file is replaced whole or not at all. Rows of items that the task does not have now stay as they are.

        Args:
            task: Whose items.
            judge: Returns a sample with another verdict.

        Raises:
            UserError: The disk is full, an item has changed, or the judge cannot work; the file is as it was.
        """
        count = self.outdated(task)
        if not count:
            return
        items = {item.id: item for item in task.items}
        with replacing_file(self.path) as temporary:
            with temporary.open("wb") as new:
                for sample in self._rows.lines():
                    item = items.get(sample.id)
                    if item is not None and sample.judged != judging(task, item):
                        self._check(sample, item)
                        sample = replace(judge(item, sample), judged=judging(task, item))
                    new.write(_line(sample))
            # Its lock goes with it.
            self.close()
        self._file = self.path.open("ab+")
        self._lock()
        self._scan()

    def _check(self, sample: Sample, item: Item) -> None:
        if sample.item != fingerprint(item):
            raise UserError(
                f"{self.path} has samples of another item {item.id!r}: the task has changed since; choose another "
                "folder with -o"
            )

    def append(self, samples: Sequence[Sample]) -> None:
        """Write rows, and wait until they are on the disk.

        Raises:
            UserError: The disk is full, or the place not writable; none of the rows was written, and the file is
                closed.
        """
        assert self._file is not None
        lines = [_line(one) for one in samples]
        position = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._abandon(position)
            raise explain(error, self.path) or error from error
        for sample, line in zip(samples, lines, strict=True):
            self._rows.add(sample, position, position + len(line))
            position += len(line)

    def _abandon(self, end: int) -> None:
        """Cut the file back to what it held; what waits in the buffer is thrown away with it."""
        assert self._file is not None
        # Closed first: closing writes what waits in the buffer, if it can.
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            os.truncate(self.path, end)

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
