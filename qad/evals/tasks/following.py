"""IFEval and IFBench: prompts with instructions whose keeping a program can check; the checkers are if-verifiable's.

Right is what the papers call prompt-level strict: every instruction is kept, by the text as it stands. Whether it would
be kept loosely (first or last line taken away, stars of Markdown removed) stands in the detail. A text that was cut off
is judged as it stands too, as the papers' own programs do: what it is to contain may be there already.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qad.errors import UserError
from qad.evals.task import Item, Score
from qad.evals.tasks import sentences
from qad.evals.tasks.items import distinct, item_id
from qad.evals.tasks.rows import Source, rows_of
from qad.final_answer import strip_thinking

_COLUMNS = {"key": "key", "prompt": "prompt", "instructions": "instruction_id_list", "arguments": "kwargs"}
_SOURCES = {
    "ifeval": Source("google/IFEval", _COLUMNS, splits={"test": "train"}),
    "ifbench": Source("allenai/IFBench_test", _COLUMNS, splits={"test": "train"}),
}
# What two checkers of IFBench need beyond sentences, which no package holds.
_NEEDED = {
    "words:start_verb": ("taggers/averaged_perceptron_tagger_eng", "averaged_perceptron_tagger_eng"),
    "ratio:stop_words": ("corpora/stopwords", "stopwords"),
}


@contextlib.contextmanager
def _no_download(nltk: Any) -> Iterator[None]:
    download = nltk.download
    nltk.download = lambda *arguments, **options: False
    try:
        yield
    finally:
        nltk.download = download


def _registry(benchmark: str) -> dict[str, Any]:
    """Return the checkers of a benchmark by the names of their instructions."""
    sentences.provide()
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise UserError(f"{benchmark} needs the package {error.name}: run `pip install 'qad[eval]'`") from error
    # Otherwise the language of a short text differs from run to run.
    langdetect.DetectorFactory.seed = 0
    try:
        # Importing IFBench's checkers fetches data of NLTK; what is needed is looked for below.
        with _no_download(nltk):
            module = import_module(f"if_verifiable.{benchmark}.instructions_registry")
    except ImportError as error:
        raise UserError(f"{benchmark} needs the package {error.name}: run `pip install 'qad[eval]'`") from error
    return module.INSTRUCTION_DICT


def _check_data(items: Sequence[Item]) -> None:
    """Raise the user's error if checkers that will be asked lack data of NLTK's."""
    import nltk

    asked = {instruction for item in items for instruction in item.meta["instructions"]}
    lacking = []
    for instruction, (place, name) in _NEEDED.items():
        if instruction in asked:
            try:
                nltk.data.find(place)
            except LookupError:
                lacking.append(name)
    if lacking:
        raise UserError(
            f"checkers of IFBench need more of NLTK's data: run `python -m nltk.downloader {' '.join(lacking)}`"
        )


@contextlib.contextmanager
def _same_chance() -> Iterator[None]:
    """Let checkers, which draw the arguments that are missing, draw the same ones, and nobody else notice."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@dataclass(frozen=True)
class InstructionTask:
    """Prompts with instructions.

    Attributes:
        name: ``ifeval`` or ``ifbench``.
        items: The prompts, with instructions and their arguments in ``meta``.
        kind: None: such texts cannot be compared for a vote.
    """

    name: str
    items: Sequence[Item]
    kind: None = None
    notes: Sequence[str] = ()

    def judge(self, item: Item) -> str:
        """Return the benchmark whose checkers judge."""
        return self.name

    def score(self, item: Item, text: str, reason: str = "stop") -> Score:
        """Judge a text by the checkers of its instructions, whatever it was ended by."""
        from if_verifiable.common import evaluate_instructions

        body = strip_thinking(text)
        if not body:
            return Score(False, None, False, "no answer behind the thoughts")
        with _same_chance():
            results, scores = evaluate_instructions(
                body,
                list(item.meta["instructions"]),
                list(item.meta["arguments"]),
                item.prompt,
                _registry(self.name),
            )
        assert len(results) == len(item.meta["instructions"])
        failed = [result.instruction_id for result in results if not result.strict_pass]
        loose = "; kept loosely" if failed and scores.binary_loose else ""
        return Score(not failed, body, True, f"not kept: {', '.join(failed)}{loose}" if failed else "")


def names() -> list[str]:
    """Return the names of the tasks."""
    return list(_SOURCES)


def load(name: str, path: Path | None, limit: int | None, split: str) -> InstructionTask:
    """Return ``ifeval`` or ``ifbench``.

    Raises:
        UserError: The checkers or their data are missing, no network and no path, other columns, or an instruction
            for which there is no checker.
    """
    known = _registry(name)
    items = []
    for where, row in rows_of(name, _SOURCES[name], path, split):
        instructions, arguments = row["instructions"], row["arguments"]
        if not isinstance(instructions, list) or not isinstance(arguments, list) or len(instructions) != len(arguments):
            raise UserError(f"{where}: `instruction_id_list` and `kwargs` are no lists of the same length")
        if unknown := [each for each in instructions if each not in known]:
            raise UserError(f"{where}: {name} has no checker for {', '.join(unknown)}")
        # The hub gives every row every argument, most of them empty.
        meta = {
            "instructions": instructions,
            "arguments": [{key: value for key, value in each.items() if value is not None} for each in arguments],
        }
        items.append(Item(id=item_id(row["key"], row["prompt"]), prompt=row["prompt"], meta=meta))
    items = distinct(items)[:limit]
    _check_data(items)
    return InstructionTask(name, items)
