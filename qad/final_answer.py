r"""The final answer in a text of reasoning, and whether two answers are the same.

What a text marks as its answer counts, by the most deliberate mark it has: ``<answer>`` tags, then the last
``\boxed{}``, then ``#### x``, then the last "the answer is x" or "Answer: x". A mark that holds nothing, as an empty
box, or nothing of the kind that is looked for, is as if it were not there. Only where no mark gives an answer, and the
kind is known, is one looked for: the last number, a letter in brackets, the last block of code, the text itself.

Thoughts are no answer. Those that have not ended have none behind them; if nothing at all stands behind those that
have, their own marks count.

A text that was cut off has the answer that it marks, or none (``answer_of``): the last number of half a calculation is
none. Whoever votes, counts right answers or judges confidences takes the answer of a trajectory from there.
"""

import ast
import re

from qad.same_answer import Kind, groups, letter, number, plain_text, same

__all__ = ["Kind", "answer_of", "boxed", "extract", "groups", "number", "same", "strip_thinking"]

OPENING = re.compile(r"<think(?:ing)?>|<\|begin_of_thought\|>")
_CLOSING = re.compile(r"</think(?:ing)?>|<\|end_of_thought\|>")
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_LEAD = r"""
    (?: \b(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)(?:\s+to\s+[^.:\n]{1,60})?
        \s*(?:\*\*)?\s*(?:is|would\ be|must\ be)(?:\s+therefore|\s+thus)?\b\s*:?
      | (?:^|(?<=[\n*\#>]))\s*(?:final\s+)?answer\s*(?:\*\*)?\s*[:=]
    )
    """
_PHRASE = re.compile(_LEAD + r"\s*(?:\*\*)?[ \t]*\n*(?=(\S[^\n]*))", re.IGNORECASE | re.VERBOSE)
_FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n`]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?!\s*\d[\d,.]*\s+[a-z])([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.])[-−+]?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?:\.\d+)?)?(?:\s?\\?%)?(?![\w])|"
    r"(?<![\w.])[-−+]?\.\d+(?![\w])"
)
# What marks an answer and holds none, besides boxes: the text around it is then no answer either.
_EMPTY_MARK = re.compile(
    rf"<answer>\s*</answer>|^[ \t]*\#{{4}}[ \t]*\Z|{_LEAD}[\s*.:]*\Z", re.IGNORECASE | re.MULTILINE | re.VERBOSE
)
# What a typesetter prints nothing for.
_BLANK = re.compile(
    r"\\(?:boxed|fbox|text\w*|math\w+|mbox|operatorname)\s*\{\s*\}|\\(?:q?quad|displaystyle|left|right)\b|"
    r"\\[,;:! ()\[\]]|[\s\u200b-\u200d\u2060\ufeff]"
)
# A gap that was to be filled, signs of formulas and of Markdown, braces that only group, and fonts.
_GAP = re.compile(r"\\[lc]?dots\b|\\?_|(?<!\\)[{}]|[.,;:?!…$~*`]|\\(?:text|math)\w*")
# A full stop within a number ends no sentence.
_SENTENCE_END = re.compile(r"(?<=\S)[.;!?](?=\s|$|\*)|\n")
_LONGEST_PHRASE = 80


def strip_thinking(text: str) -> str:
    """Return what stands behind the thoughts of a text, or all of it if it has none.

    The opening tag may be missing if the closing one is there, as where a chat template ends with it: for thoughts that
    have not ended ``qad.think.thoughts`` puts it back. Thoughts that do not end run to the end.
    """
    closed = [found.end() for found in _CLOSING.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    if opened := OPENING.search(rest):
        rest = rest[: opened.start()]
    return _SOLUTION.sub("", rest).strip()


def extract(text: str, kind: Kind | None, *, marked: bool = False) -> str | None:
    """Return the final answer in a text, None if there is none.

    Args:
        text: Of a model, thoughts included.
        kind: What is looked for: ``math``: a number or formula; ``choice``: a capital letter; ``code``: a program;
            ``text``: any text, and without a mark the whole of it; None: what is marked as the answer, whatever it is.
        marked: Take only what is marked as the answer, as for a text that was cut off: its last number is not an
            answer. Of code, only a block that is closed counts.
    """
    body = strip_thinking(text)
    if not body and _CLOSING.search(text):
        # Nothing came after the thoughts.
        body, marked = _SOLUTION.sub("", OPENING.sub("", _CLOSING.sub("", text))).strip(), True
    if kind == "code":
        return _code(body, closed=marked)
    found = _marked(body, kind)
    if found is not None or marked or kind is None or not body:
        return found
    if kind == "choice":
        return _unmarked_letter(body)
    if kind == "math":
        return _unmarked_number(body)
    # Where a mark was set, the text around it was not meant to be the answer.
    return None if _BOX.search(body) or _EMPTY_MARK.search(body) or _is_empty(body, kind) else body


def answer_of(text: str, reason: str, kind: Kind | None) -> str | None:
    """Return the answer of a trajectory, None if it has none. There is no other rule of what a trajectory answers.

    Args:
        text: All of it, thoughts included.
        reason: Why it ended. ``stop``: by itself; after anything else it was cut off, and only what it marks counts.
        kind: As for ``extract``.
    """
    return extract(text, kind, marked=reason != "stop")


def _marked(body: str, kind: Kind | None) -> str | None:
    """Return the answer that the most deliberate mark of a text gives."""
    for inside in reversed(_ANSWER.findall(body)):
        # A box within tags holds their answer, also if it holds nothing.
        for marked in reversed(_boxes(inside) or [inside]):
            if (fitting := _fitting(marked, kind)) is not None:
                return fitting
    for box in reversed(_boxes(body)):
        if (fitting := _fitting(box, kind)) is not None:
            return fitting
    for line in _HASHES.findall(body)[-1:]:
        fitting = _fitting(line, kind)
        # Elsewhere than at the end they may be the heading of a section.
        if fitting is not None and (body.rstrip().endswith(line) or number(line) is not None):
            return fitting
    for phrase in reversed(list(_PHRASE.finditer(body))):
        fitting = _from_sentence(phrase[1], kind)
        if fitting is not None:
            return fitting
    return None


def _boxes(text: str) -> list[str]:
    """Return what each box that is closed holds, its braces matched; a box in a box comes after it."""
    found = []
    for box in _BOX.finditer(text):
        depth, at = 1, box.end()
        while at < len(text) and depth:
            # An escaped brace is a character.
            if text[at] == "\\":
                at += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            found.append(text[box.end() : at - 1].strip())
    return found


def boxed(body: str) -> bool:
    """Return whether the last box of a text, thoughts taken away, is closed and holds something."""
    opened = [box.start() for box in _BOX.finditer(body)]
    return bool(opened) and any(not _is_empty(inside, None) for inside in _boxes(body[opened[-1] :]))


def _is_empty(text: str, kind: Kind | None) -> bool:
    """Return whether an answer holds nothing: white space, commands without contents, a gap to be filled.

    Of texts punctuation may be the answer, as far as texts are told apart by it.
    """
    before = None
    while before != text:
        before, text = text, _BLANK.sub("", text)
    return not plain_text(text if kind == "text" else _GAP.sub("", text))


def _tidy(text: str) -> str:
    """Return an answer without the marks of Markdown and of mathematics around it."""
    text = text.strip().strip("*`").strip()
    text = re.sub(r"^(?:\\\(|\\\[|\$+(?!\d)|\$(?=.*\$$))\s*|\s*(?:\\\)|\\\]|\$+)$", "", text, flags=re.DOTALL)
    if wrapped := re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", text):
        text = wrapped[1]
    text = text.strip().strip('*`"“”').strip()
    return text[:-1].rstrip() if text.endswith((".", ",", ";")) else text


def _fitting(text: str, kind: Kind | None) -> str | None:
    """Return a marked answer in the form of its kind, None if it is not of that kind or holds nothing."""
    if _is_empty(text, kind):
        return None
    if kind == "choice":
        return letter(text)
    tidy = _tidy(text)
    if kind is None and re.fullmatch(r"\(([A-Z])\)|([A-Z])\)?", tidy):
        return letter(tidy)
    return tidy or None


def _from_sentence(text: str, kind: Kind | None) -> str | None:
    """Return the answer with which the rest of a line begins."""
    if kind != "choice":
        # Boxes were looked into already: one that stands here holds nothing, or was cut off in its middle.
        text = _BOX.split(text, maxsplit=1)[0]
    if kind == "text":
        return _fitting(text, kind)
    if chosen := _leading_letter(text):
        return chosen if kind != "math" or _tidy(text) == chosen else None
    if kind == "choice":
        return None
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    if formula := _FORMULA.search(sentence):
        return _fitting(next(part for part in formula.groups() if part), kind)
    tidy = _tidy(sentence)
    if number(tidy) is not None:
        return tidy
    last = _tidy(tidy.rpartition("=")[2])
    numbers = _NUMBER.findall(last)
    if numbers and (len(last.split()) > 1 or "=" in tidy):
        return numbers[0].strip()
    return tidy if len(tidy) <= _LONGEST_PHRASE and not _is_empty(tidy, kind) else None


def _leading_letter(text: str) -> str | None:
    """Return the choice with which a sentence begins: ``(B)``, ``B.``, ``**B**``, ``B) 42``, not ``A dog``."""
    text = re.sub(
        r"^(?:(?:the\s+)?(?:option|choice)\s+|[*$`\s]|\\\(|\\boxed\{|\\text\{)+", "", text, flags=re.IGNORECASE
    )
    if found := re.match(r"[(\[]\s*([A-Za-z])\s*[)\]]", text):
        return found[1].upper()
    if found := re.match(r"([A-Z])(?:[).:,;*$}`]|\s*$|\s+(?:because|since|as|which|-|–|—)\b)", text):
        return found[1]
    return None


def _unmarked_number(body: str) -> str | None:
    """Return the last number, or the first behind the last equals sign of the sentence in which it stands."""
    for sentence in reversed(_SENTENCE_END.split(body)):
        _, equals, right = sentence.rpartition("=")
        if numbers := _NUMBER.findall(right):
            return numbers[0 if equals else -1].strip()
    return None


def _unmarked_letter(body: str) -> str | None:
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    if len(lines) == 1 and (chosen := _leading_letter(lines[0])):
        return chosen
    if chosen := letter(lines[-1]) if len(lines[-1]) <= 8 else None:
        return chosen
    told = re.findall(r"\b(?:option|choice|answer)\s+\(?([A-Z])\b\)?|\*\*\(?([A-Z])[).]?\*\*|(?<!\w)\(([A-Z])\)", body)
    return next((part for part in told[-1] if part), None) if told else None


def _code(body: str, *, closed: bool) -> str | None:
    blocks = list(_FENCE.finditer(body))
    if closed:
        blocks = [block for block in blocks if block[0].rstrip().endswith(block[1]) and block[0].count(block[1]) > 1]
    for block in reversed(blocks):
        if not _does_nothing(block[2]):
            return block[2].strip("\n")
    if closed:
        return None
    program = body.strip("`\n")
    statements = _statements(program)
    # A word and a number are Python too.
    if statements is None or all(isinstance(one, ast.Expr) and _is_word(one.value) for one in statements):
        return None
    return program


def _statements(program: str) -> list[ast.stmt] | None:
    """Return the statements of a program, None if it is no Python."""
    try:
        return ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _does_nothing(block: str) -> bool:
    """Return whether a block of code holds nothing but white space and comments."""
    return not block.strip() or _statements(block) == []


def _is_word(value: ast.expr) -> bool:
    return isinstance(value, ast.Name | ast.Constant)
