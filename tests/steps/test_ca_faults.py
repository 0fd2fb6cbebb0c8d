"""Faults of a CA that take more than one answer: A13 to A59 of the fault matrix that a table of answers does not show.

A real Pebble meets some of them again in `tests.chaos.test_ca_faults`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import ip_address
from itertools import cycle, pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from certworker.core.issuance import State
from certworker.core.order import OrderStatus
from certworker.core.retry import ErrorClass
from certworker.errors import TransportFault
from certworker.steps.issue import advance
from certworker.steps.reconcile import reconcile
from certworker.steps.scan import scan
from certworker.steps.session import Session
from certworker.store import issuances
from certworker.store.database import Database
from tests.ca import fake_jws
from tests.ca.fake_issuer import Issuer, make_hierarchy, to_pem
from tests.ca.fake_state import URN, FakeOrder

from .life import (
    DAY,
    FIRST,
    HOUR,
    MINUTE,
    NAME,
    ONE,
    SECOND,
    TIMES,
    Life,
    P,
    R,
    Sent,
    T,
    V,
    X,
    certificate,
    fail,
    history,
    policy_statuses,
    serving,
    told,
    unsynced,
)
from .world import START, World


@pytest.fixture
def world(sqlite_db: Database) -> World:
    """What is proved here does not hang on the database."""
    return unsynced(sqlite_db)


@pytest.fixture
def life(world: World) -> Life:
    return Life(world)


# -- orders that name what they replace ----------------------------------------------------------------

REPLACES_REFUSED = [
    # and what follows if the order without it is refused with the same
    (409, "alreadyReplaced", T), (409, "conflict", T), (500, "serverInternal", T), (403, "unauthorized", X),
    (400, "malformed", P), (409, "fromTheFuture", T), (400, "fromTheFuture", P), (400, "orderNotReady", T),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "otherwise"), REPLACES_REFUSED)
def test_a_refused_replaces(life: Life, status: int, code: str, otherwise: ErrorClass) -> None:
    """A42, A43: the order is made once more without it, at once, and nothing has failed."""
    before = serving(life.world, due=True)
    fail(life.world, "newOrder", status=status, problem=code)
    life.turn()

    first, second = [sent.payload for sent in life.wire.to("/new-order")]
    assert "replaces" not in second
    assert first == {**second, "replaces": life.world.ca.issued[0].renewal_id}
    assert certificate(life.world).fingerprint != before.fingerprint
    assert life.world.lineage(NAME).failures == 0
    assert len(life.world.ca.issued) == 2


@pytest.mark.parametrize(("status", "code", "otherwise"), REPLACES_REFUSED)
def test_replaces_is_dropped_at_most_once(life: Life, status: int, code: str, otherwise: ErrorClass) -> None:
    """If that was not the reason, what is said to the second order counts, and nothing more is sent."""
    before = serving(life.world, due=True)
    fail(life.world, "newOrder", status=status, problem=code, times=2)
    life.turn()

    assert ["replaces" in sent.payload for sent in life.wire.to("/new-order")] == [True, False]
    row = life.world.last_issuance(NAME)
    assert row.error is not None
    assert (row.error["type"], row.error["class"]) == (f"{URN}{code}", otherwise)
    assert certificate(life.world) == before


@pytest.mark.parametrize(
    ("status", "code"), [(429, "rateLimited"), (503, "serverInternal"), (400, "rejectedIdentifier"), (400, "badNonce")]
)
def test_what_is_not_about_replaces(life: Life, status: int, code: str) -> None:
    """The CA's moment, or its names: not asked again at once, and the renewal stays one."""
    serving(life.world, due=True)
    fail(life.world, "newOrder", status=status, problem=code, times=TIMES.get(code, 1))
    life.turn()
    asked = len(life.wire.to("/new-order"))
    life.run(26 * HOUR)

    assert asked == TIMES.get(code, 1)
    assert all("replaces" in sent.payload for sent in life.wire.to("/new-order"))
    assert [issued.replaces for issued in life.world.ca.issued] == [None, life.world.ca.issued[0].renewal_id]


def test_an_order_with_replaces_that_nobody_heard_of(life: Life) -> None:
    """A13: its answer is lost, and to the next one the CA says that the certificate is being replaced."""
    serving(life.world, due=True)
    life.world.ca.replaced_by = "order"
    fail(life.world, "newOrder", raises=TransportFault("reset", "https://ca.test/new-order", "said"), after=True)
    life.turn()
    life.run(MINUTE)

    assert ["replaces" in sent.payload for sent in life.wire.to("/new-order")] == [True, True, False]
    assert len(life.world.ca.issued) == 2
    assert life.world.last_issuance(NAME).state == State.DONE


# -- orders that do not go where they should -----------------------------------------------------------


@pytest.mark.parametrize("wish", [None, "0", "3", "86400", "soon"])
def test_processing_for_ever(life: Life, wish: str | None) -> None:
    """A17: asked ever more rarely, after ten minutes each five at most, until the order expires; then a new one."""
    expires_at, ca = START + 3 * HOUR, life.world.ca
    ca.processing_looks, ca.retry_after = 10**9, wish
    life.wire.change("/new-order", lambda order: order.update(expires=expires_at.isoformat()), times=1)
    life.world.add_policy(NAME)
    life.world.take_over()
    while life.clock() < expires_at:
        life.restart()
        life.run(HOUR)
    ca.processing_looks = 1  # for the next order
    life.run(10 * MINUTE)

    first = history(life.world)[-1]
    polls = life.wire.times(urlsplit(first.order_url or "").path)
    late = [at for at in polls if at > START + 11 * MINUTE]
    assert (first.state, first.error and first.error["type"]) == ("failed", "certworker:order-expired")
    assert all(later - sooner >= 5 * MINUTE for sooner, later in pairwise(late))
    assert 30 <= len(late) <= 3 * 12
    assert all(later - sooner >= SECOND for sooner, later in pairwise(polls[5:]))
    assert life.world.last_issuance(NAME).state == State.DONE
    assert len(life.wire.to("/new-order")) == 2


def test_authorized_and_still_pending(life: Life) -> None:
    """A18: the CA is slower than itself; it is asked again, and no challenge is answered twice."""
    life.wire.change("/order/*", lambda order: order.update(status="pending"), times=3)
    session = life.reach(State.DONE, NAME)

    assert session.issuance.state == State.DONE
    assert len(life.wire.to("/challenge/*")) == 1


def test_an_authorization_that_is_valid_still(life: Life) -> None:
    """A23: nothing is published and the CA is told nothing: it knows already."""
    life.world.ca.reuse_authorizations = True
    life.reach(State.DONE, NAME)
    asked = len(life.wire.to("/challenge/*"))
    life.world.execute("UPDATE lineages SET renew_at = created_at, next_check_at = created_at")
    life.run(MINUTE)

    assert [issuance.state for issuance in history(life.world)] == [State.DONE, State.DONE]
    assert len(life.wire.to("/challenge/*")) == asked == 1
    assert life.world.count("challenges") == 0


def test_a_challenge_that_was_answered_before(life: Life) -> None:
    """A14: the CA works on it already, whoever has told it to: it is not told again."""
    session = life.reach(State.VALIDATING, NAME)
    (authorization,) = life.world.ca.authorizations.values()
    authorization.challenge_status = "processing"
    challenge = {**authorization.challenge(), "status": "processing"}
    life.wire.change("/order/*", lambda shown: shown.update(status="pending"), times=1)
    life.wire.change("/authorization/*", lambda shown: shown.update(status="pending", challenges=[challenge]), times=1)
    session.look_anew()
    life.move(session)

    assert life.wire.to("/challenge/*") == []
    assert session.issuance.state == State.DONE


def test_a_finalize_that_the_ca_forgot(life: Life) -> None:
    """A19: `ready` again after it was accepted: finalized once more with the very same CSR."""
    session = life.reach(State.FINALIZING, NAME)
    (order,) = life.world.ca.orders.values()
    accepted = json.dumps({**json.loads(order.show()), "status": "processing"}).encode()
    fail(life.world, "finalize", status=200, body=accepted, headers={"content-type": "application/json"})
    life.move(session)

    first, second = [sent.payload for sent in life.wire.to("/finalize/*")]
    assert first == second
    assert len(life.world.ca.issued) == 1
    assert session.issuance.state == State.DONE


def test_an_order_that_was_ready_and_is_not(life: Life) -> None:
    """A41: the CA came back without what it had found: the names are proved again, and the same order goes on."""
    session = life.reach(State.FINALIZING, NAME)
    (order,) = life.world.ca.orders.values()
    (authorization,) = order.authorizations
    order.status = authorization.status = authorization.challenge_status = "pending"
    life.move(session)
    put_off = life.world.last_issuance(NAME)
    assert (put_off.state, put_off.error and put_off.error["type"]) == (
        State.FINALIZING, f"{URN}orderNotReady",
    )  # fmt: skip
    life.run(10 * SECOND)

    assert life.world.last_issuance(NAME).id == session.issuance.id
    assert life.world.last_issuance(NAME).state == State.DONE
    assert [len(life.wire.to(path)) for path in ("/new-order", "/challenge/*", "/finalize/*")] == [1, 2, 2]
    assert len(life.world.ca.issued) == 1


def test_an_order_that_is_ready_and_is_not(life: Life) -> None:
    """A41: `ready` to whoever looks, not to finalize, and then `pending`: ever more rarely, as the schedule says."""
    session = life.reach(State.FINALIZING, NAME)
    moods = cycle(["ready", "pending"])
    life.wire.change("/order/*", lambda order: order.update(status=next(moods)))
    fail(life.world, "finalize", status=403, problem="orderNotReady", times=10**6)
    life.move(session)
    life.run(DAY)

    finalized = life.wire.times("/finalize/*")
    waits = [later - sooner for sooner, later in pairwise(finalized)]
    schedule = [5 * SECOND, 15 * SECOND, 45 * SECOND, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 30 * MINUTE, HOUR]
    assert all(wait >= planned for wait, planned in zip(waits, schedule, strict=False))
    assert min(waits[8:]) >= HOUR
    assert len(life.wire.to("/challenge/*")) == 1
    assert len(life.wire.to("/authorization/*")) <= len(finalized) + 2
    assert len(life.wire.to("/new-order")) == 1


def test_an_order_that_is_never_ready_again(life: Life) -> None:
    """A41: as with one that is processing for ever: after ten minutes each five, until it expires; then a new one."""
    expires_at = START + 2 * HOUR
    life.wire.change("/new-order", lambda order: order.update(expires=expires_at.isoformat()), times=1)
    session = life.reach(State.FINALIZING, NAME)
    old = urlsplit(session.issuance.order_url or "").path
    life.wire.change(old, lambda order: order.update(status="pending"))
    fail(life.world, "finalize", status=403, problem="orderNotReady")
    life.move(session)
    life.run(3 * HOUR)

    late = [at for at in life.wire.times(old) if at > START + 11 * MINUTE]
    assert all(later - sooner >= 5 * MINUTE for sooner, later in pairwise(late))
    # Read to be published, and once again after finalize was refused.
    assert len([at for at in life.wire.times("/authorization/*") if at < START + 9 * MINUTE]) == 2
    assert (history(life.world)[-1].error or {})["type"] == "certworker:order-expired"
    assert life.world.last_issuance(NAME).state == State.DONE
    assert len(life.wire.to("/new-order")) == 2


def test_what_a_ca_finds_is_read_once(life: Life) -> None:
    """An order dies of its first dead name; of the others only those are asked for that the CA is at work on still."""
    names = [f"{count}.example.com" for count in range(20)]
    life.world.ca.validate_on = "look"
    life.world.closed_names = {names[0], names[1]}
    session = life.reach(State.VALIDATING, *names)
    advance(life.bench, session)
    order, *_ = life.world.ca.orders.values()
    dead, slow, *_ = sorted(order.authorizations, key=lambda one: one.dns_name)
    asked = len(life.wire.sent)
    life.wire.change(urlsplit(slow.url).path, at_work, times=3)
    life.move(session, State.QUEUED)

    paths = [sent.path for sent in life.wire.sent[asked:]]
    assert paths.count(urlsplit(slow.url).path) == 4
    assert paths.count(urlsplit(dead.url).path) == 1
    assert len(paths) == 1 + 20 + 3
    assert session.issuance.dns_names == sorted(names[2:])
    life.move(session)
    assert session.issuance.state == State.DONE


def at_work(shown: dict[str, Any]) -> None:
    """Let an authorization look as if the CA had not found anything yet."""
    challenges = [{**one, "status": "processing", "error": None} for one in shown["challenges"]]
    shown.update(status="pending", challenges=challenges)


BEFORE_THE_END = [State.ORDERED, State.VALIDATING, State.FINALIZING]


@pytest.mark.parametrize("state", BEFORE_THE_END)
def test_an_order_that_becomes_invalid(life: Life, state: State) -> None:
    """A20: it is dead and asked for no more; what its failing challenge says outweighs what it says itself."""
    life.world.ca.processing_looks = 10
    session = life.reach(state, NAME)
    kill(life.world, "dns", error={"type": f"{URN}rejectedIdentifier", "detail": "wrapper"})
    session.look_anew()
    life.move(session)
    dead = session.issuance
    life.world.ca.processing_looks = 1
    died_at, error = life.clock(), dead.error or {}
    life.run(2 * MINUTE)

    assert (dead.state, error["class"], error["type"]) == (State.FAILED, V, f"{URN}dns")
    assert NAME in error["hint"]
    assert "A 127.0.0.1" in error["hint"]
    assert max(life.wire.times(urlsplit(dead.order_url or "").path)) <= died_at
    assert life.world.last_issuance(NAME).state == State.DONE
    assert life.world.last_issuance(NAME).order_url != dead.order_url


def test_an_order_that_finalize_ends(life: Life) -> None:
    """A20: its authorizations are read as they are then, not as they were before they were proved."""
    session = life.reach(State.FINALIZING, NAME)
    kill(life.world, "caa")
    (order,) = life.world.ca.orders.values()
    headers = {"content-type": "application/json"}
    fail(life.world, "finalize", status=200, body=order.show().encode(), headers=headers)
    life.move(session)

    assert (session.issuance.state, (session.issuance.error or {})["type"]) == (State.FAILED, f"{URN}caa")


def kill(world: World, code: str | None, status: str = "invalid", error: dict[str, Any] | None = None) -> None:
    """Let the newest order and its authorization end like this."""
    order: FakeOrder = list(world.ca.orders.values())[-1]
    (authorization,) = order.authorizations
    authorization.status, order.status, order.error = status, "invalid", error
    if code is not None:
        authorization.challenge_status = "invalid"
        authorization.error = {"type": f"{URN}{code}", "detail": f"said {code}", "status": 403}


@pytest.mark.parametrize(("code", "error_class"), [
    ("caa", V), ("connection", V), ("dns", V), ("dnssec", V), ("incorrectResponse", V), ("tls", V), ("unauthorized", V),
    ("malformed", V), ("fromTheFuture", V), ("rateLimited", R), ("rejectedIdentifier", P), ("serverInternal", T),
    ("userActionRequired", X),
])  # fmt: skip
def test_what_a_failing_challenge_says(life: Life, code: str, error_class: ErrorClass) -> None:
    """A47, A48: the class is the challenge's; it is this name's trouble whatever it is, and a new order is made."""
    session = life.reach(State.VALIDATING, NAME)
    kill(life.world, code)
    life.move(session)

    row, lineage = session.issuance, life.world.lineage(NAME)
    assert row.error is not None
    assert (row.state, row.error["class"], row.error["scope"]) == (State.FAILED, error_class, ONE)
    assert f"said {code}" in row.error["detail"]
    assert lineage.next_check_at == life.clock() + FIRST[error_class]
    assert life.world.count("challenges") == 0
    life.run(DAY + MINUTE)
    assert life.world.last_issuance(NAME).state == State.DONE
    assert len(life.wire.to("/new-order")) == 2


RECORD = 'CAA records of {name}: 0 issue "other.example"; our account, for accounturi (RFC 8657 §3), is {url}'


@pytest.mark.parametrize("place", ["newOrder", "authorization", "finalize"])
def test_a_caa_record_is_shown(life: Life, place: str) -> None:
    """A47: the record that we find, and the account that it would have to name, wherever the CA minds it."""
    session = life.reach(State.VALIDATING if place == "authorization" else State.QUEUED, NAME)
    if place == "authorization":
        kill(life.world, "caa")
    else:
        fail(life.world, place, status=403, problem="caa")
    life.move(session)

    error = session.issuance.error or {}
    (account,) = life.world.ca.accounts
    assert (session.issuance.state, error["class"]) == (State.FAILED, V)
    assert RECORD.format(name=NAME, url=account) in error["hint"]
    assert error == life.world.lineage(NAME).error
    assert life.world.looked_up == []


def test_a_caa_record_of_one_name_of_several(life: Life) -> None:
    """A47: the name is left out, and the record is shown with it."""
    names = ["a.example.com", "b.example.com", "c.example.com"]
    session = life.reach(State.FINALIZING, *names)
    part = {"type": f"{URN}caa", "detail": "forbidden", "identifier": {"type": "dns", "value": names[1]}}
    problem = {"type": f"{URN}caa", "detail": "rechecked", "subproblems": [part]}
    fail(life.world, "finalize", status=403, problem=problem)
    life.move(session)

    (account,) = life.world.ca.accounts
    assert session.issuance.state == State.DONE
    assert life.world.ca.issued[-1].dns_names == {names[0], names[2]}
    assert RECORD.format(name=names[1], url=account) in (life.world.lineage(names[0]).error or {})["hint"]


@pytest.mark.parametrize("status", ["expired", "revoked", "deactivated"])
def test_an_authorization_that_ends(life: Life, status: str) -> None:
    """A22: nobody's fault; a new order, soon."""
    session = life.reach(State.FINALIZING, NAME)
    kill(life.world, None, status)
    session.look_anew()
    life.move(session)
    life.run(MINUTE)

    error = session.issuance.error or {}
    assert (error["class"], error["type"]) == (T, f"certworker:authorization-{status}")
    assert life.world.last_issuance(NAME).state == State.DONE


STRANGE = [
    # path, what is done to the answer
    ("/new-order", "status"), ("/new-order", "authorizations"), ("/new-order", "finalize"), ("/order/*", "status"),
    ("/order/*", "identifiers"), ("/authorization/*", "identifier"), ("/authorization/*", "challenges"),
    ("/challenge/*", "url"), ("/challenge/*", "token"), ("/finalize/*", "status"), ("/directory", "newOrder"),
]  # fmt: skip


LED_AWAY = ["http://169.254.169.254/", "https://169.254.169.254/", "file:///etc/passwd"]


@pytest.mark.parametrize("value", [None, "", 7, [], *LED_AWAY])
def test_fields_that_are_wrong(life: Life, value: object) -> None:
    """A21, A57: missing, or of a kind that leads elsewhere: transient, named, never followed; the order goes on."""
    for count, (path, name) in enumerate(STRANGE):
        if name in ("identifiers", "authorizations", "challenges") and value == []:
            continue
        if path == "/directory" and value == "https://169.254.169.254/":
            continue  # it is trusted to name its hosts
        life.bench.client.refresh_directory() if path != "/directory" else life.clock.move(2 * HOUR)
        life.wire.change(path, lambda document, name=name: document.update({name: value}), times=1)  # type: ignore[misc]
        life.world.add_policy(f"{count}.test")
        life.world.take_over()
        (session,) = life.world.claim()
        life.move(session)
        error, status = session.issuance.error, name == "status" and isinstance(value, str) and value != ""
        life.run(MINUTE)

        assert status or (error is not None and error["type"] == "certworker:ca-answer"), (path, name)
        assert life.world.last_issuance(f"{count}.test").state == State.DONE, (path, name)
    assert {sent.host for sent in life.wire.sent} == {"ca.test"}


def test_a_status_that_nobody_knows(life: Life) -> None:
    """A21: waited for as if it were busy, with a bound; every field beside those we need is ignored."""
    life.wire.change("*", lambda document: document.update(extra={"deep": [1]}, status2=None))
    life.wire.change("/order/*", lambda order: order.update(status="thinking"), times=4)
    session = life.reach(State.DONE, NAME)

    assert session.issuance.state == State.DONE
    assert session.issuance.failures == 0


# -- chains that must not be stored --------------------------------------------------------------------


@dataclass(frozen=True)
class Forge:
    """Makes leaves that are not what was ordered."""

    issuer: Issuer
    public_key: Any
    now: datetime

    def leaf(
        self, *names: str, public_key: Any = None, starts: timedelta = -HOUR, ends: timedelta = 90 * DAY,
        ca: bool = False, issuer: Issuer | None = None, more: tuple[x509.GeneralName, ...] = (),
    ) -> str:  # fmt: skip
        """Return a leaf in PEM, with our key unless another one is given."""
        issuer = issuer or self.issuer
        san = x509.SubjectAlternativeName([*map(x509.DNSName, names), *more])
        builder = x509.CertificateBuilder(
            issuer.certificate.subject, x509.Name([]), public_key or self.public_key, x509.random_serial_number(),
            self.now + starts, self.now + ends,
        )  # fmt: skip
        constraints = x509.BasicConstraints(ca=ca, path_length=None)
        builder = builder.add_extension(san, critical=True).add_extension(constraints, critical=True)
        return to_pem(builder.sign(issuer.key, hashes.SHA256()))


@dataclass(frozen=True)
class Hostile:
    """What the CA sends in the place of a chain."""

    forge: Forge
    good: str
    """The chain that it should send."""
    root: str

    @property
    def leaf(self) -> str:
        return self.good[: self.good.index("-----END CERTIFICATE-----\n") + 26]

    @property
    def issuer(self) -> str:
        return self.good[len(self.leaf) :]


KEY = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n"
CRL = "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n"
BROKEN = "-----BEGIN CERTIFICATE-----\n*not base64*\n-----END CERTIFICATE-----\n"
GARBAGE = "-----BEGIN CERTIFICATE-----\nZ2FyYmFnZQ==\n-----END CERTIFICATE-----\n"
STRANGER = ec.generate_private_key(ec.SECP256R1()).public_key()

UNREADABLE: dict[str, Callable[[Hostile], str]] = {
    "A26 PEM that is none": lambda _: BROKEN,
    "A26 DER that is none": lambda _: GARBAGE,
    "A26 garbage after the leaf": lambda h: h.leaf + GARBAGE,
    "A26 cut off": lambda h: h.good[:-40],
    "A26 nothing": lambda _: "",
    "A26 a page": lambda _: "<html>Please log in</html>",
    "A26 not ASCII": lambda h: h.good + "\u2028",
    "A26 text in between": lambda h: h.leaf + "hello\n" + h.issuer,
    "A26 a key whose marks are damaged": lambda h: h.good + KEY.replace("-----", "--- --"),
    "A26 a key for a certificate": lambda _: KEY.replace("PRIVATE KEY", "CERTIFICATE"),
}
HOSTILE: dict[str, Callable[[Hostile], str]] = {
    "A26 twenty-one certificates": lambda h: h.leaf * 21,
    "A27 a key before": lambda h: KEY + h.good,
    "A27 a key after": lambda h: h.good + KEY,
    "A27 a list of revoked ones": lambda h: h.good + CRL,
    "A28 another key": lambda h: h.forge.leaf(NAME, public_key=STRANGER) + h.issuer,
    "A29 one name more": lambda h: h.forge.leaf(NAME, "evil.test") + h.issuer,
    "A29 other names": lambda h: h.forge.leaf("evil.test") + h.issuer,
    "A29 a wildcard": lambda h: h.forge.leaf("*.test") + h.issuer,
    "A29 an address as well": lambda h: (
        h.forge.leaf(NAME, more=(x509.IPAddress(ip_address("127.0.0.1")),)) + h.issuer
    ),
    "A30 has ended": lambda h: h.forge.leaf(NAME, starts=-2 * DAY, ends=-DAY) + h.issuer,
    "A31 an issuer that is not": lambda h: h.leaf + to_pem(make_hierarchy(START)[1].certificate),
    "A31 the leaf alone": lambda h: h.leaf,
    "A31 without the intermediate": lambda h: h.leaf + h.root,
    "A31 a stranger as well": lambda h: h.good + to_pem(make_hierarchy(START)[0].certificate),
    "a leaf that is a CA": lambda h: h.forge.leaf(NAME, ca=True) + h.issuer,
    "signed by somebody else": lambda h: h.forge.leaf(NAME, issuer=make_hierarchy(START)[1]) + h.issuer,
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_chain_that_must_not_be_stored(life: Life, what: str) -> None:
    """Downloaded once more, in case it was damaged on the way; then the CA means it: told, and nothing is kept."""
    before = serving(life.world, due=True)
    session = sent_instead(life, what, times=2)
    assert (session.issuance.state, session.issuance.chain_pem) == (State.FINALIZING, None)
    life.run(MINUTE)

    row, lineage = life.world.last_issuance(NAME), life.world.lineage(NAME)
    assert len(life.wire.to("/certificate/*")) == 2
    assert lineage.error == row.error
    assert (row.state, row.error and (row.error["class"], row.error["type"])) == (
        State.FAILED, (P, "certworker:chain"),
    )  # fmt: skip
    assert (row.chain_pem, row.serial, row.fingerprint) == (None, None, None)
    assert certificate(life.world) == before
    assert policy_statuses(life.world) == ["active"]
    kept = [row[0] for row in life.world.rows("SELECT chain_pem FROM issuances WHERE chain_pem IS NOT NULL")]
    assert kept == [before.cert_pem]
    life.run(DAY + HOUR)
    assert certificate(life.world).fingerprint != before.fingerprint


@pytest.mark.parametrize("what", ["A26 cut off", "A27 a key after", "A28 another key", "A31 the leaf alone"])
def test_a_chain_that_was_damaged_on_the_way(life: Life, what: str) -> None:
    """The second download is as it should be: one certificate, and it serves."""
    serving(life.world, due=True)
    session = sent_instead(life, what, times=1)
    life.run(MINUTE)

    assert life.world.last_issuance(NAME).state == State.DONE
    assert certificate(life.world).serial == f"{life.world.ca.issued[-1].serial:x}"
    assert life.world.last_issuance(NAME).id == session.issuance.id
    assert len(life.world.ca.issued) == 2


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_chain_that_nobody_can_read(life: Life, what: str) -> None:
    """A26: the order is kept and its certificate asked for until it comes; what came is told, but for any key."""
    before = serving(life.world, due=True)
    session = sent_instead(life, what, times=6)
    error = session.issuance.error or {}
    assert (error["class"], error["type"]) == (T, "certworker:ca-answer")
    assert re.search(r"[0-9]+ bytes, SHA-256 [0-9a-f]{64}, ", error["detail"])
    assert "https://ca.test/certificate/" in error["detail"]
    assert KEY.splitlines()[1][:20] not in str(life.world.rows("SELECT error, chain_pem FROM issuances"))
    assert certificate(life.world) == before
    life.run(HOUR)

    assert life.world.last_issuance(NAME).id == session.issuance.id
    assert certificate(life.world).serial == f"{life.world.ca.issued[-1].serial:x}"
    assert len(life.world.ca.issued) == 2
    assert len(life.wire.to("/certificate/*")) == 7


def test_a_chain_that_nobody_can_ever_read(life: Life) -> None:
    """A26: once the order has expired its certificate is given up, and another one is ordered."""
    serving(life.world, due=True)
    session = sent_instead(life, "A26 DER that is none", times=10**6)
    life.run(9 * DAY)

    ended = life.world.db.read(lambda tx: issuances.find(tx, session.issuance.id))
    assert ended is not None
    assert (ended.state, (ended.error or {})["type"]) == (State.FAILED, "certworker:chain")
    assert ended.closed_at is not None
    assert 7 * DAY <= ended.closed_at - session.issuance.created_at <= 7 * DAY + 3 * HOUR
    assert len(life.world.ca.issued) == 3


UNUSUAL: dict[str, Callable[[Hostile], str]] = {
    "A31 in another order": lambda h: h.leaf + h.root + h.issuer,
    "A31 the leaf last": lambda h: h.issuer + h.leaf,
    "A31 with its root": lambda h: h.good + h.root,
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_a_chain_in_another_order(life: Life, what: str) -> None:
    """A31: put in order and used, at once."""
    serving(life.world, due=True)
    session = sent_instead(life, what, times=1)

    assert session.issuance.state == State.DONE
    good = life.world.ca.issued[-1].chain_pem
    assert certificate(life.world).cert_pem in (good, good + to_pem(life.world.ca.root.certificate))


def test_a_private_ca_may_send_the_leaf_alone(life: Life) -> None:
    """A31: whoever trusts its root has that, and it may be what has signed."""
    life.world.registration = replace(life.world.registration, private_ca=True)
    life.restart()
    serving(life.world, due=True)
    session = sent_instead(life, "A31 the leaf alone", times=1)

    assert session.issuance.state == State.DONE
    assert certificate(life.world).serial == f"{life.world.ca.issued[-1].serial:x}"


def test_a_certificate_that_starts_tomorrow(life: Life) -> None:
    """A30: kept, and told; the old one serves until all clocks have the new one valid, and none is wasted."""
    before = serving(life.world, due=True)
    life.world.ca.now = lambda: life.clock() + DAY
    issued_at = life.clock()
    life.turn()
    waiting = life.world.last_issuance(NAME)
    assert (waiting.state, waiting.lease_owner, waiting.failures) == (State.DOWNLOADED, None, 0)
    assert (life.world.lineage(NAME).error or {})["type"] == "certworker:not-yet-valid"
    life.restart()
    life.run(DAY + 4 * MINUTE)
    assert certificate(life.world) == before
    life.run(2 * MINUTE)

    leaf = life.world.ca.issued[-1].certificate
    assert leaf.not_valid_before_utc - issued_at >= DAY - SECOND
    assert certificate(life.world).serial == f"{leaf.serial_number:x}"
    assert (life.world.lineage(NAME).status, life.world.lineage(NAME).error) == ("active", None)
    assert len(life.world.ca.issued) == 2


def test_a_first_certificate_that_starts_tomorrow(life: Life) -> None:
    """A30: nothing else serves, and if it is our clock that is wrong it is valid by now: it serves at once."""
    life.world.ca.now = lambda: life.clock() + DAY
    life.reach(State.DONE, NAME)

    assert life.world.lineage(NAME).status == "active"
    assert len(life.world.ca.issued) == 1


def sent_instead(life: Life, what: str, times: int) -> Session:
    """Take the renewal to the download, and let the CA answer that with something else."""
    (session,) = life.world.claim()
    life.move(session, State.FINALIZING)
    while session.order is None or session.order.status is not OrderStatus.VALID:
        advance(life.bench, session)
        life.wait(session.wait_until or life.clock())
    ca = life.world.ca
    forge = Forge(ca.intermediate, ca.issued[-1].certificate.public_key(), life.clock())
    hostile = Hostile(forge, ca.issued[-1].chain_pem, to_pem(ca.root.certificate))
    headers = {"content-type": "application/pem-certificate-chain"}
    body = ({**HOSTILE, **UNREADABLE, **UNUSUAL}[what])(hostile).encode()
    fail(life.world, "certificate", status=200, body=body, headers=headers, times=times)
    return life.move(session)


@pytest.mark.parametrize("lifetime", [30 * SECOND, 10 * MINUTE, HOUR, 6 * DAY, 3650 * DAY])
def test_a_lifetime_that_nobody_asked_for(life: Life, lifetime: timedelta, caplog: pytest.LogCaptureFixture) -> None:
    """A30: it serves, and its renewal is planned by what it says, never at once again and again; it is told once."""
    life.world.ca.lifetime = lifetime
    life.reach(State.DONE, NAME)
    lineage = life.world.lineage(NAME)

    assert lineage.status == "active"
    assert lineage.renew_at is not None
    assert START + lifetime * 0.3 <= lineage.renew_at < START + lifetime
    life.run(MINUTE)
    assert len(life.world.ca.issued) <= 1 + MINUTE / (lifetime * 0.3)
    told_of = [record.message for record in caplog.records]
    assert told_of.count("certificate.odd_life") == (1 if lifetime <= HOUR else 0)


def test_a_lifetime_that_changes(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    """A30: ninety days become six: the renewal is planned by the six, and whoever watches the log knows."""
    serving(life.world, due=True)
    life.world.ca.lifetime = 6 * DAY
    life.turn()

    lineage = life.world.lineage(NAME)
    assert lineage.renew_at is not None
    assert lineage.renew_at - life.clock() < 6 * DAY
    (record,) = [record for record in caplog.records if record.message == "certificate.odd_life"]
    assert (record.levelname, record.names) == ("WARNING", [NAME])  # type: ignore[attr-defined]


# -- limits, and what a person has to do ---------------------------------------------------------------


def test_a_limit_is_one_certificates(life: Life) -> None:
    """A34: it waits as long as the CA says and the tenth more at most; the others go on."""
    fail(life.world, "newOrder", status=429, problem="rateLimited", headers={"retry-after": "3600"})
    life.world.add_policy(NAME, "b.test", "c.test")
    life.world.take_over()
    life.run(MINUTE)
    done = [name for name in (NAME, "b.test", "c.test") if life.world.lineage(name).status == "active"]
    life.run(2 * HOUR)

    assert len(done) == 2
    orders = life.wire.times("/new-order")
    assert len(orders) == 4
    assert HOUR <= orders[-1] - orders[0] <= 1.1 * HOUR + MINUTE
    assert len(life.world.ca.issued) == 3


@pytest.mark.parametrize(("wait", "held"), [("1200", 20 * MINUTE), ("10800", HOUR), (None, HOUR)])
def test_three_limits_are_one_of_the_account(life: Life, wait: str | None, held: timedelta) -> None:
    """A34: on different names within five minutes; nobody asks for anything then, for an hour at most."""
    for one in ("60", "60", wait):
        headers = {"retry-after": one} if one else {}
        fail(life.world, "newOrder", status=429, problem="rateLimited", headers=headers)
    names = [f"{count}.test" for count in range(8)]
    life.world.add_policy(*names)
    life.world.take_over()
    life.run(4 * HOUR)

    limited = life.wire.times("/new-order")[2]
    assert len(life.wire.to("/new-order")) == 3 + 8
    asked = [sent.at for sent in life.wire.sent if sent.at > limited]
    assert held <= min(asked) - limited <= 1.1 * held
    assert len(life.world.ca.issued) == 8
    assert told(life) is None


def test_a_pause_is_shown_with_its_link(life: Life) -> None:
    """A35: a limit without Retry-After, with a link: a person has to open it; the other names go on meanwhile."""
    link = "https://portal.example/unpause?jwt=abc"
    problem = {"type": f"{URN}rateLimited", "status": 429, "detail": f"paused; visit {link} to unpause."}
    fail(life.world, "newOrder", status=429, problem=problem)
    life.world.add_policy(NAME)
    life.world.take_over()
    life.turn()
    error = life.world.lineage(NAME).error or {}
    life.reach(State.DONE, "b.test")

    assert (error["class"], error["scope"]) == (X, ONE)
    assert link in error["hint"]
    assert life.world.lineage(NAME).next_check_at == START + DAY
    assert life.world.lineage("b.test").status == "active"
    assert told(life) is None


def test_a_limit_on_accounts(life: Life) -> None:
    """A36: everybody waits, and there is never a second key."""
    fail(life.world, "newAccount", status=429, problem="rateLimited", headers={"retry-after": "600"})
    life.world.add_policy(NAME, "b.test", "c.test")
    life.world.take_over()
    life.run(5 * MINUTE)
    assert len(life.wire.to("/new-account")) == 1
    shown = told(life) or {}
    assert (shown["state"], shown["error"]["class"]) == ("held", R)
    life.restart()
    life.run(HOUR)

    first, second = life.wire.to("/new-account")
    assert 10 * MINUTE <= second.at - first.at <= 11 * MINUTE + SECOND
    assert key_of(first) == key_of(second)
    assert (len(life.world.ca.accounts), life.world.count("acme_accounts")) == (1, 1)
    assert len(life.world.ca.issued) == 3


def key_of(sent: Sent) -> object:
    return fake_jws.parse(sent.body or b"").header["jwk"]


@pytest.mark.parametrize("acts", [True, False], ids=["a person acts", "nobody acts"])
def test_terms_that_have_changed(life: Life, caplog: pytest.LogCaptureFixture, acts: bool) -> None:
    """A37: one incident with the CA's address in it, whatever waits; nothing is sent until a person acts, or a day."""
    life.reach(State.DONE, "before.test")
    problem = {"type": f"{URN}userActionRequired", "detail": "new terms", "instance": "https://ca.example/agree"}
    fail(life.world, "newOrder", status=403, problem=problem, times=1 if acts else 99)
    names = [f"{count}.test" for count in range(5)]
    life.world.add_policy(*names)
    life.world.take_over()
    life.run(HOUR)
    paused_at, asked = life.clock(), len(life.wire.sent)
    shown = told(life) or {}

    assert shown["state"] == "paused"
    assert "https://ca.example/agree" in shown["error"]["hint"]
    assert len(life.wire.to("/new-order")) == 2
    assert [record.message for record in caplog.records].count("ca.unavailable") == 1
    assert life.world.lineage("before.test").status == "active"
    if acts:
        life.restart()
        life.run(20 * HOUR)
        assert len(life.wire.sent) == asked
        life.bench.gate.resume()
        life.run(10 * MINUTE)
        assert len(life.world.ca.issued) == 6
        assert told(life) is None
    else:
        life.run(3 * DAY)
        later = [sent.at for sent in life.wire.sent if sent.at > paused_at]
        assert 2 <= len(life.wire.to("/new-order")) - 2 <= 3
        assert min(later) - START >= DAY


def test_a_profile_that_is_offered_no_more(life: Life) -> None:
    """A44: told with what is offered, nothing is ordered and no other one is taken; what serves, serves on."""
    ca = life.world.ca
    ca.profiles = {"short": 90 * DAY}
    life.world.wanted = replace(life.world.wanted, issuer=replace(life.world.wanted.issuer, profile="short"))
    before = serving(life.world, due=True)
    ca.profiles = {"long": 90 * DAY}
    life.turn()

    error = life.world.lineage(NAME).error or {}
    assert (error["class"], error["type"]) == (P, "certworker:profile")
    assert "long" in error["detail"]
    assert life.wire.to("/new-order") == []
    assert certificate(life.world) == before


def test_one_refused_name_of_five(life: Life) -> None:
    """A49: rejectedIdentifier names it; the other four have their certificate at once, with a second order."""
    names = [f"{count}.example.com" for count in range(5)]
    life.world.ca.refused_names = frozenset([names[2]])
    life.reach(State.DONE, *names)
    orders = [sent.payload["identifiers"] for sent in life.wire.to("/new-order")]
    life.run(23 * HOUR)

    left = {name for name in names if name != names[2]}
    assert [len(identifiers) for identifiers in orders] == [5, 4]
    assert [issued.dns_names for issued in life.world.ca.issued] == [left]
    error = life.world.lineage(names[0]).error or {}
    assert (error["class"], error["type"]) == (P, f"{URN}rejectedIdentifier")
    assert names[2] in error["hint"]
    assert len(life.wire.to("/new-order")) == 2


def test_one_refused_name_beside_four(life: Life) -> None:
    """A49: each with a certificate of its own: one order that is refused, and not another one before a day."""
    names = [f"{count}.test" for count in range(5)]
    life.world.ca.refused_names = frozenset([names[2]])
    life.world.add_policy(*names)
    life.world.take_over()
    life.run(23 * HOUR)

    assert len(life.wire.to("/new-order")) == 5
    assert len(life.world.ca.issued) == 4
    assert policy_statuses(life.world) == ["error"]


# -- orders and authorizations that are shared ---------------------------------------------------------


def test_the_same_names_twice(life: Life) -> None:
    """A58: another key type for names that are being ordered: ordered after, so that no CA gives both one order."""
    first = life.reach(State.VALIDATING, NAME)
    want_as_well(life.world, "rsa-2048")
    (second,) = life.world.claim()
    life.move(second)
    assert (second.issuance.state, second.issuance.failures) == (State.QUEUED, 0)
    assert (second.issuance.error or {})["type"] == "certworker:same-names"
    life.run(MINUTE)
    assert len(life.wire.to("/new-order")) == 1

    life.move(first)
    life.run(MINUTE)
    assert first.issuance.state == State.DONE
    assert [sent.path for sent in life.wire.to("/finalize/*")] == [
        urlsplit(order.url).path.replace("order", "finalize") for order in life.world.ca.orders.values()
    ]
    assert {issued.certificate.public_key().key_size for issued in life.world.ca.issued} == {256, 2048}  # type: ignore[union-attr]


def test_the_same_names_after_one_that_failed(life: Life) -> None:
    """A58: the second gets its turn however the first ends."""
    first = life.reach(State.VALIDATING, NAME)
    want_as_well(life.world, "rsa-2048")
    kill(life.world, "dns")
    first.look_anew()
    life.move(first)
    life.turn()

    assert first.issuance.state == State.FAILED
    assert len(life.world.ca.issued) == 1


def want_as_well(world: World, key_type: str) -> None:
    """Want a certificate of another key type too: the settings have changed, and the old one is wanted still."""
    linked = world.rows("SELECT policy_id, lineage_id, lineage_status FROM policy_lineages")
    world.wanted = replace(world.wanted, issuer=replace(world.wanted.issuer, key_type=key_type))
    world.execute("UPDATE tls_policies SET updated_at = updated_at, mode = mode")  # looked at again
    reconcile(world.db, world.clock, world.wanted, world.sealer)
    for policy_id, lineage_id, status in linked:
        world.execute(
            "INSERT INTO policy_lineages (policy_id, lineage_id, lineage_status) VALUES (:policy, :lineage, :status)",
            policy=policy_id, lineage=lineage_id, status=status,
        )  # fmt: skip
    scan(world.db, world.clock)


@pytest.mark.parametrize("first_ends", [State.DONE, State.FAILED])
@pytest.mark.parametrize("looks", [True, False], ids=["read again", "not read again"])
def test_an_authorization_of_two_orders(life: Life, first_ends: State, looks: bool) -> None:
    """A59: the token is answered for as long as one of them needs it; a CA that was told to look is not told again.

    Unless it was told after the other has read the authorization: then it says so, that is read once more, and the
    order goes on at once.
    """
    ca = life.world.ca
    ca.validate_on = "look"
    both = life.reach(State.ORDERED, "shared.example.com", "other.example.com")
    one = life.reach(State.ORDERED, "shared.example.com")
    first, second = ca.orders.values()
    shared = next(a for a in first.authorizations if a.dns_name == "shared.example.com")
    second.authorizations = [shared]
    for session in (both, one):
        session.look_anew()
        life.move(session, State.VALIDATING)
    assert life.world.rows("SELECT count(*) FROM challenges WHERE token = :token", token=shared.token) == [(2,)]

    if first_ends is State.FAILED:
        first.status = "invalid"
        both.look_anew()
    life.move(both)
    if looks:
        one.look_anew()
    before = life.clock()
    life.move(one)

    assert (both.issuance.state, one.issuance.state) == (first_ends, State.DONE)
    assert life.clock() - before < 2 * SECOND
    assert shared.status == "valid"
    told_to_look = [sent for sent in life.wire.to("/challenge/*") if sent.path.endswith(shared.url.rpartition("/")[2])]
    assert len(told_to_look) == (1 if looks or first_ends is State.FAILED else 2)
    assert life.world.count("challenges") == 0 or first_ends is State.FAILED


# -- all of the CA -------------------------------------------------------------------------------------


def test_ten_minutes_of_errors(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    """A07: one incident, the directory read at 30 s, 1 min, 2 min and then each five; what waits does not count it."""
    caplog.set_level("INFO")
    fail(life.world, "directory", status=500, problem="serverInternal", times=7)
    names = [f"{count}.test" for count in range(20)]
    life.world.add_policy(*names)
    life.world.take_over()
    life.run(10 * MINUTE)
    opened_after = [at - START for at in life.wire.times("/directory")][:3]
    probes = life.wire.times("/directory")[3:]
    failures = life.world.rows("SELECT sum(failures) FROM issuances")
    life.run(10 * MINUTE)

    assert max(opened_after) < 10 * SECOND
    waits = [later - sooner for sooner, later in pairwise([START + opened_after[-1], *probes])]
    assert [round(wait / SECOND) for wait in waits] == pytest.approx([30, 60, 120, 300], rel=0.1, abs=2)
    assert failures == [(3,)]
    told_of = [record.message for record in caplog.records if record.message.startswith("ca.")]
    assert told_of == ["ca.unavailable", "ca.available"]
    assert len(life.world.ca.issued) == 20


def test_a_directory_that_changes_while_orders_are_open(life: Life) -> None:
    """A25: an order goes on at its own addresses; what comes next asks where the directory says by now."""
    session = life.reach(State.VALIDATING, NAME)
    life.wire.change("/directory", lambda directory: directory.update(newOrder="https://ca.test/gone"))
    life.bench.client.refresh_directory()
    life.move(session)
    assert session.issuance.state == State.DONE

    life.wire.changes.clear()
    life.reach(State.DONE, "b.test")
    assert len(life.wire.to("/gone")) == 1
    assert len(life.world.ca.issued) == 2
