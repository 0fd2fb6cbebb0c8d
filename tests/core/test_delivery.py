"""Laws of what a node may have."""

import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.delivery import EVERYTHING, Canary, Scope, collect_changes, join_scopes, scope_of, why_held_back
from certworker.core.rollout import CertificateChanges, Cursor, NodeCertificate
from certworker.core.snapshot import Listener, Policy, Snapshot

NEW, OLD = "new", "old"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def snapshot(*policies: int | None, protocol: str = "https") -> Snapshot:
    listeners = tuple(
        Listener.model_validate(
            {"id": uuid(port), "port": port, "protocol": protocol,
             "tls_policy_id": None if policy is None else uuid(policy)}
        )
        for port, policy in enumerate(policies, 1)
    )  # fmt: skip
    named = tuple(Policy(id=uuid(policy), mode="auto") for policy in {*policies} - {None} if policy is not None)
    return Snapshot(listeners=listeners, policies=named)


# -- scope ------------------------------------------------------------------------------------------


def test_a_listener_without_a_policy_serves_everything() -> None:
    """One is enough, in whichever of the versions."""
    scope = join_scopes(map(scope_of, [snapshot(1), snapshot(2, None)]))

    assert scope == EVERYTHING
    assert scope.tag == ""
    assert scope.covers([])


def test_listeners_with_policies_serve_what_these_want() -> None:
    """Of all versions together: the one that is served, and the one that is to come."""
    scope = join_scopes(map(scope_of, [snapshot(1), snapshot(1, 2)]))

    assert scope == Scope(frozenset([uuid(1), uuid(2)]))
    assert scope.covers([uuid(2), uuid(3)])
    assert not scope.covers([uuid(3)])
    assert not scope.covers([])


@pytest.mark.parametrize("snapshots", [[], [snapshot(None, protocol="http")]], ids=["no version", "http only"])
def test_without_an_https_listener_nothing_is_served(snapshots: list[Snapshot]) -> None:
    """A node that answers no handshake gets no key."""
    assert not join_scopes(map(scope_of, snapshots)).covers([uuid(1)])


@given(one=st.frozensets(st.sampled_from("pqrs")), other=st.frozensets(st.sampled_from("pqrs")))
def test_a_tag_names_a_scope(one: frozenset[str], other: frozenset[str]) -> None:
    """And is never that of everything."""
    assert (Scope(one).tag == Scope(other).tag) == (one == other)
    assert Scope(one).tag != EVERYTHING.tag


# -- canaries ---------------------------------------------------------------------------------------

canaries = st.lists(st.builds(Canary, st.sampled_from("abcd"), st.booleans(), st.sampled_from([NEW, OLD, None])))


def test_without_canaries_everybody_has_it_at_once() -> None:
    assert why_held_back(NEW, []) is None


@given(known=canaries)
def test_others_follow_when_every_live_canary_has_proved_it(known: list[Canary]) -> None:
    """And at least one has: silence proves nothing."""
    live = [canary for canary in known if canary.live]
    proved = bool(live) and all(canary.version_id == NEW for canary in live)

    assert (why_held_back(NEW, known) is None) == (not known or proved)


def test_the_reason_names_the_canaries() -> None:
    """Those that somebody has to look at."""
    good, bad = Canary("good", True, NEW), Canary("bad", True, OLD)

    assert why_held_back(NEW, [good, bad]) == "not yet proved by canary bad"
    assert "start the agent of good" in (why_held_back(NEW, [replace(good, live=False)]) or "")


# -- pages ------------------------------------------------------------------------------------------


def certificate(number: int, revision: int) -> NodeCertificate:
    return NodeCertificate(uuid(number), frozenset(), ("a.test",), "", "", "", NOW, revision)


class Pages:
    """A control plane that forgets and restarts as it likes; it is asked a page at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 1
        self.rows: dict[int, int] = {}
        """Certificate -> revision."""
        self.gone: dict[int, int] = {}
        self.revision = 0

    def put(self, number: int) -> None:
        self.revision += 1
        self.rows[number] = self.revision
        self.gone.pop(number, None)

    def remove(self, number: int) -> None:
        if self.rows.pop(number, None) is not None:
            self.revision += 1
            self.gone[number] = self.revision

    def read(self, cursor: Cursor, continued: bool) -> CertificateChanges:
        complete = cursor.epoch != self.epoch
        after = 0 if complete else cursor.revision
        rows = sorted((revision, number) for number, revision in self.rows.items() if revision > after)
        page = rows[: self.size]
        more = len(page) == self.size
        end = page[-1][0] if more else self.revision
        gone = frozenset(uuid(number) for number, revision in self.gone.items() if after < revision <= end)
        changed = tuple(certificate(number, revision) for revision, number in page)
        return CertificateChanges(
            Cursor(self.epoch, end), changed, frozenset() if complete else gone, complete, more=more
        )  # fmt: skip


@given(seed=st.integers(0, 2**32), size=st.integers(1, 5), start=st.integers(0, 30))
def test_pages_amount_to_what_is_there(seed: int, size: int, start: int) -> None:
    """Whatever changes between two pages: who applies the changes has exactly what the control plane has."""
    chance = random.Random(seed)
    plane = Pages(size)
    for _ in range(start):
        chance.choice([plane.put, plane.put, plane.remove])(chance.randrange(8))
    held: dict[str, int] = {}
    cursor = Cursor()
    stirs = 20

    def read(cursor: Cursor, continued: bool) -> CertificateChanges:
        nonlocal stirs
        page = plane.read(cursor, continued)
        if stirs > 0:
            stirs -= 1
            chance.choice([plane.put, plane.remove])(chance.randrange(8))
            plane.epoch += chance.random() < 0.1
        return page

    for _ in range(3):
        changes = collect_changes(read, cursor)
        if changes.complete:
            held.clear()
        held |= {one.id: one.revision for one in changes.changed}
        held = {name: revision for name, revision in held.items() if name not in changes.removed}
        cursor = changes.cursor
        assert not changes.more
        assert not changes.removed & {one.id for one in changes.changed}
    stirs = 0
    changes = collect_changes(read, cursor)
    held = {} if changes.complete else held
    held |= {one.id: one.revision for one in changes.changed}
    held = {name: revision for name, revision in held.items() if name not in changes.removed}

    assert held == {uuid(number): revision for number, revision in plane.rows.items()}
