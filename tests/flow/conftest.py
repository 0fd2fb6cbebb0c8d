"""A folder whose path is short enough for a proxy's sockets."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(mkdtemp(prefix="cw-flow-"))
    yield path
    shutil.rmtree(path)
