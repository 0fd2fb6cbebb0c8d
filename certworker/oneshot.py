"""`certworker renew`: everything due, or what was named, once.

What is asked for is written as rows. If a service runs on the same database, it does the work and we
wait; if none does, or it ends meanwhile, we take its place for as long as that takes: responder, issuers
and the embedded node, nothing that was not asked for.
"""

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any

from certworker import parts, wiring
from certworker.embedded import EmbeddedNode
from certworker.errors import DatabaseHeld
from certworker.steps.crew import Crew
from certworker.steps.deliver import Scopes
from certworker.steps.expire import expire
from certworker.steps.gate import incident
from certworker.steps.publish import publish_changes
from certworker.steps.reconcile import reconcile
from certworker.steps.refresh_ari import refresh_ari
from certworker.steps.renew import Outcome, Request, Ticket, outcome, request
from certworker.steps.session import Bench, Session
from certworker.steps.verify import unlisted, verify
from certworker.store import issuances, nodes, workers
from certworker.store.issuances import Standing
from certworker.store.rows import new_id
from certworker.wiring import App

_LOOK = 0.2
"""Seconds between two looks at the rows we wait for."""
_TAKE_OVER = 2.0
"""Seconds between two tries to take the place of a service."""

_KINDS = ("renewed", "failed", "waiting")


class Watcher:
    """Told how the work goes; this one says nothing."""

    def moved(self, session: Session) -> None:
        """An issuance that we work on ourselves has moved."""

    def reached(self, ticket: Ticket, state: str) -> None:
        """A ticket that the service works on is in a new state."""

    def ended(self, outcome: Outcome) -> None:
        """A ticket has ended."""


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
        lacking = any(one.left_out for one in self.outcomes)
        return not lacking and not self.of("failed") and not self.of("waiting")

    def document(self) -> dict[str, Any]:
        """Return it as `renew --json` prints it."""
        if self.dry_run:
            listed = [{"name": name, "reason": reason} for name, reason in self.would_renew]
            return {**{kind: [] for kind in _KINDS}, "would_renew": listed, "unchanged": self.unchanged}
        document: dict[str, Any] = {kind: [one.document() for one in self.of(kind)] for kind in _KINDS}
        return {**document, "unchanged": self.unchanged}


def renew(
    app: App,
    names: Sequence[str],
    *,
    force: bool = False,
    dry_run: bool = False,
    timeout: timedelta = timedelta(seconds=300),
    watch: Watcher | None = None,
) -> Renewal:
    """Renew, and return when nothing asked for is left or `timeout` is over.

    `watch` is told how it goes. Raises UnknownName before anything is queued.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    wiring.refuse_other_issuer(app)
    reconcile(app.db, app.clock, app.wanted, app.sealer)
    private = app.settings.acme_private_ca
    if not names and not dry_run and not app.db.read(workers.alive):
        _ask_when_to_renew(app, deadline)
    asked = request(
        app.db,
        app.clock,
        names,
        force=force,
        dry_run=dry_run,
        private_ca=private,
        directory_url=app.settings.acme_directory_url,
    )
    result = Renewal(would_renew=asked.would_renew, unchanged=asked.unchanged, dry_run=dry_run)
    if asked.tickets:
        # Whoever asks has mended what the CA refused our account for, or wants to know.
        parts.make_gate(app, new_id()).resume()
        result.outcomes = _Wait(app, asked, deadline, watch or Watcher()).until_done()
    return result


def _ask_when_to_renew(app: App, deadline: float, bench: Bench | None = None) -> None:
    """Ask the CA about certificates that it is time for, because no service does (RFC 9773); not past the deadline."""
    used = bench or parts.make_bench(app, new_id(), lambda _: None)
    used.gate.refresh()
    refresh_ari(
        app.db, used.client, app.clock, used.draw, lambda: time.monotonic() < deadline,
        closed=lambda: used.gate.closed_until() is not None,
        trouble=lambda failure: used.gate.failed(failure, ""),
    )  # fmt: skip


class _Wait:
    """Waits for tickets; works on them itself while nobody else does."""

    def __init__(self, app: App, asked: Request, deadline: float, watch: Watcher) -> None:
        self._app = app
        self._tickets = asked.tickets
        self._deadline = deadline
        self._watch = watch
        self._scopes = Scopes()
        self._told: dict[str, str] = {}
        self._ended: dict[str, Outcome] = {}
        self._stack = ExitStack()
        self._node: EmbeddedNode | None = None
        self._bench: Bench | None = None
        """What we work with; None while somebody else does."""
        self._try_at = 0.0
        self._wake = threading.Event()

    def until_done(self) -> list[Outcome]:
        with self._stack:
            while True:
                self._take_over_if_free()
                done = self._look()
                if done or time.monotonic() >= self._deadline:
                    break
                self._wake.wait(_LOOK)
                self._wake.clear()
            if self._bench is not None:
                _ask_when_to_renew(self._app, self._deadline, self._bench)
            return [self._ended.get(ticket.issuance_id) or self._ask(ticket) for ticket in self._tickets]

    def _look(self) -> bool:
        """Note what has happened since; say whether nothing more will before the deadline."""
        if self._bench is not None:
            self._bench.gate.refresh()
            self._bench.gate.probe(self._bench.client)
            reconcile(
                self._app.db, self._app.clock, self._app.wanted, self._app.sealer,
                thumbprint=self._bench.accounts.thumbprint,
            )  # fmt: skip
            verify(self._app.db, self._app.clock, self._scopes, self._app.settings.node_silent)
        waiting = [ticket for ticket in self._tickets if ticket.issuance_id not in self._ended]
        ids = [ticket.issuance_id for ticket in waiting]
        still_open = self._app.db.read(lambda tx: issuances.standings(tx, ids))
        for ticket in waiting:
            standing = still_open.get(ticket.issuance_id)
            if standing is not None:
                self._tell(ticket, standing)
            elif _is_final(found := self._ask(ticket)):
                self._ended[ticket.issuance_id] = found
                self._watch.ended(found)
        unserved = len(waiting) - len(still_open) - sum(t.issuance_id in self._ended for t in waiting)
        if unserved or any(standing.leased for standing in still_open.values()):
            return False
        return self._is_closed() or all(self._is_too_late(standing.attempt_at) for standing in still_open.values())

    def _tell(self, ticket: Ticket, standing: Standing) -> None:
        """Say how far a ticket is that somebody else works on; our own crew tells by itself."""
        if self._bench is None and self._told.get(ticket.issuance_id) != standing.state:
            self._told[ticket.issuance_id] = standing.state
            self._watch.reached(ticket, standing.state)

    def _is_closed(self) -> bool:
        """Say whether the CA is asked for nothing until we have stopped waiting."""
        found = self._incident()
        return (
            found is not None and found["next_attempt_at"] is not None and self._is_too_late(found["next_attempt_at"])
        )

    def _is_too_late(self, moment: datetime) -> bool:
        return moment > self._app.clock() + timedelta(seconds=max(self._deadline - time.monotonic(), 0))

    def _incident(self) -> dict[str, Any] | None:
        url = self._app.settings.acme_directory_url
        return self._app.db.read(lambda tx: incident(tx, url, self._app.clock()))

    def _ask(self, ticket: Ticket) -> Outcome:
        """Return how a ticket stands; one that only waits for the CA has the CA's trouble for a reason."""
        found = outcome(self._app.db, ticket, has_nodes=self._has_nodes() and not self._is_unlisted(ticket))
        if found.result == "waiting" and found.error is None and (trouble := self._incident()) is not None:
            return replace(found, error={**(trouble["error"] or {}), "retry_at": _shown(trouble["next_attempt_at"])})
        return found

    def _is_unlisted(self, ticket: Ticket) -> bool:
        return bool(self._app.db.read(lambda tx: unlisted(tx, [ticket.lineage_id], self._scopes)))

    def _has_nodes(self) -> bool:
        return bool(self._app.db.read(lambda tx: nodes.live(tx, self._app.settings.node_silent)))

    # -- taking the place of a service that is not there -----------------------------------------------

    def _take_over_if_free(self) -> None:
        if self._bench is not None or time.monotonic() < self._try_at:
            return
        self._try_at = time.monotonic() + _TAKE_OVER
        self._bury_predecessor()
        if not self._app.db.embedded and self._app.db.read(workers.alive):
            return
        try:
            role = wiring.take_role(self._app)
        except DatabaseHeld:
            return
        if role is not None:
            self._stack.callback(role.give_up)
            self._app.db.write(issuances.free_dead_leases)
        self._start_working()

    def _bury_predecessor(self) -> None:
        """Take over from a service of this data folder that is dead, without waiting until it is silent for long."""
        place = wiring.take_place(self._app)
        if place is not None:
            with place:
                self._app.db.write(lambda tx: issuances.free_dead_leases(tx, workers.bury_place(tx, place.name)))

    def _start_working(self) -> None:
        app, only, worker_id = self._app, [ticket.issuance_id for ticket in self._tickets], new_id()
        self._bench = bench = parts.make_bench(app, worker_id, self._note)
        app.db.write(lambda tx: workers.enter(tx, worker_id, socket.gethostname(), os.getpid(), version("certworker")))
        self._stack.callback(app.db.write, lambda tx: workers.leave(tx, worker_id))
        expire(app.db, app.clock)
        crew = Crew(bench, worker_id, app.settings.concurrency, only, may_order=self._can_answer, beaten=self._beaten)
        responder = parts.make_responder(app, crew.fetched)
        responder.start()
        self._stack.callback(responder.stop)
        agent = parts.make_agent(app)
        if agent is not None:
            if app.settings.auto_publish == "on":
                publish_changes(app.db, app.clock, app.defaults, leave_out=app.leave_out, always=True)
            self._node = EmbeddedNode(agent, self._wake.set)
            self._stack.callback(self._node.stop, as_found=True)
            self._node.start()
        self._stack.callback(crew.stop)
        crew.start()

    def _beaten(self, db_now: datetime | None) -> None:
        if db_now is not None:
            self._app.clock.anchor(db_now)

    def _can_answer(self) -> bool:
        return self._node is None or self._node.answers

    def _note(self, session: Session) -> None:
        if not session.issuance.is_open:
            if self._node is not None:
                self._node.poke()
            self._wake.set()
        self._watch.moved(session)


def _shown(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


def _is_final(found: Outcome) -> bool:
    return found.result == "failed" or (found.result == "renewed" and found.served is not False)
