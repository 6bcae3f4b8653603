"""Thoughts that a prompt opens: some chat templates end with ``<think>``, and the model goes on from there.

What such a model writes has no opening tag. If it is cut off, or ends, before its thoughts do, nothing in it says that
these are thoughts and no answer: whoever samples puts the tag back before the text.
"""

import re
from collections.abc import Sequence

from qad.final_answer import OPENING
from qad.runtimes import Session

_LEFT_OPEN = re.compile(rf"({OPENING.pattern})\s*\Z")
# Tokens at a prompt's end that a tag and a line feed take at most: it may be spelled out.
_TAIL = 16


def opening(session: Session, prompt_T: Sequence[int]) -> str:
    """Return the tag with which a prompt leaves thoughts open, empty if it does not.

    Args:
        session: The model.
        prompt_T: Its tokens, as ``chat_prompt`` made them.
    """
    tail = prompt_T[-_TAIL:]
    if any(token < 0 for token in tail):
        # A server that makes the prompt itself: its template is not known here.
        return ""
    found = _LEFT_OPEN.search(session.detokenize(tail))
    return found[1] if found else ""


def with_opening(tag: str, text: str) -> str:
    """Return a text behind the tag that its prompt left open; nothing if a model wrote nothing."""
    return tag + text if text else ""
