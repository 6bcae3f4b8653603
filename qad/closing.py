"""What is closed when the block ends that it was opened for."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """Something to close, by ``close`` or at the end of a ``with``."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
