"""The one exception that means "you can fix this": bad input, with the remedy in its text."""

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from json import JSONDecodeError


class UserError(ValueError):
    """Bad input or an unusable environment. The message names the cause and the remedy.

    The command line prints the message alone and exits with status 2; a library caller sees an ordinary
    ``ValueError``.
    """


class Unreachable(UserError):
    """A server that gives no answer at all, so that nothing of it is known."""


class OtherModel(UserError):
    """A server that has another model now than when it was opened: what it answers must not be mixed."""


def unknown_name(kind: str, name: str, known: list[str]) -> UserError:
    """Return the error for a name that is not in a table, listing the names that are and those that look alike."""
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}{hint}")


def json_fault(error: "JSONDecodeError") -> str:
    """Return what is wrong with a JSON text and in which column; some of the library's own messages end in "at"."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"
