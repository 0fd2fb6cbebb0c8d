"""A CA that refuses good nonces (RFC 8555 §6.5): A01 to A04. What it costs is measured by `tests.chaos.nonces`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from certworker.cli.pebble import Pebble
from certworker.store.database import Database
from tests.steps.life import HOUR, MINUTE, told

from .lab import Lab, lab_at
from .proxy import Exchange, FaultProxy

pytestmark = pytest.mark.pebble

TRIES = 10

MakeLab = Callable[[int], Lab]


@pytest.fixture
def make_lab(sqlite_db: Database, start_pebble: Callable[..., Pebble], tmp_path: Path) -> Iterator[MakeLab]:
    """Make a lab at a CA that refuses so many percent of all nonces."""
    with ExitStack() as stack:

        def make(percent: int) -> Lab:
            ca = start_pebble(nonce_reject=percent, authz_reuse=0)
            proxy = stack.enter_context(FaultProxy(ca, tmp_path / "proxy"))
            return stack.enter_context(lab_at(sqlite_db, ca, proxy))

        yield make


@pytest.mark.parametrize(("percent", "count"), [(5, 6), (50, 6), (90, 2)])
def test_nonces_that_are_refused(make_lab: MakeLab, percent: int, count: int) -> None:
    """Every certificate is issued, once; what ten tries did not get through goes on where it was."""
    lab = make_lab(percent)
    names = [f"{number}.chaos.test" for number in range(count)]
    for name in names:
        lab.issue(name, 6 * HOUR)

    assert all(lab.is_active(name) for name in names)
    assert lab.world.count("issuances") == len(lab.ledger()) == count
    assert len(lab.proxy.seen("newOrder", 201)) == count
    assert len(lab.proxy.seen("newAccount", 201)) == 1
    assert_fresh_nonces(lab)
    assert max(attempts(lab)) <= TRIES
    if percent == 5:
        assert lab.world.rows("SELECT count(*) FROM issuances WHERE claims > 1") == [(0,)]


def test_every_nonce_is_refused(make_lab: MakeLab) -> None:
    """A04: ten POSTs for each try and no more; then nobody asks, and an operator is told."""
    lab = make_lab(100)
    lab.issue("a.chaos.test", 30 * MINUTE)

    assert set(attempts(lab)) == {TRIES}
    shown = told(lab) or {}
    assert shown["state"] in ("open", "half_open")
    assert shown["error"]["class"] == "transient"
    assert shown["error"]["type"].endswith(":badNonce")
    assert "refuses every nonce" in shown["error"]["hint"]
    # Twelve until it opens, then one for each time that the directory could be read.
    assert len(attempts(lab)) <= 12 + 3 + 30 / 5
    assert lab.world.rows("SELECT DISTINCT state FROM issuances") == [("queued",)]
    assert lab.ledger() == []
    assert_fresh_nonces(lab)


def posts(lab: Lab) -> list[Exchange]:
    return [exchange for exchange in lab.proxy.exchanges if exchange.method == "POST"]


def is_refused(exchange: Exchange) -> bool:
    said = exchange.answer
    return said is not None and said.status == 400 and said.json["type"].endswith(":badNonce")


def assert_fresh_nonces(lab: Lab) -> None:
    """No nonce is sent twice, and after a refusal it is the one that came with it."""
    nonces = [exchange.protected["nonce"] for exchange in posts(lab)]
    assert len(set(nonces)) == len(nonces)
    for run in runs(lab):
        for refused, again in pairwise(run):
            assert refused.answer is not None
            assert is_refused(refused)
            assert again.protected["nonce"] == refused.answer.headers["replay-nonce"]


def attempts(lab: Lab) -> list[int]:
    """Return how many POSTs each attempt at a step took."""
    return [len(run) for run in runs(lab)]


def runs(lab: Lab) -> list[list[Exchange]]:
    """Return the POSTs by attempt: to the same address, at the same time of a clock that every wait moves."""
    asked = [(sent.path, sent.at) for sent in lab.wire.sent if sent.method == "POST"]
    paired = zip(posts(lab), asked, strict=True)
    return [[exchange for exchange, _ in run] for _, run in groupby(paired, key=lambda pair: pair[1])]
