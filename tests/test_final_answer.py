"""Final answers: found in worked examples of every form, compared as a person would, by algebra that comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qad import algebra
from qad.final_answer import Kind, answer_of, extract, groups, number, same, strip_thinking

needs_math_verify = pytest.mark.skipif(not algebra.is_installed(), reason="math-verify is not installed: qad[eval]")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>2 + 2 is 4</think>\nFour.", "Four."),
        ("2 + 2 is 4\n</think>\n\nFour.", "Four."),
        ("<think>it may be", ""),
        ("Well. <think>it may be", "Well."),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a</think>b<think>c", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>b<|end_of_solution|>", "b"),
        ("no thoughts", "no thoughts"),
        ("", ""),
    ],
)
def test_thoughts_are_left_out(text: str, left: str) -> None:
    assert strip_thinking(text) == left


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        # Boxes.
        (r"<think>2+2</think>\boxed{4}", "math", "4"),
        (r"First \boxed{3}, no: \boxed{5}.", "math", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", "math", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", "math", r"\{1, 2\}"),
        (r"\boxed{ 1,234 }", "math", "1,234"),
        (r"\fbox{7}", "math", "7"),
        (r"$\boxed{x = \boxed{5}}$", "math", "5"),
        (r"It is \boxed{4} but \boxed{5", "math", "4"),
        (r"\boxed{}", "math", None),
        # What holds nothing is as if it were not there.
        (r"The answer is \boxed{}.", "math", None),
        (r"The answer is \boxed{}.", None, None),
        (r"The answer is \boxed{}.", "text", None),
        (r"The answer is \boxed{}.", "choice", None),
        (r"2 + 2 = 4, so the answer is \boxed{}.", "math", "4"),
        (r"\boxed{4}, I mean \boxed{\text{}}", "math", "4"),
        (r"\boxed{4}, I mean \boxed{ \quad }", None, "4"),
        (r"\boxed{\text{ }}", "text", None),
        (r"\boxed{\mathrm{\textbf{}}}", "math", None),
        (r"\boxed{\_\_\_}", "math", None),
        (r"\boxed{\ldots}", None, None),
        (r"\boxed{...}", "text", None),
        (r"\boxed{{}}", "math", None),
        (r"\boxed{\{\}}", "math", r"\{\}"),
        (r"\boxed{]}", "text", "]"),
        (r"The answer is 5. \boxed{\ }", "math", "5"),
        (r"The answer is 5. \boxed{\ }", None, "5"),
        (r"The answer is 5. \boxed{\hspace{1em}}", "math", "5"),
        (r"The answer is 5. \boxed{\hspace*{1 cm}}", "math", "5"),
        (r"The answer is 5. \boxed{\phantom{0}}", "math", "5"),
        (r"2 + 3 = 5 \boxed{\phantom{0}}", "math", "5"),
        (r"The answer is 5. \boxed{\vphantom{\frac{1}{2}}}", None, "5"),
        (r"The answer is 5. \boxed{\square}", "math", "5"),
        (r"The answer is 5. \boxed{\Box}", "math", "5"),
        (r"The answer is 5. \boxed{\underline{\hspace{1cm}}}", "math", "5"),
        (r"The answer is 5. \boxed{\rule{1cm}{0.4pt}}", "math", "5"),
        (r"\boxed{\hspace{1em}}", "text", None),
        (r"\boxed{\square ABCD}", "math", r"\square ABCD"),
        (r"\boxed{\hspace{1em} 7}", "choice", None),
        (r"\boxed{5\ }", "math", "5"),
        (r"B \boxed{}", "choice", "B"),
        (r"The answer is B \boxed{}", "choice", "B"),
        (r"The answer is B $\boxed{\text{}}$", "choice", "B"),
        (r"Paris \boxed{}", "text", "Paris"),
        (r"Paris $\boxed{\quad}$", "text", "Paris"),
        (r"Paris \boxed{", "text", None),
        (r"\[\boxed{}\]", "text", None),
        (r"\boxed{C}, or \boxed{42}", "choice", "C"),
        (r"The answer is $$ $$.", "math", None),
        (r"The answer is \boxed{5", "math", "5"),
        (r"The answer is 5 \boxed{", "math", "5"),
        (r"The answer is \boxed{Paris", "text", None),
        ("The answer is", "text", None),
        ("Let me see.\n**Answer:** ", "text", None),
        ("Let me see.\n####", "text", None),
        ("Let me see: 7\n####  ", "math", "7"),
        ("The answer is 5.\n#### **", "math", "5"),
        ("The answer is 5.\n##### The end", "math", "5"),
        ("The answer is 5. <answer> </answer>", "math", "5"),
        (r"The answer is 5. <answer>It is \boxed{}</answer>", "math", "5"),
        ("So <answer></answer>", "text", None),
        ("<answer>B</answer> or <answer>42</answer>", "choice", "B"),
        ("\u200b", "text", None),
        ("**", "text", None),
        (r"<think>\boxed{}</think>", "math", None),
        (r"\boxed{\text{(C)}}", "choice", "C"),
        (r"\boxed{\text{(C)}}", None, "C"),
        (r"\boxed{C. 42}", "choice", "C"),
        (r"\boxed{42}", "choice", None),
        # Thoughts.
        (r"<think>it is \boxed{4}", "math", None),
        (r"<think>it is \boxed{4}</think>", "math", "4"),
        ("<think>it is 4</think>", "math", None),
        (r"<think>\boxed{4}</think> The answer is 5.", "math", "5"),
        ("<|begin_of_thought|>1<|end_of_thought|><|begin_of_solution|>The answer is 8<|end_of_solution|>", "math", "8"),
        # GSM8K.
        ("She has 3 * 411 + 1.\n#### 1,234", "math", "1,234"),
        ("#### 7\nThat is all.", "math", "7"),
        ("#### Step 1\nWe add.\n#### Conclusion\nThe answer is 5.", "math", "5"),
        ("work\n#### B", "choice", "B"),
        # Tags.
        ("<answer>12</answer>", None, "12"),
        ("<answer>\\boxed{5}</answer>", "math", "5"),
        ("<answer> B </answer>", "choice", "B"),
        ("<answer>1</answer> no, <answer>2</answer>", "math", "2"),
        # Sentences.
        ("The answer is 42.", None, "42"),
        ("The answer is 3.5.", "math", "3.5"),
        ("The answer is 3.5 apples.", "math", "3.5 apples"),
        ("So the final answer is $\\frac{3}{4}$.", "math", r"\frac{3}{4}"),
        ("The answer is \\(x = 5\\).", "math", "x = 5"),
        ("The answer is $5.", "math", "$5"),
        ("The answer is 3 + 4 = 7.", "math", "7"),
        ("The answer is 5 and not 6", "math", "5"),
        ("The answer to the question is 9.", "math", "9"),
        # "this" holds "is".
        ("It is 9, the answer to this question.", "math", "9"),
        ("It is the answer to this question.", None, None),
        # Half an expression is no answer.
        ("The answer is 1 + 5 =", "math", None),
        ("The answer is 1 + 5 =", None, None),
        ("The answer is $4 + 5 =$.", None, None),
        ("The answer is 3. So the answer is x = 4 +", None, "3"),
        ("The answer is 12 *", None, None),
        ("The answer is -", None, None),
        (r"The answer is 3 \times", None, None),
        ("The answer is 7. Or the answer is 1/", "math", "7"),
        ("#### 4 + 5 =", None, None),
        ("The answer is C++", "text", "C++"),
        ("The answer is Ca2+.", None, "Ca2+"),
        ("The answer is x = 4.", "math", "x = 4"),
        ("The answer is 3 + 4.", "math", "3 + 4"),
        ("The answer is x = 2 * (3 + 4).", "math", "2 * (3 + 4)"),
        ("The answer is 12 (twelve).", "math", "12"),
        ("The answer is 5 km / h.", "math", "5"),
        ("The answer is 5! = 120.", "math", "120"),
        ("The answer is 5!", "math", "5"),
        ("The answer is 1 + 5 = 6", "math", "6"),
        ("The answer is: -7", "math", "-7"),
        ("**Answer:** 12", None, "12"),
        ("**Final Answer**: 7", None, "7"),
        ("Answer:\n42", None, "42"),
        ("The answer is yes.", None, "yes"),
        ("The answer is 3. Wait, the answer is 4.", "math", "4"),
        (f"The answer is {'very ' * 30}long.", None, None),
        ("I cannot say.", None, None),
        # Choices.
        ("Answer: C", "choice", "C"),
        ("Answer: C", None, "C"),
        ("the answer is (b).", "choice", "B"),
        ("(B)", "choice", "B"),
        ("B", "choice", "B"),
        ("b", "choice", "B"),
        ("B) 42", "choice", "B"),
        ("The correct answer is B because A is wrong.", "choice", "B"),
        ("I think option D is best.", "choice", "D"),
        ("**C**", "choice", "C"),
        ("Let me see. (A) is wrong, so it is (B)", "choice", "B"),
        ("The correct option is **A**.", "choice", "A"),
        ("The answer is a dog.", "choice", None),
        ("The answer is A dog.", "choice", None),
        ("I have no idea.", "choice", None),
        # Numbers without a mark.
        ("It costs 1,234.50 dollars", "math", "1,234.50"),
        ("It is -7.", "math", "-7"),
        ("10% of 50 is 5", "math", "5"),
        ("36 - 5 = 31 pencils in 3 boxes.", "math", "31"),
        ("I count 12.\nGood luck!", "math", "12"),
        ("7 + 5 = N", "math", None),
        ("There is none.", "math", None),
        ("It costs 12", None, None),
        # Code.
        ("```python\nprint(1)\n```\nor\n```\nprint(2)\n```\n", "code", "print(2)"),
        ("```python\nprint(1)\n", "code", "print(1)"),
        ("~~~\nx = 1\n~~~", "code", "x = 1"),
        ("```\n```", "code", None),
        ("```python\n```", "code", None),
        ("```python\n# to be done\n```", "code", None),
        ("```python\nx = 1\n```\n```python\n \n```", "code", "x = 1"),
        ("```python\nx = 1\n```\n```python\n# to be done\n", "code", "x = 1"),
        ("# nothing", "code", None),
        ("Hello", "code", None),
        ("42", "code", None),
        ("print(1)", "code", "print(1)"),
        ("`print(1)`", "code", "print(1)"),
        ("Hello there!", "code", None),
        ("<think>```\nx\n```</think>```\nif a:\n    b\n```", "code", "if a:\n    b"),
        # Text.
        ("<think>hm</think>  Paris. ", "text", "Paris."),
        ("<answer>Paris</answer>", "text", "Paris"),
        ("", "text", None),
        ("", "math", None),
        ("", None, None),
    ],
)
def test_worked_examples(text: str, kind: Kind | None, answer: str | None) -> None:
    assert extract(text, kind) == answer


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("so we have 12", "math", None),
        ("so (B)", "choice", None),
        ("Paris is", "text", None),
        ("```\nx = 1\n", "code", None),
        ("```\nx = 1\n```\n```\ny = ", "code", "x = 1"),
        (r"\boxed{4} and more", "math", "4"),
        ("#### 12\nand", "math", "12"),
        ("#### 12\n", "math", "12"),
        # What may go on is no answer: this may have been 100.
        ("The answer is 1", "math", None),
        ("The answer is 1", None, None),
        ("The answer is 1 ", "math", None),
        ("The answer is 12 + ", "math", None),
        ("The answer is 3.", "math", None),
        ("The answer is 5 and", "math", None),
        ("The answer is 5! ", "math", None),
        ("The answer is 5 mil", "math", None),
        ("The answer is x = 1", "math", None),
        ("The answer is -", "math", None),
        ("The answer is 1/", "math", None),
        (r"The answer is $\frac{1}", "math", None),
        (r"The answer is \frac{1}{2}", "math", None),
        ("The answer is **10", "math", None),
        ("The answer is theref", None, None),
        ("Answer: Par", "text", None),
        ("Answer: Par", None, None),
        ("Answer:\n1", "math", None),
        ("Answer: B", "choice", None),
        ("The answer is A ", "choice", None),
        ("#### 1,0", "math", None),
        ("#### B", "choice", None),
        ("#### 7\nNo:\n#### 1", "math", "7"),
        ("The answer is 7. No, the answer is 1", "math", "7"),
        ("<think>hm</think>The answer is 1", "math", None),
        ("The answer is 3 + 4 =\n", "math", None),
        # What has ended may not.
        ("The answer is 100.\nNow let me", "math", "100"),
        ("The answer is 100.\n", "math", "100"),
        ("The answer is 100\n", "math", "100"),
        ("The answer is 3. ", "math", "3"),
        ("The answer is 3. Let", "math", "3"),
        ("The answer is 3! Let", "math", "3"),
        ("The answer is **3.**", "math", "3"),
        ("The answer is 3 apples.", "math", "3 apples"),
        (r"The answer is $\frac{1}{2}$", "math", r"\frac{1}{2}"),
        (r"The answer is $x$, as", "math", "x"),
        ("Answer: Paris\n", "text", "Paris"),
        ("The answer is Paris.", "text", "Paris"),
        ("Answer: B\n", "choice", "B"),
        ("The answer is (B)", "choice", "B"),
        ("The answer is B because of", "choice", "B"),
        ("The answer is A as", "choice", None),
        (r"\boxed{1}", "math", "1"),
        ("<answer>1</answer>", "math", "1"),
        ("<answer>Par</answer>", "text", "Par"),
        ("```\nx = 1\n```", "code", "x = 1"),
        ("<think>The answer is 4</think>", "math", "4"),
        ("The answer is 4 <think>or", "math", "4"),
        ("<|begin_of_solution|>The answer is 8<|end_of_solution|>", "math", "8"),
        # The mark itself was cut off, or is empty.
        (r"4, so the answer is \boxed{4", "math", None),
        (r"4, so the answer is \boxed{}", "math", None),
        (r"The answer is 5. So \boxed{4", "math", "5"),
        # Thoughts that have not ended have no answer behind them, those that have give theirs.
        (r"<think>It is \boxed{4}, or", "math", None),
        (r"<think>It is \boxed{4}</think>", "math", "4"),
        (r"<think>It is \boxed{4}</think>I think that", "math", None),
    ],
)
def test_a_text_that_was_cut_off_has_what_it_marks(text: str, kind: Kind, answer: str | None) -> None:
    assert {answer_of(text, reason, kind) for reason in ("length", "context", "dropped", "lost")} == {answer}
    assert answer_of(text, "stop", kind) == extract(text, kind)


_BALANCED = st.recursive(
    st.text("ab1+", min_size=1, max_size=4) | st.just(r"\{") | st.just(r"\}"),
    lambda inner: st.tuples(inner, inner).map(lambda pair: f"{pair[0]}{{{pair[1]}}}"),
    max_leaves=6,
)


@settings(max_examples=50)
@given(_BALANCED, st.text("ab {}$\n", max_size=10))
def test_a_box_ends_at_its_own_brace(inside: str, around: str) -> None:
    assert extract(f"{around}\n\\boxed{{{inside}}}{around}", None) == inside


@given(st.text(max_size=200), st.sampled_from(["math", "choice", "code", "text", None]), st.booleans())
def test_any_text_has_an_answer_or_none(text: str, kind: Kind | None, marked: bool) -> None:
    found = extract(text, kind, marked=marked)
    assert found is None or found.strip()
    if kind == "choice" and found is not None:
        assert len(found) == 1


_MARKED = st.lists(
    st.sampled_from(
        [
            r"\boxed{4}",
            r"\boxed{B}",
            "#### 5",
            "The answer is 6.",
            "The answer is (C)",
            "<answer>7</answer>",
            "so 8",
            "a",
        ]
    ),
    max_size=4,
).map("\n".join)
_EMPTY = st.sampled_from(
    [
        r"\boxed{}",
        r"$\boxed{\text{ }}$",
        "<answer>\n</answer>",
        "####",
        "The answer is",
        r"The answer is \boxed{}.",
        "Answer: **",
    ]
)


@given(_MARKED, _EMPTY, st.sampled_from(["math", "choice", "text", None]))
def test_an_empty_mark_is_as_if_it_were_not_there(text: str, empty: str, kind: Kind | None) -> None:
    assert extract(f"{text}\n{empty}", kind, marked=True) == extract(f"{text}\n", kind, marked=True)
    assert extract(f"{text}\n```python\n```", "code") == extract(text, "code", marked=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("1{,}234", 1234),
        ("-3", -3),
        ("− 3", -3),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("1e3", 1000),
        ("$5.00", 5),
        (r"\$5", 5),
        ("-$5", -5),
        (r"50\%", 50),
        ("12 cm", 12),
        (r"12\text{ cm}^2", 12),
        ("5 dollars", 5),
        (r"90^\circ", 90),
        ("x = 7", 7),
        ("$7$", 7),
        ("5 million", None),
        ("2 pi", None),
        ("3x", None),
        ("1/0", None),
        ("1,2", None),
        ("1e999999999", None),
        ("seven", None),
        ("", None),
    ],
)
def test_plain_numbers(text: str, value: int | Fraction | None) -> None:
    assert number(text) == value


_SAME = [
    ("1/2", "0.5", "math"),
    ("1,234", "1234", "math"),
    ("12 cm", "12", "math"),
    ("5 dollars", "$5", "math"),
    (r"50\%", "50", "math"),
    (r"50\%", "0.5", "math"),
    ("Yes.", "yes", "math"),
    ("(b)", "B", "choice"),
    ("B. 42", "B", "choice"),
    ("x=1  # one\n", "x = 1", "code"),
    ("if (a):\n  b()", "if a:\n    b()", "code"),
    ("let x; \n\n", "let x;", "code"),
    ("  The  Cat. ", "the cat", "text"),
    ("“Paris”", "paris", "text"),
    ("ﬁne", "fine", "text"),
]
_DIFFERENT = [
    ("7", "8", "math"),
    ("0.333", "1/3", "math"),
    ("5 million", "5", "math"),
    ("listen", "silent", "math"),
    ("0.5", "50", "math"),
    ("yes", "1", "math"),
    ("A", "B", "choice"),
    ("x = 1", "x = 2", "code"),
    ("the cat", "a cat", "text"),
    ("1", "1.0", "text"),
]


@pytest.mark.parametrize(("one", "other", "kind"), _SAME)
def test_answers_that_are_the_same(one: str, other: str, kind: Kind) -> None:
    assert same(one, other, kind)
    assert same(other, one, kind)


@pytest.mark.parametrize(("one", "other", "kind"), _DIFFERENT)
def test_answers_that_differ(one: str, other: str, kind: Kind) -> None:
    assert not same(one, other, kind)
    assert not same(other, one, kind)


@needs_math_verify
@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"\sqrt{4}", "2", True),
        ("5x+3", "3 + 5x", True),
        ("3 + 4", "7", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2, 1)", False),
        ("[1, 2]", "(1, 2)", False),
        ("3x", "3", False),
        ("x^2", "x^3", False),
        (r"\frac{\pi}{2}", r"\pi", False),
        ("}{", "$$", False),
    ],
)
def test_formulas(one: str, other: str, wanted: bool) -> None:
    assert same(one, other, "math") is wanted
    assert same(other, one, "math") is wanted


@needs_math_verify
def test_algebra_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(r"\sqrt{9}", "3", "math")
    monkeypatch.setattr(algebra, "SECONDS", 1.0)
    slow = (r"\left(\frac{x^3+2x+1}{x^2-y^7}\right)^{40}", r"\left(\frac{x^3+2x+1}{x^2-y^7}\right)^{41}")
    began = time.perf_counter()
    assert not same(*slow, "math")
    assert time.perf_counter() - began < 30
    # The next question gets its own answer, and not the one that came too late.
    monkeypatch.setattr(algebra, "SECONDS", 60.0)
    assert same(r"\sqrt{16}", "4", "math")
    assert not same(r"\sqrt{16}", "5", "math")


@needs_math_verify
def test_an_interrupt_leaves_algebra_in_order() -> None:
    # In a process of its own, which gets the signal as Ctrl-C gives it: with its children.
    code = r"""
import os, signal, threading, time
from qad import algebra
from qad.final_answer import same
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
assert same(r"\sqrt{9}", "3", "math")
worker = algebra._worker._process
threading.Timer(1.5, lambda: os.killpg(0, signal.SIGINT)).start()
began = time.perf_counter()
try:
    same(r"\left(\frac{x^3+2x+1}{x^2-y^7}\right)^{40}", r"\left(\frac{x^3+2x+1}{x^2-y^7}\right)^{41}", "math")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - began < 8)
assert worker.poll() is not None
print(same(r"\sqrt{16}", "4", "math"), same(r"\sqrt{16}", "5", "math"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, timeout=120, check=False
    )
    assert done.stdout == "interrupted True\nTrue False\n", done.stderr


@needs_math_verify
def test_algebra_from_any_thread_and_after_a_crash() -> None:
    found: list[bool] = []

    def ask() -> None:
        found.append(same(r"\sqrt{25}", "5", "math"))
        process = algebra._worker._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found.append(same(r"\sqrt{36}", "6", "math"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_groups() -> None:
    assert groups(["1/2", "0.5", None, "50%", "50", "3", "0.50"], "math") == [0, 0, None, 1, 1, 2, 0]
    assert groups(["B", "(b)", "A", None], "choice") == [0, 0, 1, None]
    assert groups([], "math") == []
    assert groups([None, None], "text") == [None, None]
    assert groups(["no letter", "no letter"], "choice") == [0, 0]


_NUMBERS = st.sampled_from(["1", "1.0", "2", "4/2", "0.5", "1/2", "50%", "50", "$2", "2 cm", "-1"])


@given(st.lists(st.none() | _NUMBERS, max_size=8))
def test_groups_of_numbers_are_those_of_their_values(answers: list[str | None]) -> None:
    # Whatever the order: an answer that comes later never joins two classes.
    places = groups(answers, "math")
    for one, here in zip(answers, places, strict=True):
        for other, there in zip(answers, places, strict=True):
            if one is not None and other is not None:
                assert (here == there) == (number(one) == number(other))
    assert [place is None for place in places] == [answer is None for answer in answers]
