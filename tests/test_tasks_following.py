"""Instructions that can be checked: IFEval and IFBench."""

from pathlib import Path
from typing import Any

import pytest

from qad.errors import UserError
from qad.evals import tasks
from qad.evals.tasks import following
from tests.helpers_rows import write_rows

IFEVAL = [
    # instruction, its arguments, a text that keeps it, one that does not
    ("punctuation:no_comma", {}, "No comma here.", "A comma, here."),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 5}, "one two three four five", "one two"),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 3},
        "I saw Dr. Two. He is in.",
        "Yes. It is so. No.",
    ),
    ("detectable_format:json_format", {}, '{"a": 1}', "{a: 1}"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one*"),
    ("change_case:english_lowercase", {}, "this is all lower case english.", "This is not."),
    ("change_case:english_capital", {}, "THIS IS ALL UPPER CASE ENGLISH.", "THIS IS Not."),
    ("startend:quotation", {}, '"Quoted."', "Not quoted."),
    ("startend:end_checker", {"end_phrase": "The end."}, "It was so. The end.", "It was so."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A dog.", "A cat."),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "at least"}, "ha ha", "ha"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein ganz gewöhnlicher deutscher Satz.",
        "It is English.",
    ),
    ("combination:two_responses", {}, "One.******Two.", "One."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\n\nP.S. More.", "Text."),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "NO WAY so",
        "NO so",
    ),
]


@pytest.mark.parametrize(("instruction", "arguments", "kept", "broken"), IFEVAL)
def test_ifeval_checks_each_instruction(
    instruction: str, arguments: dict[str, Any], kept: str, broken: str, tmp_path: Path
) -> None:
    # The hub fills a row with every argument that any instruction has.
    every = {"num_words": None, "keyword": None, "language": None, **arguments}
    row = {"key": 7, "prompt": "Say it.", "instruction_id_list": [instruction], "kwargs": [every]}
    task = tasks.load("ifeval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert item.prompt == "Say it."
    assert task.kind is None
    right = task.score(item, f"<think>\n{broken}\n</think>\n{kept}")
    assert right.correct, right
    assert right.answer == kept
    wrong = task.score(item, broken)
    assert not wrong.correct
    assert instruction in wrong.detail


def test_ifeval_wants_every_instruction_and_tells_what_would_do_loosely(tmp_path: Path) -> None:
    row = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    task = tasks.load("ifeval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert task.score(item, '"No comma."').correct
    assert task.score(item, '"A, comma."').detail == "not kept: punctuation:no_comma"
    assert task.score(item, 'Sure, here it is:\n"No comma."').detail.endswith("; kept loosely")
    for empty in ("", "<think>\n", "<think>\nwell\n</think>\n"):
        score = task.score(item, empty)
        assert (score.correct, score.answer, score.format_ok) == (False, None, False)


def test_ifeval_scores_the_same_twice_and_leaves_chance_alone(tmp_path: Path) -> None:
    import random

    row = {"key": 1, "prompt": "p", "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{}]}
    task = tasks.load("ifeval", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    # The number is not given, so that the checker draws one, up to 20.
    verdicts = set()
    for seed in range(20):
        random.seed(seed)
        state = random.getstate()
        verdicts.add(task.score(item, "It is so. " * 10).correct)
        assert random.getstate() == state
    assert len(verdicts) == 1


@pytest.mark.parametrize(
    ("instruction", "arguments", "kept", "broken"),
    [
        ("count:word_count_range", {"min_words": 2, "max_words": 3}, "two words", "one two three four"),
        ("count:numbers", {"N": 2}, "1 and 2", "1"),
        ("format:no_whitespace", {}, "nowhitespace", "white space"),
        ("words:palindrome", {}, "level radar civic refer rotor kayak madam stats tenet racecar", "no"),
        ("sentence:increment", {"small_n": 1}, "One two. One two three.", "One two. One two."),
        ("custom:multiples", {}, "14 21 28 35 42 49", "14"),
    ],
)
def test_ifbench_checks_each_instruction(
    instruction: str, arguments: dict[str, Any], kept: str, broken: str, tmp_path: Path
) -> None:
    row = {"key": "7", "prompt": "Say it.", "instruction_id_list": [instruction], "kwargs": [arguments]}
    task = tasks.load("ifbench", path=write_rows(tmp_path / "rows.jsonl", [row]))
    (item,) = task.items
    assert task.score(item, kept).correct, task.score(item, kept)
    assert instruction in task.score(item, broken).detail


def test_ifbench_says_which_data_its_checkers_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    row = {"key": "7", "prompt": "p", "instruction_id_list": ["ratio:stop_words"], "kwargs": [{"percentage": 50}]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    following._registry("ifbench")
    monkeypatch.setattr(nltk.data, "path", nltk.data.path[:1])
    with pytest.raises(UserError, match="nltk.downloader stopwords"):
        tasks.load("ifbench", path=path)


def test_sentences_are_split_as_nltk_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    import punkt

    from qad.evals.tasks import sentences

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    sentences.provide()
    text = "Dr. Smith paid $3.50 to J. Bach at 5 p.m. However, e.g. Mr. Roe did not. Why? “No!” he said... It was so."
    assert nltk.sent_tokenize(text) == punkt.sent_tokenize(text)
    assert len(nltk.sent_tokenize(text)) >= 4
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
