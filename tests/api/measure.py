"""How a node API carries a fleet: nodes that are connections only, on one worker with SQLite.

python -m tests.api.measure --nodes 200 --certificates 50
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from certworker.core.rollout import Cursor
from certworker.errors import ControlPlaneError
from certworker.store import counters, schema
from certworker.store.database import open_database

from .plane import Machine, Plane


class Crowd:
    """Nodes that take over whatever they are told and say at once that they have proved it."""

    def __init__(self, machines: list[Machine]) -> None:
        self._machines = machines
        self._proved: dict[str, tuple[str | None, int]] = {}
        self._changed = threading.Condition()

    def start(self) -> None:
        for machine in self._machines:
            threading.Thread(target=self._follow, args=(machine,), daemon=True).start()

    def await_all(self, version_id: str, revision: int = 0) -> float:
        """Wait until every node has proved both, and return the moment."""

        def done() -> bool:
            proved = self._proved.values()
            return len(proved) == len(self._machines) and all(
                version == version_id and at >= revision for version, at in proved
            )

        with self._changed:
            assert self._changed.wait_for(done, 60), "a node never proved it"
        return time.monotonic()

    def _follow(self, machine: Machine) -> None:
        cursor = Cursor()
        with suppress(ControlPlaneError):  # it ends before they do
            while True:
                cursor = machine.source.changes_after(cursor).cursor
                version_id = machine.served()
                machine.prove(version_id, cursor)
                with self._changed:
                    self._proved[machine.name] = version_id, cursor.revision
                    self._changed.notify_all()
                machine.source.wait(cursor)


@contextmanager
def control_plane(folder: Path, certificates: int) -> Iterator[Plane]:
    """Give a node API on a database with so many certificates."""
    db = open_database(f"sqlite:///{folder}/measured.db")
    schema.upgrade(db)
    plane = Plane(db)
    for number in range(certificates):
        plane.world.issue(f"n{number}.test")
    yield plane
    plane.stop()


def measure(plane: Plane, nodes: int) -> Iterator[str]:
    """Yield lines of figures."""
    crowd = Crowd([plane.join(f"gw{number}") for number in range(nodes)])
    version_id = publish(plane)
    began = time.monotonic()
    crowd.start()
    yield f"first start of all, with their certificates: {crowd.await_all(version_id) - began:.2f} s"
    for _ in range(3):
        began = time.monotonic()
        yield f"publish to the last proved: {crowd.await_all(publish(plane)) - began:.2f} s"
    version_id = publish(plane)
    crowd.await_all(version_id)
    plane.world.issue("one.more.test")
    began = time.monotonic()
    plane.api.poke()
    revision = plane.db.read(lambda tx: counters.value(tx, counters.REVISION))
    yield f"one renewed certificate to the last proved: {crowd.await_all(version_id, revision) - began:.2f} s"
    used = time.process_time()
    time.sleep(20)
    yield f"nothing to do, nodes included: {(time.process_time() - used) / 20:.1%} of a core"


def publish(plane: Plane) -> str:
    version_id = plane.publish(None)
    plane.look()
    plane.api.poke()
    return version_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--certificates", type=int, default=50)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, control_plane(Path(folder), asked.certificates) as plane:
        for line in measure(plane, asked.nodes):
            print(line, flush=True)


if __name__ == "__main__":
    main()
