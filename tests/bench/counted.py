"""certworker with its SQL counted: `python -m tests.bench.counted FILE ARGUMENTS...` runs `certworker ARGUMENTS...`.

Counted is what SQLAlchemy hands to the driver: statements without BEGIN and COMMIT, by the step of certworker that had
them sent, and transactions that ended by COMMIT, those that changed something apart from those that only read.
Counting costs time, so nothing is timed here.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy import Connection, Engine, event

from certworker.cli.main import run

ROOMS = ("certworker/steps/", "certworker/oneshot.py", "certworker/service.py", "certworker/parts.py")
_CHANGES = re.compile(r"\s*(INSERT|UPDATE|DELETE|WITH)\b", re.IGNORECASE)


class Counts:
    """What was sent so far."""

    def __init__(self) -> None:
        self.statements: Counter[str] = Counter()
        self.changing: Counter[str] = Counter()
        self.reading: Counter[str] = Counter()

    def attach(self) -> None:
        event.listen(Engine, "before_cursor_execute", self._sent)
        event.listen(Engine, "commit", self._committed)
        event.listen(Engine, "rollback", self._forgotten)

    def _sent(
        self, connection: Connection, _cursor: Any, statement: str, _values: Any, _context: Any, _many: bool
    ) -> None:
        if statement.startswith("BEGIN"):
            return
        step = _step(sys._getframe(1))
        self.statements[f"{step}: {' '.join(statement.split())[:90]}"] += 1
        connection.info.setdefault("step", step)
        if _CHANGES.match(statement):
            connection.info["changed"] = True

    def _committed(self, connection: Connection) -> None:
        counter = self.changing if connection.info.pop("changed", False) else self.reading
        counter[connection.info.pop("step", "nothing")] += 1

    def _forgotten(self, connection: Connection) -> None:
        connection.info.pop("changed", None)
        connection.info.pop("step", None)

    def document(self) -> dict[str, Any]:
        kinds = {"statements": self.statements, "changing commits": self.changing, "reading commits": self.reading}
        return {name: {"all": counter.total(), "by": dict(counter.most_common())} for name, counter in kinds.items()}


def _step(frame: FrameType | None) -> str:
    """Return the innermost function of a step that is at work."""
    while frame is not None:
        code = frame.f_code
        if any(room in code.co_filename for room in ROOMS):
            return f"{Path(code.co_filename).stem}.{code.co_qualname.removesuffix('.<locals>.<lambda>')}"
        frame = frame.f_back
    return "elsewhere"


def main() -> int:
    counts = Counts()
    counts.attach()
    try:
        return run(sys.argv[2:])
    finally:
        Path(sys.argv[1]).write_text(json.dumps(counts.document()))


if __name__ == "__main__":
    sys.exit(main())
