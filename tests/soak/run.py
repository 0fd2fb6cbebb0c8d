"""One soak, from the first certificate to the summary."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import func, select, text, update

from certworker.cli.pebble import NINETY_DAYS, Pebble
from certworker.store.tables import issuances, lineage_names, lineages
from tests.chaos.oracles import assert_audited, assert_nothing_stuck, assert_pairs, assert_quiet, keys_lost
from tests.chaos.proxy import Answer, FaultProxy, rewrite
from tests.conftest import migrate
from tests.flow.box import until

from .checks import bugs, crashes, duplicates, leaks
from .fleet import BUSY, Fleet, fleet_of
from .servers import CrashingPostgres, run_crashing_postgres
from .storm import LONGEST_WAIT, Storm, Struck, kept_retry_after, kept_schedule, let_die, revive
from .watch import Watch

LIFE = timedelta(seconds=240)
"""Of a certificate: renewed at half of it at the latest, sooner where the CA suggests it."""
MORTAL = [f"mortal-{number}.soak.test" for number in range(3)]
"""Names that die and live again."""
DEAD = "dead.soak.test"
"""A name in a shared certificate that leads to nobody before the storm is over."""
SHARED = [["one.shared.soak.test", "two.shared.soak.test"], ["three.shared.soak.test", DEAD, "four.shared.soak.test"]]
_FIRST = 300
"""Seconds for the first certificate: nothing strikes before, and many names take their time to be taken over."""
_SETTLE = 150
_IN_FLIGHT = 32
"""Issuances at a time, of all workers: Pebble's own deadlock is rare with these, and not with many more."""


@dataclass(frozen=True)
class Plan:
    """What a soak is to do."""

    seconds: float
    """Of faults."""
    seeds: tuple[int, ...]
    """One storm after the other, for the same time."""
    workers: int = 4
    database: str = "postgresql"
    names: int = 40
    """Certificates for one name each, besides the few that are shared or die; every other one is renewed all the time,
    the others when they are due."""
    life: timedelta = LIFE
    only: tuple[str, ...] | None = None
    """Kinds of faults; None is all."""
    by_hand: bool = True
    """Leases of frozen workers are ended, so that nobody waits a minute for them."""
    ca_resets: bool = False
    until_issued: bool = False
    """Certificates of 90 days, each once: the storm ends when all are there."""
    every: float = 1.2
    """Seconds between two faults."""
    renew_per_second: int = 4
    """How many of the busy certificates."""


@dataclass
class Outcome:
    """What came of it."""

    figures: dict[str, object] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Which oracles failed, and what they saw; empty is well."""

    def lines(self) -> Iterator[str]:
        """Print it for a person."""
        for title, figures in (("faults", self.struck), ("requests", self.requests), ("what came of it", self.figures)):
            yield title
            width = max(map(len, figures), default=0)
            yield from (f"  {name.ljust(width)}  {value}" for name, value in figures.items())
        yield f"FAILED, {len(self.faults)}:" if self.faults else "every oracle is content"
        yield from (f"  {fault}" for fault in self.faults)


def soak(plan: Plan, folder: Path, tell: Callable[[str], object] = print) -> Outcome:
    """Run a fleet through the storms of `plan`, let everything settle, and ask all oracles."""
    with ExitStack() as stack:
        postgres = stack.enter_context(run_crashing_postgres()) if plan.database == "postgresql" else None
        url = _make_database(postgres, folder)
        days = NINETY_DAYS if plan.until_issued else {"description": "short", "validityPeriod": plan.life.seconds}
        # An order that may reuse looks at every authorization there is, which is where Pebble deadlocks.
        reuse = 0 if plan.until_issued else 50
        ca = stack.enter_context(Pebble(profiles={"default": days}, authz_reuse=reuse, workdir=folder / "ca"))
        proxy = stack.enter_context(FaultProxy(ca, folder / "proxy"))
        settings = {"ACME_RATE_LIMITS": "none,runaway=100000/1s", "CONCURRENCY": str(_IN_FLIGHT // plan.workers)}
        fleet = stack.enter_context(fleet_of(plan.workers, ca, proxy, folder, url, **settings))
        watch = stack.enter_context(Watch(url, [] if plan.until_issued else MORTAL))
        return _Soak(plan, fleet, watch, postgres, tell).run()


def _make_database(postgres: CrashingPostgres | None, folder: Path) -> str:
    if postgres is None:
        url = f"sqlite:///{folder / 'certworker.db'}"
    else:
        url = postgres.server.url(postgres.server.create_database())
    migrate(url)
    return url


class _Soak:
    def __init__(
        self, plan: Plan, fleet: Fleet, watch: Watch, postgres: CrashingPostgres | None, tell: Callable[[str], object]
    ) -> None:
        self._plan, self._fleet, self._watch, self._postgres, self._tell = plan, fleet, watch, postgres, tell
        self._struck = Struck()
        self._outcome = Outcome(struck=self._struck.counts)
        self._began = time.monotonic()

    def run(self) -> Outcome:
        plan, fleet = self._plan, self._fleet
        fleet.want(*[[f"{BUSY if number % 2 else 'calm'}-{number}.soak.test"] for number in range(plan.names)])
        if not plan.until_issued:
            let_die(fleet, DEAD)
            fleet.want(*[[name] for name in MORTAL])
            fleet.want(*SHARED, shared=True)
        fleet.start()
        until(lambda: fleet.done() > 0, _FIRST)
        for seed in plan.seeds:
            self._tell(f"{self._elapsed():.0f} s: storm with seed {seed}")
            self._rage(seed)
        self._tell(f"{self._elapsed():.0f} s: it settles")
        with self._oracle("O4 everything that is wanted is there in the end"):
            self._settle()
        self._judge()
        return self._outcome

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _rage(self, seed: int) -> None:
        plan, fleet = self._plan, self._fleet
        storm = Storm(
            fleet, self._watch, self._struck, seed, postgres=self._postgres,
            mortal=() if plan.until_issued else MORTAL, only=plan.only, ca_resets=plan.ca_resets,
            by_hand=plan.by_hand, every=plan.every, renew_per_second=0 if plan.until_issued else plan.renew_per_second,
        )  # fmt: skip
        going = (lambda: fleet.done() < plan.names) if plan.until_issued else lambda: True
        storm.rage(plan.seconds / len(plan.seeds), going)

    # -- afterwards -----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Let everything be issued that is wanted, then every certificate be renewed once more."""
        fleet, began = self._fleet, time.monotonic()
        for name in [*MORTAL, DEAD]:
            revive(fleet, name)
        # A CA that wants certificates renewed at once, as Pebble does with short-lived ones, is never quiet.
        fleet.proxy.on("renewalInfo", rewrite(_tomorrow), times=None)
        time.sleep(LONGEST_WAIT * 1.1)
        _await(self._is_settled, fleet, Fleet.end_waits)
        self._outcome.figures["seconds to settle"] = f"{time.monotonic() - began:.1f}"
        self._tell(f"{self._elapsed():.0f} s: everything that is wanted is there")
        if self._plan.until_issued:
            return
        since = datetime.now(UTC)
        _await(lambda: _renewed(fleet, since) == fleet.wanted(), fleet, lambda one: _renew_all(one, since))
        _await(lambda: fleet.open() == 0, fleet, lambda _: None)

    def _is_settled(self) -> bool:
        left_out = select(func.count()).where(lineage_names.c.left_out_at.is_not(None))
        complete = self._fleet.db.read(lambda tx: tx.execute(left_out).scalar()) == 0
        return complete and self._fleet.open() == 0 and self._fleet.served() == self._fleet.wanted()

    def _judge(self) -> None:
        self._tell(f"{self._elapsed():.0f} s: the oracles are asked")
        fleet, struck, watch, figures = self._fleet, self._struck, self._watch, self._outcome.figures
        self._fault("Pebble", ["it hangs in its known deadlock, nothing below counts"] if fleet.ca.deadlocked() else [])
        forgotten = struck.resets[-1] if struck.resets else 0
        with self._oracle("O12 quiet"):
            assert_quiet(fleet.first)
        with self._oracle("O4 nothing stuck"):
            assert_nothing_stuck(fleet.db)
        with self._oracle("O2 pairs"):
            assert_pairs(fleet.first)
        with self._oracle("O7 audit"):
            assert_audited(fleet.db)
        ledger = fleet.ledger()
        # What a CA issued and forgot before it was fetched is nobody's any more.
        known = {issued.serial for issued in ledger[forgotten:]}
        twice, lost = known & set(duplicates(fleet)), known & set(keys_lost(fleet.first))
        accounts, exchanges = fleet.first.accounts(), list(fleet.proxy.exchanges)
        kept, spread = kept_retry_after(struck, exchanges), kept_schedule(struck, exchanges)
        self._fault("O1 at every instant", sorted(watch.faults))
        self._fault("O3 issued and never served", sorted(twice))
        self._fault("O3 keys lost", sorted(lost))
        self._fault("O5 leaks", leaks(fleet))
        self._fault("O6 accounts", [f"{accounts} were made"] if accounts != 1 + len(struck.resets) else [])
        self._fault("O6 Retry-After", [f"asked {-kept.worst:.2f} s too soon"] if kept.worst < 0 else [])
        self._fault("O6 schedule", [f"asked {-spread.worst:.2f} s too soon"] if spread.worst < 0 else [])
        self._fault("O11 bugs", bugs(fleet))
        self._fault("O11 tracebacks", crashes(fleet))
        self._fault("processes", struck.faults)
        figures |= {
            "certificates wanted": fleet.wanted(), "issued by the CA": len(ledger),
            "renewals": fleet.done() - fleet.wanted(), "duplicates": len(twice), "keys lost": len(lost),
            "issuances that failed": _failed(fleet), "samples": watch.samples,
            "longest time without a sample": f"{watch.longest_gap:.1f} s",
            "resumed after SIGKILL": len(watch.resumed), "slowest resume": f"{max(watch.resumed, default=0):.1f} s",
            "median resume": f"{_median(watch.resumed):.1f} s", "slowest SIGTERM": f"{struck.slowest_stop:.1f} s",
            "Retry-After kept": f"{kept.judged}, closest {kept.worst:+.2f} s, {kept.excused} not to be judged",
            "schedule kept": f"{spread.judged}, closest {spread.worst:+.2f} s, {spread.excused} not to be judged",
            "lease lost": sum(worker.said().count('"issuance.lease_lost"') for worker in fleet.workers),
            "samples in which the CA was not asked": dict(watch.closed) or "none",
            "seconds in all": f"{self._elapsed():.0f}",
        }  # fmt: skip
        self._outcome.requests.update(exchange.route for exchange in fleet.proxy.exchanges)

    def _fault(self, oracle: str, seen: list[str]) -> None:
        if seen:
            more = f" and {len(seen) - 5} more" if len(seen) > 5 else ""
            self._outcome.faults.append(f"{oracle}: {'; '.join(seen[:5])}{more}")

    @contextmanager
    def _oracle(self, name: str) -> Iterator[None]:
        """Note what an oracle has against it, and go on to the next."""
        try:
            yield
            self._tell(f"{self._elapsed():.0f} s: {name}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no yes
            self._outcome.faults.append(f"{name}: {type(error).__name__} {error}")


def _await(done: Callable[[], bool], fleet: Fleet, act: Callable[[Fleet], None]) -> None:
    give_up_at = time.monotonic() + _SETTLE
    while not done():
        assert time.monotonic() < give_up_at, f"{fleet.served()} of {fleet.wanted()} served, {_unfinished(fleet)}"
        act(fleet)
        time.sleep(1)


def _renew_all(fleet: Fleet, since: datetime) -> None:
    """Let every certificate be due that was not renewed since then."""
    renewed = select(issuances.c.lineage_id).where(issuances.c.created_at >= since)
    old = update(lineages).where(lineages.c.id.not_in(renewed))
    due = old.values(renew_at=lineages.c.created_at, next_check_at=lineages.c.created_at)
    fleet.db.write(lambda tx: tx.execute(due))


def _renewed(fleet: Fleet, since: datetime) -> int:
    query = select(func.count(issuances.c.lineage_id.distinct())).where(
        issuances.c.state == "done", issuances.c.created_at >= since
    )
    return fleet.db.read(lambda tx: tx.execute(query).scalar_one())


def _unfinished(fleet: Fleet) -> str:
    query = text("SELECT state, attempt_at, failures, crashes, error FROM issuances WHERE closed_at IS NULL LIMIT 3")
    return "open: " + "; ".join(str(tuple(row)) for row in fleet.db.read(lambda tx: tx.execute(query).all()))


def _failed(fleet: Fleet) -> int:
    query = select(func.count()).where(issuances.c.state == "failed")
    return fleet.db.read(lambda tx: tx.execute(query).scalar_one())


def _tomorrow(answer: Answer) -> Answer:
    """Return what a CA says of a certificate's renewal with a window that is far away."""
    if answer.status != 200:
        return answer
    start = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    window = {"start": start.isoformat(), "end": (start + timedelta(hours=1)).isoformat()}
    return replace(answer, body=json.dumps({**answer.json, "suggestedWindow": window}).encode())


def _median(figures: list[float]) -> float:
    return sorted(figures)[len(figures) // 2] if figures else 0.0
