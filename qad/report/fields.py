"""Read values out of a JSON object, each checked: what is missing or of another kind is told with file and place."""

import math
from typing import Any

from qad.errors import UserError

# Whole numbers up to there are exact as floating-point numbers too.
_LARGEST = 2**53


class Fields:
    """An object of a JSON file.

    Args:
        values: What was decoded there.
        file: The file, for messages.
        place: Where in the file, such as ``rows[3]``; empty for the whole.
        remedy: How the file is made again, for messages.

    Raises:
        UserError: It is no object.
    """

    def __init__(self, values: Any, file: str, place: str, remedy: str) -> None:
        self._file, self._place, self._remedy = file, place, remedy
        if not isinstance(values, dict):
            raise self._damaged(place or "the whole", "no object")
        self._values: dict[str, Any] = values

    def _damaged(self, place: str, found: str) -> UserError:
        return UserError(f"{self._file} is damaged: {place} is {found}; {self._remedy}")

    def _at(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _get(self, name: str, kinds: tuple[type, ...], wanted: str) -> Any:
        if name not in self._values:
            raise self._damaged(self._at(name), "missing")
        value = self._values[name]
        # A truth value is an int to Python and none to a reader.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self._damaged(self._at(name), f"{value!r:.40}, {wanted}")
        return value

    def has(self, name: str) -> bool:
        """Return whether there is a value that is not null."""
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        """Return the names of all values."""
        return list(self._values)

    def number(self, name: str) -> float:
        """Return a number, which may be infinite or none (NaN)."""
        value = self._get(name, (int, float), "not a number")
        try:
            return float(value)
        except OverflowError:
            raise self._damaged(self._at(name), "a number of more digits than a figure has") from None

    def maybe_number(self, name: str) -> float | None:
        """Return a number, None where there is none."""
        return self.number(name) if self.has(name) else None

    def amount(self, name: str) -> float:
        """Return a finite number from 0 on."""
        value = self.number(name)
        self.require(0 <= value < math.inf, name, "not a finite number from 0 on")
        return value

    def maybe_amount(self, name: str) -> float | None:
        """Return a finite number from 0 on, None where there is none."""
        return self.amount(name) if self.has(name) else None

    def share(self, name: str) -> float:
        """Return a number from 0 to 1, or none (NaN) where nothing was counted."""
        value = self.number(name)
        self.require(not (value < 0 or value > 1), name, "not a share from 0 to 1")
        return value

    def positive(self, name: str) -> float:
        """Return a finite number above 0, as rates and times are."""
        value = self.number(name)
        self.require(0 < value < math.inf, name, "not a finite number above 0")
        return value

    def maybe_positive(self, name: str) -> float | None:
        """Return a finite number above 0, None where there is none."""
        return self.positive(name) if self.has(name) else None

    def require(self, good: bool, name: str, fault: str) -> None:
        """Say what is wrong with a value that is there, unless it is good."""
        if not good:
            raise self._damaged(self._at(name), f"{self._values[name]!r:.40}, {fault}")

    def whole(self, name: str) -> int:
        """Return an integer, which can be drawn as any other number."""
        value = int(self._get(name, (int,), "not a whole number"))
        self.require(abs(value) <= _LARGEST, name, "more than can be counted")
        return value

    def count(self, name: str) -> int:
        """Return an integer from 1 on."""
        value = self.whole(name)
        self.require(value >= 1, name, "not a whole number from 1 on")
        return value

    def text(self, name: str) -> str:
        """Return a text."""
        return str(self._get(name, (str,), "not a text"))

    def maybe_text(self, name: str) -> str | None:
        """Return a text, None where there is none."""
        return self.text(name) if self.has(name) else None

    def flag(self, name: str) -> bool:
        """Return a truth value."""
        return bool(self._get(name, (bool,), "neither true nor false"))

    def child(self, name: str) -> "Fields":
        """Return an object within."""
        return Fields(self._get(name, (dict,), "not an object"), self._file, self._at(name), self._remedy)

    def children(self, name: str) -> list["Fields"]:
        """Return the objects of a list."""
        return [
            Fields(value, self._file, f"{self._at(name)}[{index}]", self._remedy)
            for index, value in enumerate(self._get(name, (list,), "not a list"))
        ]

    def maybe_children(self, name: str) -> list["Fields"]:
        """Return the objects of a list, none where there is no list."""
        return self.children(name) if self.has(name) else []

    def as_whole(self, key: str, name: str) -> int:
        """Return a key of the object ``name`` as the integer that it must be."""
        try:
            return int(key)
        except ValueError:
            raise self._damaged(f"{self._at(name)}.{key}", "not named by a whole number") from None

    def items(self, name: str) -> list[Any]:
        """Return a list of anything."""
        return list(self._get(name, (list,), "not a list"))

    def range(self, name: str) -> tuple[float, float]:
        """Return the two numbers of a list."""
        values = self._get(name, (list,), "not a list")
        if len(values) != 2 or not all(isinstance(value, int | float) for value in values):
            raise self._damaged(self._at(name), f"{values!r:.40}, not two numbers")
        return float(values[0]), float(values[1])

    def numbers(self) -> dict[str, float]:
        """Return all values, each of which must be a number."""
        return {name: self.number(name) for name in self._values}

    def texts(self) -> dict[str, str]:
        """Return all values as texts, whatever they are."""
        return {name: str(value) for name, value in self._values.items()}
