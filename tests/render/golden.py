"""The golden folders. `python -m tests.render.golden` writes what the renderers print now; read the diff."""

import json
from pathlib import Path

from certworker.core.snapshot import Snapshot, read_snapshot
from certworker.render.haproxy import CONFIG, HaproxyOptions, render_haproxy

GOLDEN = Path(__file__).parent / "golden"
FOLDER = "/srv/gateway"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def load(case: str) -> Snapshot:
    return read_snapshot(json.loads((GOLDEN / case / "snapshot.json").read_text()))


def haproxy(case: str, folder: str = FOLDER) -> bytes:
    return render_haproxy(load(case), HaproxyOptions(folder, number=42)).files[CONFIG].content


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / name / CONFIG).write_bytes(haproxy(name))
