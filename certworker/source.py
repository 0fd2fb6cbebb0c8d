"""What an embedded node asks: the database itself, in the place of a node API."""

from importlib.metadata import version

from certworker.core.delivery import EVERYTHING, collect_changes
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.snapshot import read_snapshot
from certworker.errors import InputError, VersionRefused
from certworker.node.control import PublishedVersion
from certworker.steps.deliver import read_changes
from certworker.store import nodes, versions
from certworker.wiring import App


class DatabaseSource:
    """The published version and every certificate; a `node.control.Source`."""

    def __init__(self, app: App) -> None:
        self._app = app

    def published(self) -> PublishedVersion | None:
        found = self._app.db.read(versions.find_published)
        if found is None:
            return None
        try:
            return PublishedVersion(found.id, found.number or 0, read_snapshot(found.snapshot_json))
        except InputError as refused:
            raise VersionRefused(
                f"version {found.number} cannot be read: {refused}; another program or a newer release wrote it, "
                "`certworker config publish` serves the rows instead"
            ) from None

    def changes_after(self, cursor: Cursor) -> CertificateChanges:
        db, sealer = self._app.db, self._app.sealer
        return collect_changes(
            lambda after, continued: db.read(
                lambda tx: read_changes(tx, sealer, after, EVERYTHING, continued=continued)
            ),
            cursor,
        )

    def report(self, heartbeat: Heartbeat) -> None:
        self._app.db.write(lambda tx: nodes.record(tx, heartbeat, f"certworker {version('certworker')}"))
