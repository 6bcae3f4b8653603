"""The form that a prompt asks the answer to have, and whether a text has it.

Which answer a text gives is said by ``qad.final_answer``, which is tolerant: it also finds answers in other forms. Here
is what was asked for, so that a wrong form and a wrong answer can be told apart.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from qad.final_answer import boxed, extract, strip_thinking

_LETTER = re.compile(
    r"^\W*(?:final\s+)?answer\s*(?:\*\*)?\s*:\s*(?:\*\*)?\s*\(?([A-Z])\)?[.*\s]*\Z", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Form:
    """A form of answers.

    Attributes:
        request: The sentence that asks for it; empty where the prompt says all.
        kept: Whether a text, thoughts taken away, has it.
    """

    request: str
    kept: Callable[[str], bool]

    def ask(self, question: str) -> str:
        """Return the prompt of a question."""
        return f"{question.rstrip()}\n\n{self.request}" if self.request else question

    def kept_by(self, text: str) -> bool:
        """Return whether a text of a model has the form."""
        return self.kept(strip_thinking(text))


BOXED = Form("Reason step by step, then give the final answer in \\boxed{}.", boxed)
BOXED_TEXT = Form(
    "Reason step by step, then give the final answer, in the format that was asked for above, in \\boxed{}.",
    boxed,
)
LETTER = Form(
    'Reason step by step, then end with the line "Answer: X", where X is the letter of the right choice.',
    lambda body: _LETTER.search(body) is not None,
)
CODE = Form(
    "Answer with one block of Python code (```python … ```) that holds all that is needed to run it.",
    lambda body: extract(body, "code", marked=True) is not None,
)
AS_GIVEN = Form("", lambda body: bool(body.strip()))
