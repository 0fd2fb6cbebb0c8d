"""`certworker run`: the parts in motion, from the first claim to the last.

Each part is started and stopped here, in an order that loses nothing: at the end no step starts, the
issuers finish the action under way and give their leases back, and the responder goes last, because a
CA may still be looking.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timedelta
from importlib.metadata import version

from certworker import parts, wiring
from certworker.api.server import ApiServer
from certworker.core.issuance import State
from certworker.cores import Core
from certworker.embedded import EmbeddedNode
from certworker.errors import StoreError
from certworker.scheduler import Job, Timetable
from certworker.steps.crew import POLL, Crew
from certworker.steps.deliver import Scopes
from certworker.steps.expire import expire
from certworker.steps.publish import figures, pass_over_changes, publish_changes
from certworker.steps.reap import reap
from certworker.steps.reconcile import reconcile
from certworker.steps.refresh_ari import refresh_ari
from certworker.steps.roll_back import take_back_certificates, take_back_version
from certworker.steps.scan import scan
from certworker.steps.session import Session
from certworker.steps.verify import count_overdue, verify
from certworker.store import issuances, report, settings_kv, workers
from certworker.store.database import Transaction
from certworker.store.listen import COUNTERS
from certworker.store.rows import new_id
from certworker.wiring import App

_log = logging.getLogger(__name__)

_REAP = timedelta(minutes=10)
_EXPIRE = timedelta(seconds=30)
_LOOK = timedelta(seconds=2)
"""How often the notes of changed rows are read: an empty look is one index probe."""
_ARI = timedelta(seconds=10)
_ARI_GATHER = timedelta(seconds=0.5)
"""So soon after an issuance the CA is asked when it wants it renewed, with what else was issued meanwhile."""
_GATE = timedelta(seconds=2)
"""How often a worker that claims nothing hears what the others know of the CA, and whether it is due to be tried."""
_TOLD_POLL = timedelta(seconds=5)
"""How often a worker that is told of new work (LISTEN) looks by itself."""
_JUMP = timedelta(seconds=30)


class Service:
    """One worker: claims, issues, answers, publishes, until stopped."""

    def __init__(self, app: App, moved: Callable[[Session], None] | None = None) -> None:
        self._app = app
        self._moved_hook = moved
        self._worker_id = new_id()
        self._role = wiring.take_role(app)
        self._place = wiring.take_place(app)
        self._listener = parts.make_listener(app, self._told)
        self._announced = False
        self._scopes = Scopes()
        self._core = Core()
        self._overdue = 0
        """Certificates that nodes should have served by now, when it was last looked."""
        self._stopping = threading.Event()
        try:
            self._bench = parts.make_bench(app, self._worker_id, self._moved)
            self._crew = Crew(
                self._bench, self._worker_id, app.settings.concurrency, may_order=self._can_answer,
                beaten=self._beaten, poll=POLL if self._listener is None else _TOLD_POLL,
            )  # fmt: skip
            self._responder = parts.make_responder(app, self._crew)
            self._node = EmbeddedNode(agent, self._verify) if (agent := parts.make_agent(app)) is not None else None
            self._timetable = Timetable(self._jobs())
            self._node_api = parts.make_node_api(app)
            self._api = ApiServer(app.settings.api_listen, self, app.settings.scan_interval)
        except BaseException:
            self._give_up_locks()
            raise

    def start(self) -> None:
        """Start everything; what cannot be had (a port, say) is one clear error, and nothing is left running.

        The crew goes on at once with what was under way; what is new is taken over beside it.
        """
        try:
            self._responder.start()
            self._api.start()
            self._app.db.write(self._enter)
            self._announced = True
            if self._app.settings.auto_publish == "on":
                self._publish(always=True)
            if self._node_api is not None:
                self._node_api.start()
            if self._node is not None:
                self._node.start()
            self._crew.start()
            self._share_one_core()
            self._timetable.start()
            if self._listener is not None:
                self._listener.start()
        except BaseException:
            self.stop()
            raise
        _log.info("service.started", extra={"worker": self._worker_id, "pid": os.getpid()})

    def stop(self) -> None:
        """Drain and stop, in well under 30 s; repeating it is harmless. What fails on the way stops nothing else."""
        _log.info("service.stopping", extra={"worker": self._worker_id})
        self._stopping.set()
        with ExitStack() as last:  # run in reverse: the timetable first, the role last
            last.callback(self._give_up_locks)
            last.callback(self._leave)
            last.callback(self._api.stop)
            last.callback(self._responder.stop)
            if self._node_api is not None:
                last.callback(self._node_api.stop)
            if self._node is not None:
                last.callback(self._node.stop)
            last.callback(self._crew.stop)
            last.callback(self._timetable.stop)
            if self._listener is not None:
                last.callback(self._listener.stop)

    def _give_up_locks(self) -> None:
        for held in (self._role, self._place):
            if held is not None:
                held.give_up()

    def _can_answer(self) -> bool:
        """Say whether this machine's own proxy, if there is one, answers challenges."""
        return self._node is None or self._node.answers

    def _going(self) -> bool:
        return not self._stopping.is_set()

    def _leave(self) -> None:
        if not self._announced:
            return
        self._announced = False
        try:
            self._app.db.write(lambda tx: workers.leave(tx, self._worker_id))
        except StoreError as error:
            _log.warning("service.not_signed_off", extra={"error": str(error)})  # silence says it too

    # -- steps ----------------------------------------------------------------------------------------

    def _jobs(self) -> list[Job]:
        interval = self._app.settings.scan_interval
        jobs = [
            Job("reconcile", self._reconcile, min(_LOOK, interval)),
            Job("scan", self._scan, interval),
            Job("expire", self._expire, min(_EXPIRE, interval)),
            Job("verify", self._verify, min(_LOOK, interval)),
            Job("roll_back", self._roll_back, min(_LOOK, interval)),
            Job("refresh_ari", self._refresh_ari, min(_ARI, interval)),
            Job("gate", self._look_at_gate, _GATE),
            Job("reap", lambda: reap(self._app.db, self._app.clock), _REAP),
        ]
        if self._app.settings.auto_publish == "on":
            jobs.append(Job("publish", self._publish, min(_LOOK, interval)))
        else:
            jobs.append(Job("publish", lambda: pass_over_changes(self._app.db), min(_LOOK, interval)))
        return jobs

    def _reconcile(self) -> None:
        app = self._app
        reconcile(
            app.db, app.clock, app.wanted, app.sealer, self._going, taken=self._scan,
            thumbprint=self._bench.accounts.thumbprint,
        )  # fmt: skip

    def _scan(self) -> None:
        report = scan(self._app.db, self._app.clock, self._going)
        if report.queued:
            _log.info("scan.queued", extra={"due": report.looked_at, "queued": report.queued})
            self._crew.poke()

    def _refresh_ari(self) -> None:
        bench = self._bench
        if refresh_ari(
            bench.db, bench.client, bench.clock, bench.draw, self._going,
            closed=lambda: bench.gate.closed_until() is not None,
            trouble=lambda failure: bench.gate.failed(failure, ""),
        ):  # fmt: skip
            self._scan()

    def _look_at_gate(self) -> None:
        self._bench.gate.refresh()
        self._bench.gate.probe(self._bench.client)

    def _expire(self) -> None:
        count = expire(self._app.db, self._app.clock)
        if count:
            _log.warning("certificates.expired", extra={"count": count})

    def _publish(self, always: bool = False) -> None:
        app = self._app
        done = publish_changes(app.db, app.clock, app.defaults, leave_out=app.leave_out, always=always)
        if done is None:
            return
        for fault in done.faults:
            if done.refused:
                _log.error("publish.refused", extra={"fault": str(fault)})
            else:
                _log.warning("publish.left_out", extra={"fault": str(fault)})
        if done.hold is not None and always:
            _log.warning("publish.held", extra={"version": done.hold.number, "by": done.hold.by, "since": done.hold.at})
        for warning in done.warnings:
            _log.warning("publish.warning", extra={"warning": warning})
        if done.version is not None and done.changed:
            _log.info("version.published", extra={"number": done.version.number})
        self._wake_nodes()

    def _verify(self) -> None:
        served = verify(self._app.db, self._app.clock, self._scopes, self._app.settings.node_silent)
        if served:
            _log.info("certificates.served", extra={"count": served})
        overdue = self.overdue()
        if overdue > self._overdue:
            _log.error("certificates.not_served", extra={"count": overdue, "hint": "see `certworker status`"})
        self._overdue = overdue

    def _roll_back(self) -> None:
        app, silent = self._app, self._app.settings.node_silent
        version = take_back_version(app.db, app.clock, app.defaults, silent)
        certificates = take_back_certificates(app.db, app.clock, app.sealer, self._bench.draw, silent)
        if (version or certificates) and self._node is not None:
            self._node.poke()

    # -- facts for the API (api.metrics.Facts) ----------------------------------------------------------

    def now(self) -> datetime:
        return self._app.clock()

    def last_scan_at(self) -> datetime | None:
        last = self._app.db.read(lambda tx: settings_kv.find(tx, settings_kv.LAST_SCAN_AT))
        return None if last is None else datetime.fromisoformat(last)

    def issuances_in_flight(self) -> int:
        return self._crew.in_flight

    def ca_available(self) -> bool:
        return self._bench.gate.closed_until() is None

    def overdue(self) -> int:
        return count_overdue(self._app.db, self._app.clock)

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        return self._app.db.read(report.counts)

    def publishing(self) -> Mapping[str, int]:
        return self._app.db.read(figures)

    def step_errors(self) -> Mapping[str, int]:
        return dict(self._timetable.errors)

    def challenge_answers(self) -> Mapping[str, int]:
        return asdict(self._responder.counters)

    # -- events ---------------------------------------------------------------------------------------

    def _told(self, table: str) -> None:
        """Something was written that waits for a worker, or for a node."""
        if table == "issuances":
            self._crew.poke()
        elif table == COUNTERS:
            self._wake_nodes()
        elif not self._stopping.is_set():
            self._timetable.run_soon("reconcile")

    def _wake_nodes(self) -> None:
        if self._node_api is not None:
            self._node_api.poke()
        if self._node is not None:
            self._node.poke()

    def _share_one_core(self) -> None:
        self._core.gather([*self._crew.threads, self._responder.thread])

    def _beaten(self, db_now: datetime | None) -> None:
        """Follow the database's clock; what waits for a time that will not come looks now."""
        self._share_one_core()
        if db_now is None:
            self._app.db.write(self._sign_on)
        elif abs(self._app.clock.anchor(db_now)) > _JUMP:
            self._crew.realign()

    def _moved(self, session: Session) -> None:
        row = session.issuance
        fields = {"names": session.lineage.dns_names[:3], "issuance": row.id, "state": row.state}
        if row.error is not None:
            fields |= {"class": row.error["class"], "detail": row.error["detail"], "retry_at": row.error["retry_at"]}
            _log.warning("issuance.trouble", extra=fields)
        else:
            _log.info(f"issuance.{row.state}", extra=fields)
        if row.state == State.DONE:
            self._timetable.run_soon("refresh_ari", within=_ARI_GATHER)
            self._wake_nodes()
        if self._moved_hook is not None:
            self._moved_hook(session)

    def _enter(self, tx: Transaction) -> None:
        if self._role is not None:
            # We alone hold the role, so whoever else is in the database is dead.
            workers.bury(tx, everybody=True)
            issuances.free_dead_leases(tx)
        elif self._place is not None:
            # The lock of this data folder is ours: whoever had it before is dead.
            issuances.free_dead_leases(tx, workers.bury_place(tx, self._place.name))
        self._sign_on(tx)

    def _sign_on(self, tx: Transaction) -> None:
        place = None if self._place is None else self._place.name
        workers.enter(tx, self._worker_id, socket.gethostname(), os.getpid(), version("certworker"), place)
