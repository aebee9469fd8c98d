"""One tiny stack for all tests that leave it running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.stack import RunningStack, running_stack


@pytest.fixture(scope="session")
def tiny_stack() -> Iterator[RunningStack]:
    """``tiebreak up`` on a tiny random model, ready."""
    with running_stack() as stack:
        yield stack
