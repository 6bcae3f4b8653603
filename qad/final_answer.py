r"""The final answer in a text of reasoning, and whether two answers are the same.

What a text marks as its answer counts, by the most deliberate mark it has: ``<answer>`` tags, then the last
``\boxed{}``, then ``#### x``, then the last "the answer is x" or "Answer: x". A mark that holds nothing, as an empty
box, or nothing of the kind that is looked for, is as if it were not there. Only where no mark gives an answer, and the
kind is known, is one looked for: the last number, a letter in brackets, the last block of code, the text itself.

Thoughts are no answer. Those that have not ended have none behind them; if nothing at all stands behind those that
have, their own marks count.

A text that was cut off has the answer that it marks, or none (``answer_of``): the last number of half a calculation is
none. Nor is "The answer is 1", which may have become 100: a mark without an end of its own needs the end of its
sentence or line. Whoever votes, counts right answers or judges confidences takes the answer of a trajectory from there.
"""

import ast
import re

from qad.same_answer import Kind, groups, letter, number, plain_text, same

__all__ = ["Kind", "answer_of", "boxed", "extract", "groups", "number", "same", "strip_thinking"]

OPENING = re.compile(r"<think(?:ing)?>|<\|begin_of_thought\|>")
_CLOSING = re.compile(r"</think(?:ing)?>|<\|end_of_thought\|>")
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")
_SOLVED = re.compile(r"<\|end_of_solution\|>\s*\Z")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_LEAD = r"""
    (?: \b(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)(?:\s+to\s+[^.:\n]{1,60})?
        \s*(?:\*\*)?\s*\b(?:is|would\ be|must\ be)(?:\s+therefore|\s+thus)?\b\s*:?
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
# What a typesetter prints nothing for, or an empty place to write in.
_BLANK = re.compile(
    r"\\(?:boxed|fbox|text\w*|math\w+|[mh]box|operatorname|underline)\s*\{\s*\}|"
    r"\\(?:q?quad|en(?:space|skip)|thinspace|displaystyle|left|right|square|Box)(?![a-zA-Z])|"
    r"\\[hvm]space\*?\s*\{[^{}]*\}|\\[hv]?phantom\s*\{(?:[^{}]|\{[^{}]*\})*\}|\\rule\s*\{[^{}]*\}\s*\{[^{}]*\}|"
    r"\\[,;:! ()\[\]]|[\s\u200b-\u200d\u2060\ufeff]"
)
# A gap that was to be filled, signs of formulas and of Markdown, braces that only group, and fonts.
_GAP = re.compile(r"\\[lc]?dots\b|\\?_|(?<!\\)[{}]|[.,;:?!…$~*`]|\\(?:text|math)\w*")
# A full stop within a number ends no sentence, nor does the factorial in 5! = 120.
_SENTENCE_END = re.compile(r"(?<=\S)(?:[.;?]|!(?!\s*=))(?=\s|$|\*)|\n")
# The end of half an expression. A sign right behind a letter may belong to it, as in A+ or Ca2+.
_OPERATOR_LAST = re.compile(
    r"(?:=|≈|<|>|\\(?:times|cdot|div|pm|approx|frac|sqrt)|(?:(?:^|[^\w.,])[\d.,]*|[\s)}\]])[-−+/^×÷·±]|(?<=\s)\*)\s*\Z"
)
# What a calculation is written with, and what makes it one.
_CALCULATION = re.compile(r"(?=.*\d\s*[-−+*/^×÷·]\s*\(*\d)[-−+*/^×÷·().,\d\s]+")
# Signs of formulas around nothing.
_NO_FORMULA = re.compile(r"\$\$\s*\$\$|\$\s*\$|\\\(\s*\\\)|\\\[\s*\\\]")
_LONGEST_PHRASE = 80


def strip_thinking(text: str) -> str:
    """Return what stands behind the thoughts of a text, or all of it if it has none.

    The opening tag may be missing if the closing one is there, as where a chat template ends with it: for thoughts that
    have not ended ``qad.think.opening_tag`` puts it back. Thoughts that do not end run to the end.
    """
    return _behind_thoughts(text).strip()


def _behind_thoughts(text: str) -> str:
    """Return what stands behind the thoughts, with a line's end where other thoughts or a tag show that it is over."""
    closed = [found.end() for found in _CLOSING.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    if opened := OPENING.search(rest):
        rest = rest[: opened.start()] + "\n"
    return _SOLUTION.sub("", _SOLVED.sub("\n", rest))


def extract(text: str, kind: Kind | None, *, marked: bool = False) -> str | None:
    """Return the final answer in a text, None if there is none.

    Args:
        text: Of a model, thoughts included.
        kind: What is looked for: ``math``: a number or formula; ``choice``: a capital letter; ``code``: a program;
            ``text``: any text, and without a mark the whole of it; None: what is marked as the answer, whatever it is.
        marked: Take only what is marked as the answer, as for a text that was cut off: its last number is not an
            answer, nor is what it had begun to mark. Of code, only a block that is closed counts.
    """
    rest = _behind_thoughts(text)
    body = rest.strip()
    # A text that ended by itself has ended its last line.
    lines = rest if marked else f"{body}\n"
    if not body and _CLOSING.search(text):
        # Nothing came after the thoughts.
        body, marked = _SOLUTION.sub("", OPENING.sub("", _CLOSING.sub("", text))).strip(), True
        lines = f"{body}\n"
    if kind == "code":
        return _code(body, closed=marked)
    found = _marked(lines, kind)
    if found is not None or marked or kind is None:
        return found
    body = _without_empty_boxes(body, kind)
    if not body:
        return None
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
    """Return the answer that the most deliberate mark of a text gives.

    Args:
        body: The text, thoughts taken away. A last line without an end was cut off.
        kind: As for ``extract``.
    """
    for inside in reversed(_ANSWER.findall(body)):
        # A box within tags holds their answer, also if it holds nothing.
        for marked in reversed(_boxes(inside) or [inside]):
            if (fitting := _fitting(marked, kind)) is not None:
                return fitting
    for box in reversed(_boxes(body)):
        if (fitting := _fitting(box, kind)) is not None:
            return fitting
    ended = [line[1] for line in _HASHES.finditer(body) if "\n" in body[line.end() :]]
    for line in ended[-1:]:
        fitting = _fitting(line, kind)
        # Elsewhere than at the end they may be the heading of a section.
        placed = body.rstrip().endswith(line) or number(line) is not None
        if fitting is not None and placed and not _is_half(line, kind):
            return fitting
    for phrase in reversed(list(_PHRASE.finditer(body))):
        fitting = _from_sentence(phrase[1], kind, ended=phrase.end(1) < len(body))
        if fitting is not None:
            return fitting
    return None


def _boxes(text: str) -> list[str]:
    """Return what each box that is closed holds, its braces matched; a box in a box comes after it."""
    return [inside for _, _, inside in _closed_boxes(text)]


def _closed_boxes(text: str) -> list[tuple[int, int, str]]:
    """Return where each box that is closed begins and ends, and what it holds, in the order of their beginnings."""
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
            found.append((box.start(), at, text[box.end() : at - 1]))
    return found


def _without_empty_boxes(text: str, kind: Kind | None) -> str:
    """Return a text without the boxes that hold nothing, and without the signs of formulas that stand around them."""
    kept, at = [], 0
    for start, end, inside in _closed_boxes(text):
        if start >= at and _is_empty(inside, kind):
            kept.append(text[at:start])
            at = end
    return _NO_FORMULA.sub("", "".join(kept) + text[at:]).strip() if at else text


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
    # White space behind a backslash is a command.
    text = re.sub(r"(?<!\\)\\+\s+\Z", "", text).strip().strip("*`").strip()
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


def _is_half(text: str, kind: Kind | None) -> bool:
    """Return whether an answer is an expression that goes on: it ends in an operator or an equals sign."""
    return kind in ("math", None) and _OPERATOR_LAST.search(text) is not None


def _from_sentence(text: str, kind: Kind | None, *, ended: bool) -> str | None:
    """Return the answer with which the rest of a line begins.

    Args:
        text: The rest of the line.
        kind: As for ``extract``.
        ended: Whether the line has ended. If not, only what cannot become anything else is an answer: a letter or a
            formula that is closed, or what the end of its sentence stands behind.
    """
    if kind == "choice":
        return _leading_letter(_without_empty_boxes(text, kind), ended=ended)
    # Boxes were looked into already: one that stands here holds nothing, or was cut off in its middle.
    text = _BOX.split(text, maxsplit=1)[0]
    if kind == "text":
        # All of the line is the answer.
        closed = ended or any(end.end() == len(text.rstrip()) and _proves(end, text) for end in _ends(text))
        return _fitting(text, kind) if closed else None
    if chosen := _leading_letter(text, ended=ended):
        return chosen if kind != "math" or _tidy(text) == chosen else None
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    if formula := _FORMULA.search(sentence):
        inside = next(part for part in formula.groups() if part)
        return None if _is_half(inside, kind) else _fitting(inside, kind)
    tidy = _tidy(sentence)
    if _is_half(sentence, kind) or _is_half(tidy, kind):
        return None
    if not ended and not any(_proves(end, text) for end in _ends(text)[:1]):
        return None
    if number(tidy) is not None:
        return tidy
    last = _tidy(tidy.rpartition("=")[2])
    if len(last) <= _LONGEST_PHRASE and _CALCULATION.fullmatch(last):
        # Its first number is no answer: as a formula it has its value.
        return last
    numbers = _NUMBER.findall(last)
    if numbers and (len(last.split()) > 1 or "=" in tidy):
        return numbers[0].strip()
    return tidy if len(tidy) <= _LONGEST_PHRASE and not _is_empty(tidy, kind) else None


def _ends(text: str) -> list[re.Match[str]]:
    return list(_SENTENCE_END.finditer(text))


def _proves(end: re.Match[str], text: str) -> bool:
    """Return whether a sentence is over where it seems to end, whatever comes behind the text.

    A point behind a digit may become a decimal point, and an exclamation mark there be a factorial.
    """
    seen = text.rstrip() if end[0] == "!" else text
    return end.end() < len(seen) or not text[: end.start()][-1:].isdigit()


def _leading_letter(text: str, *, ended: bool = True) -> str | None:
    """Return the choice with which a sentence begins: ``(B)``, ``B.``, ``**B**``, ``B) 42``, not ``A dog``.

    If the text has not ended, a letter at its end may be the first of a word.
    """
    text = re.sub(
        r"^(?:(?:the\s+)?(?:option|choice)\s+|[*$`\s]|\\\(|\\boxed\{|\\text\{)+", "", text, flags=re.IGNORECASE
    )
    if found := re.match(r"[(\[]\s*([A-Za-z])\s*[)\]]", text):
        return found[1].upper()
    found = re.match(r"([A-Z])(?:[).:,;*$}`]|\s*$|\s+(?:because|since|as|which|-|–|—)\b)", text)
    if found and (ended or found.end() < len(text) or re.search(r"[^\w\s]\Z", found[0])):
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
