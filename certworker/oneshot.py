"""`certworker renew`: everything due, or what was named, once.

What is asked for is written as rows. If a service runs on the same database, it does the work and we
wait; if none does, or it ends meanwhile, we take its place for as long as that takes: responder, issuers
and the embedded node, nothing that was not asked for.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from certworker import wiring
from certworker.errors import DatabaseHeld
from certworker.service import EmbeddedNode
from certworker.steps.crew import Crew
from certworker.steps.expire import expire
from certworker.steps.issue import Session
from certworker.steps.publish import publish
from certworker.steps.reconcile import reconcile
from certworker.steps.renew import Outcome, Request, Ticket, outcome, request
from certworker.steps.verify import verify
from certworker.store import issuances, nodes, workers
from certworker.store.rows import new_id
from certworker.wiring import App

_LOOK = 0.2
"""Seconds between two looks at the rows we wait for."""
_TAKE_OVER = 2.0
"""Seconds between two tries to take the place of a service."""

Watcher = Callable[[Outcome], None]


@dataclass(slots=True)
class Renewal:
    """How it ended."""

    outcomes: list[Outcome] = field(default_factory=list)
    would_renew: list[tuple[str, str]] = field(default_factory=list)
    unchanged: int = 0
    dry_run: bool = False

    def of(self, result: str) -> list[Outcome]:
        """Return the outcomes of one kind: renewed, failed or waiting."""
        return [one for one in self.outcomes if one.result == result]

    @property
    def succeeded(self) -> bool:
        return not self.of("failed") and not self.of("waiting")

    def document(self) -> dict[str, Any]:
        """Return it as `renew --json` prints it."""
        if self.dry_run:
            listed = [{"name": name, "reason": reason} for name, reason in self.would_renew]
            return {"would_renew": listed, "unchanged": self.unchanged}
        kinds = ("renewed", "failed", "waiting")
        document: dict[str, Any] = {kind: [one.document() for one in self.of(kind)] for kind in kinds}
        return {**document, "unchanged": self.unchanged}


def renew(
    app: App,
    names: Sequence[str],
    *,
    force: bool = False,
    dry_run: bool = False,
    timeout: timedelta = timedelta(seconds=300),
    watch: Watcher = lambda _: None,
    moved: Callable[[Session], None] = lambda _: None,
) -> Renewal:
    """Renew, and return when nothing asked for is left or `timeout` is over.

    `watch` is told of every ticket once it has ended. Raises UnknownName before anything is queued.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    wiring.refuse_other_issuer(app)
    reconcile(app.db, app.clock, app.wanted, app.sealer)
    private = app.settings.acme_private_ca
    asked = request(app.db, app.clock, names, force=force, dry_run=dry_run, private_ca=private)
    result = Renewal(would_renew=asked.would_renew, unchanged=asked.unchanged, dry_run=dry_run)
    if asked.tickets:
        result.outcomes = _Wait(app, asked, deadline, watch, moved).until_done()
    return result


class _Wait:
    """Waits for tickets; works on them itself while nobody else does."""

    def __init__(
        self, app: App, asked: Request, deadline: float, watch: Watcher, moved: Callable[[Session], None]
    ) -> None:
        self._app = app
        self._tickets = asked.tickets
        self._deadline = deadline
        self._watch = watch
        self._moved = moved
        self._ended: dict[str, Outcome] = {}
        self._stack = ExitStack()
        self._node: EmbeddedNode | None = None
        self._working = False
        self._try_at = 0.0
        self._wake = threading.Event()

    def until_done(self) -> list[Outcome]:
        with self._stack:
            while True:
                self._take_over_if_free()
                self._look()
                if len(self._ended) == len(self._tickets) or time.monotonic() >= self._deadline:
                    break
                self._wake.wait(_LOOK)
                self._wake.clear()
            return [self._ended.get(ticket.issuance_id) or self._ask(ticket) for ticket in self._tickets]

    def _look(self) -> None:
        """Note what has ended since: one question for all that is open, one more for each that is not."""
        if self._working:
            verify(self._app.db, self._app.clock, self._app.settings.node_silent)
        waiting = [ticket for ticket in self._tickets if ticket.issuance_id not in self._ended]
        ids = [ticket.issuance_id for ticket in waiting]
        closed = self._app.db.read(lambda tx: issuances.closed_among(tx, ids))
        for ticket in waiting:
            if ticket.issuance_id in closed and _is_final(found := self._ask(ticket)):
                self._ended[ticket.issuance_id] = found
                self._watch(found)

    def _ask(self, ticket: Ticket) -> Outcome:
        return outcome(self._app.db, ticket, has_nodes=self._has_nodes())

    def _has_nodes(self) -> bool:
        return bool(self._app.db.read(lambda tx: nodes.live(tx, self._app.settings.node_silent)))

    # -- taking the place of a service that is not there -----------------------------------------------

    def _take_over_if_free(self) -> None:
        if self._working or time.monotonic() < self._try_at:
            return
        self._try_at = time.monotonic() + _TAKE_OVER
        if not self._app.db.embedded and self._app.db.read(workers.alive):
            return
        try:
            role = wiring.take_role(self._app)
        except DatabaseHeld:
            return
        if role is not None:
            self._stack.callback(role.give_up)
            self._app.db.write(lambda tx: issuances.free_leases(tx))
        self._start_working()

    def _start_working(self) -> None:
        app, only = self._app, [ticket.issuance_id for ticket in self._tickets]
        self._working = True
        expire(app.db, app.clock)
        crew = Crew(wiring.make_bench(app, self._note), new_id(), app.settings.concurrency, only)
        responder = wiring.make_responder(app, crew.fetched)
        responder.start()
        self._stack.callback(responder.stop)
        agent = wiring.make_agent(app)
        if agent is not None:
            if app.settings.auto_publish == "on":
                publish(app.db, app.clock, app.defaults)
            self._node = EmbeddedNode(agent, self._wake.set)
            self._stack.callback(self._node.stop, as_found=True)
            self._node.start()
        self._stack.callback(crew.stop)
        crew.start()

    def _note(self, session: Session) -> None:
        if not session.issuance.is_open:
            if self._node is not None:
                self._node.poke()
            self._wake.set()
        self._moved(session)


def _is_final(found: Outcome) -> bool:
    return found.result == "failed" or (found.result == "renewed" and found.served is not False)
