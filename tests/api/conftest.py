"""The control plane of `plane.py`, on both databases."""

from collections.abc import Iterator

import pytest

from certworker.store.database import Database

from .plane import Plane


@pytest.fixture
def plane(db: Database) -> Iterator[Plane]:
    made = Plane(db)
    yield made
    made.stop()
