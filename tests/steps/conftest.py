"""The world that steps are tested in, on both databases."""

import pytest

from certworker.store.database import Database

from .world import World


@pytest.fixture
def world(db: Database) -> World:
    return World(db)
