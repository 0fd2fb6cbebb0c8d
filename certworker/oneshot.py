"""`certworker renew`: everything due, or what was named, once.

What is asked for is written as rows. If a service runs on the same database, it does the work and we
wait; if none does, or it ends meanwhile, we take its place for as long as that takes: responder, issuers
and the embedded node, nothing that was not asked for.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from certworker import parts, wiring
from certworker.cores import Core
from certworker.errors import DatabaseHeld
from certworker.steps.crew import Crew
from certworker.steps.deliver import Scopes
from certworker.steps.expire import expire
from certworker.steps.gate import incident
from certworker.steps.reconcile import reconcile
from certworker.steps.refresh_ari import refresh_ari
from certworker.steps.renew import Outcome, Request, Ticket, outcomes, request
from certworker.steps.session import Bench, Session
from certworker.steps.verify import unlisted, verify
from certworker.store import issuances, nodes, renewal_info, workers
from certworker.store.database import Transaction
from certworker.store.issuances import Standing
from certworker.store.rows import new_id
from certworker.wiring import App

if TYPE_CHECKING:
    from certworker.embedded import EmbeddedNode

_LOOK = 0.2
"""Seconds between two looks at what has become of the tickets ..."""
_LOOK_AT_WORK = 1.0
"""... and while our own crew issues, which says when nothing is left."""
_LOOK_AT_ALL = 2.0
"""Seconds between two looks at all of them while our own crew tells of those that end."""
_PAGE = 500
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
        only = [ticket.issuance_id for ticket in asked.tickets] if names else None
        result.outcomes = _Wait(app, asked, only, deadline, watch or Watcher()).until_done()
    return result


def _ask_when_to_renew(app: App, deadline: float) -> None:
    """Ask the CA about certificates that it is time for, because no service does (RFC 9773); not past the deadline.

    That includes what the last run got: what a new certificate's window is, nobody has to know before.
    """
    url = app.settings.acme_directory_url
    if not app.db.read(lambda tx: renewal_info.any_due(tx, url, app.clock())):
        return  # what asks a CA is not made for nothing: reading whom the system trusts takes 20 ms
    bench = parts.make_bench(app, new_id(), lambda _: None)
    bench.gate.refresh()
    refresh_ari(
        app.db, bench.client, app.clock, bench.draw, lambda: time.monotonic() < deadline,
        closed=lambda: bench.gate.closed_until() is not None,
        trouble=lambda failure: bench.gate.failed(failure, ""),
    )  # fmt: skip


class _Wait:
    """Waits for tickets; works on them itself while nobody else does."""

    def __init__(self, app: App, asked: Request, only: list[str] | None, deadline: float, watch: Watcher) -> None:
        """Wait for what was `asked`; work on the issuances `only`, None for all that are open."""
        self._app = app
        self._only = only
        self._tickets = asked.tickets
        self._open = {ticket.issuance_id: ticket for ticket in asked.tickets}
        """By issuance: what is not known to have ended."""
        self._unserved: dict[str, Ticket] = {}
        """Renewed, and not served by every node yet."""
        self._told: deque[str] = deque()
        """Issuances that our own crew says have ended, since the last look."""
        self._deadline = deadline
        self._watch = watch
        self._scopes = Scopes()
        self._reached: dict[str, str] = {}
        self._ended: dict[str, Outcome] = {}
        self._stack = ExitStack()
        self._node: EmbeddedNode | None = None
        self._bench: Bench | None = None
        """What we work with; None while somebody else does."""
        self._crew: Crew | None = None
        self._try_at = 0.0
        self._look_at_all_at = 0.0
        self._heartbeat: datetime | None = None
        """The newest one when it was last looked what the nodes prove."""
        self._wake = threading.Event()

    def until_done(self) -> list[Outcome]:
        with self._stack:
            while True:
                self._take_over_if_free()
                done = self._look()
                if done or time.monotonic() >= self._deadline:
                    break
                self._wake.wait(_LOOK_AT_WORK if self._is_at_work() else _LOOK)
                self._wake.clear()
            rest = self._ask([ticket for ticket in self._tickets if ticket.issuance_id not in self._ended])
            ended = self._ended | {one.ticket.issuance_id: one for one in rest}
            return [ended[ticket.issuance_id] for ticket in self._tickets]

    def _is_at_work(self) -> bool:
        """Say whether our own crew issues: it tells what ends, and wakes us when nothing is left."""
        return self._crew is not None and self._crew.in_flight > 0

    def _look(self) -> bool:
        """Note what has happened since; say whether nothing more will before the deadline."""
        at_all = self._is_time_to_look_at_all()
        proved = self._tend(at_all) if self._bench is not None else 0
        told = {self._told.popleft() for _ in range(len(self._told))}
        standings = self._look_at_all() if at_all else None
        ended = [t for one, t in self._open.items() if one in told or (standings is not None and one not in standings)]
        unserved = list(self._unserved.values()) if at_all or proved else []
        self._settle(ended + unserved)
        if not self._open and not self._unserved:
            return True
        return standings is not None and not self._unserved and self._is_all_put_off(standings.values())

    def _is_time_to_look_at_all(self) -> bool:
        """Say whether to ask how every ticket stands: seldom, while our own crew is at work and tells what ends."""
        now = time.monotonic()
        if self._is_at_work() and now < self._look_at_all_at:
            return False
        self._look_at_all_at = now + _LOOK_AT_ALL
        return True

    def _tend(self, at_all: bool) -> int:
        """Do what a service does besides issuing; return how many certificates have been proved to be served."""
        app, bench = self._app, self._bench
        assert bench is not None, "we work ourselves"
        bench.gate.refresh()
        bench.gate.probe(bench.client)
        reconcile(app.db, app.clock, app.wanted, app.sealer, thumbprint=bench.accounts.thumbprint)
        silent = app.settings.node_silent
        heartbeat = app.db.read(lambda tx: nodes.newest_heartbeat(tx, silent))
        if heartbeat is None or (heartbeat == self._heartbeat and not at_all):
            return 0
        self._heartbeat = heartbeat
        return verify(app.db, app.clock, self._scopes, silent)

    def _look_at_all(self) -> dict[str, Standing]:
        """Return how far the tickets are that have not ended, by issuance."""
        standings = self._app.db.read(lambda tx: issuances.standings(tx, list(self._open)))
        for issuance_id, standing in standings.items():
            self._tell(self._open[issuance_id], standing)
        return standings

    def _settle(self, tickets: list[Ticket]) -> None:
        """Find out what became of tickets that have ended, as far as we knew."""
        for found in self._ask(tickets):
            issuance_id = found.ticket.issuance_id
            if found.result == "waiting":
                continue
            self._open.pop(issuance_id, None)
            if _is_final(found):
                self._unserved.pop(issuance_id, None)
                self._ended[issuance_id] = found
                self._watch.ended(found)
            else:
                self._unserved[issuance_id] = found.ticket

    def _tell(self, ticket: Ticket, standing: Standing) -> None:
        """Say how far a ticket is that somebody else works on; our own crew tells by itself."""
        if self._bench is None and self._reached.get(ticket.issuance_id) != standing.state:
            self._reached[ticket.issuance_id] = standing.state
            self._watch.reached(ticket, standing.state)

    def _is_all_put_off(self, standings: Collection[Standing]) -> bool:
        """Say whether nothing of this is tried again until we have stopped waiting."""
        if any(standing.leased for standing in standings):
            return False
        return self._is_closed() or all(self._is_too_late(standing.attempt_at) for standing in standings)

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

    def _ask(self, tickets: list[Ticket]) -> list[Outcome]:
        """Return how tickets stand; one that only waits for the CA has the CA's trouble for a reason."""
        pages = [tickets[start : start + _PAGE] for start in range(0, len(tickets), _PAGE)]
        found = [one for page in pages for one in self._app.db.read(partial(self._read, page))]
        trouble = self._incident() if any(map(_only_waits, found)) else None
        if trouble is None:
            return found
        error = {**(trouble["error"] or {}), "retry_at": _shown(trouble["next_attempt_at"])}
        return [replace(one, error=error) if _only_waits(one) else one for one in found]

    def _read(self, tickets: list[Ticket], tx: Transaction) -> list[Outcome]:
        ids = {ticket.lineage_id for ticket in tickets}
        live = nodes.newest_heartbeat(tx, self._app.settings.node_silent) is not None
        return outcomes(tx, tickets, ids - unlisted(tx, ids, self._scopes) if live else ())

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
        app, worker_id = self._app, new_id()
        self._bench = bench = parts.make_bench(app, worker_id, self._note)
        app.db.write(lambda tx: workers.enter(tx, worker_id, socket.gethostname(), os.getpid(), version("certworker")))
        self._stack.callback(app.db.write, lambda tx: workers.leave(tx, worker_id))
        expire(app.db, app.clock)
        self._crew = crew = Crew(
            bench, worker_id, app.settings.concurrency, self._only, may_order=self._can_answer, beaten=self._beaten
        )
        responder = parts.make_responder(app, crew)
        responder.start()
        self._stack.callback(responder.stop)
        agent = parts.make_agent(app)
        if agent is not None:
            from certworker.embedded import EmbeddedNode  # slow to import, see `parts.make_agent`
            from certworker.steps.publish import publish_changes

            if app.settings.auto_publish == "on":
                publish_changes(app.db, app.clock, app.defaults, leave_out=app.leave_out, always=True)
            self._node = EmbeddedNode(agent, self._wake.set)
            self._stack.callback(self._node.stop, as_found=True)
            self._node.start()
        self._stack.callback(crew.stop)
        crew.start()
        Core().gather([*crew.threads, responder.thread], batch=True)

    def _beaten(self, db_now: datetime | None) -> None:
        if db_now is not None:
            self._app.clock.anchor(db_now)

    def _can_answer(self) -> bool:
        return self._node is None or self._node.answers

    def _note(self, session: Session) -> None:
        if not session.issuance.is_open:
            if self._node is not None:
                self._node.poke()
            self._told.append(session.issuance.id)
            if len(self._told) >= len(self._open):
                self._wake.set()  # that was the last one; the others wait for the next look
        self._watch.moved(session)


def _shown(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


def _only_waits(found: Outcome) -> bool:
    return found.result == "waiting" and found.error is None


def _is_final(found: Outcome) -> bool:
    return found.result == "failed" or (found.result == "renewed" and found.served is not False)
