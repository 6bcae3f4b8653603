"""Tests that need an engine: skipped where it cannot run, with its own reason."""

import pytest

from qad import runtimes


def needs(runtime: str) -> pytest.MarkDecorator:
    """Return the mark of a test that needs a runtime."""
    reason = runtimes.get(runtime).available()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def skip_without(runtime: str) -> None:
    """Skip what needs a runtime and is no test itself, or needs it in some cases only."""
    if (reason := runtimes.get(runtime).available()) is not None:
        pytest.skip(reason)
