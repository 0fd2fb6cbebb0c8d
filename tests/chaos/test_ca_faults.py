"""Rows A05 to A57 of the fault matrix against a real Pebble: the faults that are in the bytes, not in the words.

What each error means is a table in `tests.steps.test_ca_matrix`; here a real transport meets real connections.
"""

import json
import socket
import ssl
import threading
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from certworker.ca.transport import Transport
from certworker.cli.pebble import HOST, Pebble, free_ports
from certworker.core.issuance import State
from certworker.steps.refresh_ari import refresh_ari
from certworker.store.database import Database
from tests.steps.life import DAY, HOUR, MINUTE, SECOND, certificate, told

from .lab import Lab, lab_at
from .proxy import (
    Answer,
    Fault,
    FaultProxy,
    Turn,
    close_after,
    misstate_length,
    redirect,
    rewrite,
    say,
    say_problem,
    stall,
    trickle,
    truncate,
    withhold,
)

pytestmark = pytest.mark.pebble

NAME = "a.chaos.test"
ROUTES = [
    "directory", "newNonce", "newAccount", "newOrder", "order", "authorization", "challenge", "finalize", "certificate",
]  # fmt: skip


@pytest.fixture
def lab(sqlite_db: Database, ca: Pebble, proxy: FaultProxy) -> Iterator[Lab]:
    with lab_at(sqlite_db, ca, proxy) as lab:
        yield lab


@pytest.fixture
def hurried(sqlite_db: Database, ca: Pebble, proxy: FaultProxy) -> Iterator[Lab]:
    """A lab whose transport gives a request half a second."""
    with lab_at(sqlite_db, ca, proxy, timedelta(seconds=0.5)) as lab:
        yield lab


def assert_issued_once(lab: Lab, orders: int = 1) -> None:
    """One certificate for NAME, made in one issuance, serves."""
    assert lab.is_active(NAME), lab.error(NAME)
    assert len(lab.ledger()) == 1
    assert certificate(lab.world, NAME).serial == f"{int(lab.ledger()[0].serial, 16):x}"
    assert lab.world.count("issuances") == 1
    assert len(lab.proxy.seen("newOrder", 201)) == orders
    assert len(lab.proxy.seen("newAccount", 201)) == 1


# -- nonces, and errors once ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "not base64url!", "A" * 5000, "used"])
def test_a_nonce_that_is_none(lab: Lab, value: str | None) -> None:
    """A05: missing, malformed, or one that was used: another one is asked for, and nothing has failed."""
    first: list[str] = []

    def spoil(answer: Answer) -> Answer:
        first.append(answer.headers["replay-nonce"])
        bare = answer.without("replay-nonce")
        return bare if value is None else bare.with_headers(replay_nonce=first[0] if value == "used" else value)

    for route in ("newAccount", "newOrder", "challenge", "finalize", "authorization"):
        lab.proxy.on(route, rewrite(spoil))
    lab.issue(NAME)

    assert_issued_once(lab)
    posts = [exchange for exchange in lab.proxy.exchanges if exchange.method == "POST"]
    sent = [exchange.protected["nonce"] for exchange in posts]
    assert value not in sent
    assert len(set(sent)) == len(sent) - (max(sent.count(first[0]) - 1, 0) if value == "used" else 0)
    assert [failed for failed in posts if failed.answer is not None and failed.answer.status >= 400] == (
        [] if value != "used" else [failed for failed in posts if failed.protected["nonce"] == first[0]][1:]
    )


@pytest.mark.parametrize("route", ROUTES)
def test_an_error_once(lab: Lab, route: str) -> None:
    """A06: asked again five seconds later, and the same order goes on."""
    lab.proxy.on(route, say_problem(500, "serverInternal", "out of order"))
    lab.issue(NAME)

    assert_issued_once(lab)
    first, second, *_ = [sent.at for sent in lab.wire.sent if sent.path == lab.seen(route)[0].path]
    assert second - first >= 4 * SECOND
    assert len(lab.seen(route)) <= (2 if route not in ("order", "newNonce") else 8)


@pytest.mark.parametrize("wish", ["120", "date", "-5", "soon", None])
def test_a_busy_ca(lab: Lab, wish: str | None) -> None:
    """A08: nothing at all is sent before it wants to be asked again; what cannot be read is as good as absent."""
    headers = {}
    if wish is not None:
        moment = lab.clock() + timedelta(seconds=120)
        headers = {"retry_after": f"{moment:%a, %d %b %Y %H:%M:%S} GMT" if wish == "date" else wish}
    lab.proxy.on("newOrder", say_problem(503, "serverInternal", "busy", **headers))
    lab.issue(NAME, 3 * MINUTE)

    assert_issued_once(lab)
    paths = [sent.path for sent in lab.wire.sent]
    busy = paths.index(lab.seen("newOrder")[0].path)
    waited = lab.wire.sent[busy + 1].at - lab.wire.sent[busy].at
    if wish in ("120", "date"):
        assert 119 * SECOND <= waited <= 133 * SECOND
    else:
        assert 4 * SECOND <= waited <= 6 * SECOND


def test_an_outage(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A07, A33: one incident, the directory read as the schedule says; then all go on, one certificate each."""
    caplog.set_level("INFO")
    lab.issue("before.chaos.test")
    down = lab.proxy.on(None, say(500, b"down"), times=None)
    names = [f"{count}.chaos.test" for count in range(8)]
    lab.want(*names)
    down_at = lab.clock()
    lab.run(30 * MINUTE)
    asked = [sent.at for sent in lab.wire.sent if sent.at >= down_at]
    shown, failures = told(lab) or {}, lab.world.rows("SELECT max(failures) FROM issuances")
    lab.proxy.clear()
    lab.run(15 * MINUTE)

    assert shown["state"] == "open"
    assert down.met == len(asked)
    assert len(asked) <= 5 + 3 + 30 / 5
    late = [at for at in asked if at > down_at + 10 * MINUTE]
    assert all(later - sooner >= 5 * MINUTE for sooner, later in pairwise(late))
    assert failures == [(1,)]
    assert all(lab.is_active(name) for name in names)
    assert len(lab.ledger()) == 9
    assert [record.message for record in caplog.records if record.message.startswith("ca.")] == [
        "ca.unavailable", "ca.available",
    ]  # fmt: skip
    assert told(lab) is None


def test_a_limit(lab: Lab) -> None:
    """A34: the limited one waits as long as it is told; the other one is issued meanwhile."""
    lab.proxy.on("newOrder", say_problem(429, "rateLimited", "slow down", retry_after="900"))
    lab.want("a.chaos.test", "b.chaos.test")
    lab.run(5 * MINUTE)
    assert sorted([lab.is_active("a.chaos.test"), lab.is_active("b.chaos.test")]) == [False, True]
    lab.run(20 * MINUTE)

    first, _, third = [sent.at for sent in lab.wire.to(lab.seen("newOrder")[0].path)]
    assert 15 * MINUTE <= third - first <= 1.1 * 15 * MINUTE + MINUTE
    assert len(lab.ledger()) == 2


# -- bytes ---------------------------------------------------------------------------------------------

DAMAGED: dict[str, Fault] = {
    "cut off": truncate,
    "closed early": close_after,
    "length too much": misstate_length(20),
    "length too little": misstate_length(-20),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_certificate(lab: Lab, what: str) -> None:
    """A15: not stored, and downloaded again as often as it takes; it costs no second certificate."""
    lab.proxy.on("certificate", DAMAGED[what], times=4)
    lab.want(NAME)
    lab.turn()
    row = lab.world.last_issuance(NAME)
    assert (row.state, row.chain_pem) == (State.FINALIZING, None)
    lab.run(HOUR)

    assert_issued_once(lab)


@pytest.mark.parametrize("fault", [trickle(0.05), stall], ids=["byte by byte", "no byte"])
@pytest.mark.parametrize("route", ["newOrder", "finalize", "certificate"])
def test_a_ca_that_takes_its_time(hurried: Lab, route: str, fault: Fault) -> None:
    """A16: a request has one time limit for all of it; no thread and no connection is left behind."""
    hurried.issue("warm.chaos.test")
    threads = threading.active_count()
    hurried.proxy.on(route, fault)
    hurried.want(NAME)
    hurried.turn()
    error = hurried.world.last_issuance(NAME).error or {}
    hurried.run(MINUTE)

    assert (error["class"], error["type"]) == ("transient", "certworker:ca-timeout")
    assert "0.5 s" in error["detail"]
    assert hurried.is_active(NAME)
    assert threading.active_count() <= threads + 1  # the proxy's, of the new connection
    assert len(hurried.ledger()) == 2


@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_is_withheld(hurried: Lab, route: str) -> None:
    """The CA has done what it was asked, and says nothing until we give up: it is found, and not done again."""
    hurried.proxy.on(route, withhold)
    hurried.issue(NAME)

    assert_issued_once(hurried, orders=2 if route == "newOrder" else 1)
    assert len(hurried.proxy.seen("finalize", 200)) == 1


FLOOD, CHUNK = 64 * 1024 * 1024, 65536
flooded: list[int] = []
"""What of it went into a socket."""


def flood(turn: Turn) -> None:
    """Promise 64 MB, and send them until nobody listens."""
    turn.send_bytes(f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {FLOOD}\r\n\r\n".encode())
    for _ in range(FLOOD // CHUNK):
        turn.send_bytes(b"[" * CHUNK)
        flooded.append(CHUNK)


NONSENSE: dict[str, Fault] = {
    "64 MB": flood,
    "a captive portal": say(200, b"<html>Log in</html>", content_type="text/html"),
    "another type": say(200, b"{}", content_type="text/plain"),
    "nothing": say(200, content_type="application/json"),
    "null": say(200, b"null", content_type="application/json"),
    "deep": say(200, b'{"a":' * 50_000, content_type="application/json"),
    "not HTTP": lambda turn: turn.send_bytes(b"\x15\x03\x01 go away\r\n\r\n") or turn.close(),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense(hurried: Lab, what: str) -> None:
    """A24: transient, with the address in the message; never more than 1 MiB of it is read."""
    for route in ("directory", "newAccount", "newOrder", "order", "certificate"):
        hurried.proxy.on(route, NONSENSE[what])
    hurried.want(NAME)
    said = []
    for _ in range(9):
        hurried.turn()
        error = hurried.error(NAME)
        said += [error] if error else []
        hurried.clock.move(MINUTE)

    assert hurried.is_active(NAME)
    assert {error["class"] for error in said} == {"transient"}
    assert all(hurried.proxy.directory_url.rpartition("/")[0] in error["detail"] for error in said)
    assert len(said) >= 5
    assert len(hurried.ledger()) == 1
    # With what the sockets on the way hold: far from all of it.
    assert sum(flooded) < 5 * FLOOD / 8


# -- addresses -----------------------------------------------------------------------------------------


def test_an_address_that_has_moved(lab: Lab) -> None:
    """A25: newOrder is gone where the directory had it an hour ago: it is read again, and nothing has failed."""
    moved = lab.proxy.directory_url.replace("/dir", "/moved")
    lab.proxy.on("directory", rewrite(lambda answer: changed(answer, newOrder=moved)))
    lab.issue(NAME)

    assert_issued_once(lab)
    assert len(lab.wire.to("/moved")) == 1
    assert len(lab.seen("directory")) == 2


def test_a_directory_that_lost_something(lab: Lab) -> None:
    """A25: told which member is missing; read again when it is time."""
    lab.proxy.on("directory", rewrite(lambda answer: changed(answer, newOrder=None)))
    lab.want(NAME)
    lab.turn()
    error = lab.error(NAME)
    assert (error["class"], error["type"], error["scope"]) == ("transient", "certworker:ca-answer", "ca")
    assert "newOrder" in error["detail"]
    lab.run(MINUTE)

    assert_issued_once(lab)


def changed(answer: Answer, **members: Any) -> Answer:
    """Return an answer with other members in its JSON; None takes one out."""
    document = {name: value for name, value in {**answer.json, **members}.items() if value is not None}
    return Answer(answer.status, answer.headers, json.dumps(document).encode())


@contextmanager
def listening() -> Iterator[tuple[int, list[object]]]:
    """Count who connects to a port that nobody has any business at."""
    (port,) = free_ports(1)
    came: list[object] = []
    with socket.create_server((HOST, port)) as listener:
        listener.settimeout(0.05)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, address = listener.accept()
                except TimeoutError:
                    continue
                came.append(address)
                connection.close()

        thread = threading.Thread(target=accept, name="nobody")
        thread.start()
        try:
            yield port, came
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("route", ["newOrder", "newNonce", "directory", "finalize"])
def test_a_redirect_elsewhere(lab: Lab, route: str, status: int) -> None:
    """A56: nobody is sent anywhere: not a POST, and not a GET to another host."""
    with listening() as (port, came):
        lab.proxy.on(route, redirect(f"https://{HOST}:{port}/elsewhere", status))
        lab.want(NAME)
        lab.turn()
        error = lab.error(NAME)
        lab.run(MINUTE)

    assert came == []
    assert (error["class"], error["type"]) == ("transient", "certworker:ca-answer")
    assert f"{HOST}:{port}" in error["detail"]
    assert_issued_once(lab)


def test_a_directory_that_has_moved(lab: Lab) -> None:
    """A56: a GET follows to where the same server says."""
    lab.proxy.on("directory", redirect("/dir?again"))
    lab.issue(NAME)

    assert_issued_once(lab)


AWAY = [
    # member, whose answer it is in, what it says
    ("finalize", "newOrder", "http:"), ("finalize", "newOrder", "file:"), ("authorizations", "newOrder", "http:"),
    ("authorizations", "newOrder", ""), ("certificate", "order", "http:"), ("certificate", "order", "ftp:"),
    ("location", "newOrder", "http:"), ("location", "newOrder", "file:"), ("newNonce", "directory", "http:"),
    ("newOrder", "directory", ""), ("finalize", "newOrder", "https:"), ("authorizations", "newOrder", "https:"),
    ("certificate", "order", "https:"), ("location", "newOrder", "https:"), ("location", "newAccount", "https:"),
]  # fmt: skip


@pytest.mark.parametrize(("member", "route", "scheme"), AWAY)
def test_an_address_that_leads_away(lab: Lab, member: str, route: str, scheme: str) -> None:
    """A57: https and nothing less, and no host that the directory does not name; refused before anything is sent."""
    with listening() as (port, came):
        bad = f"{scheme}//{HOST}:{port}/x"
        lab.proxy.on(route, rewrite(lambda answer: led_to(answer, member, bad)))
        lab.want(NAME)
        lab.turn()
        error = lab.error(NAME)
        lab.run(MINUTE)

    assert came == []
    assert (error["class"], error["type"]) == ("transient", "certworker:ca-answer"), error
    assert lab.is_active(NAME)
    assert len(lab.ledger()) == 1


def led_to(answer: Answer, member: str, url: str) -> Answer:
    if member == "location":
        return answer.with_headers(location=url)
    return changed(answer, **{member: [url] if member == "authorizations" else url})


# -- what the CA says is not so ------------------------------------------------------------------------


def test_a_key_in_a_chain(lab: Lab) -> None:
    """A27: none of the file is used, and it is nowhere kept; told as what it is."""
    key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n"
    lab.proxy.on(
        "certificate",
        rewrite(lambda answer: Answer(answer.status, answer.headers, answer.body + key.encode())),
        times=2,
    )
    lab.issue(NAME)

    error = lab.error(NAME)
    assert (error["class"], error["type"]) == ("permanent", "certworker:chain")
    assert lab.world.rows("SELECT chain_pem FROM issuances") == [(None,)]
    assert lab.world.count("certificates") == 0
    assert "MC4CAQAw" not in json.dumps(error)


@pytest.mark.parametrize("times", [1, 2])
def test_the_certificate_of_another(lab: Lab, times: int) -> None:
    """A28, A29: other key, other names: once is damage, twice is refused; what others have stays theirs."""
    lab.issue("other.chaos.test")
    theirs = lab.seen("certificate")[-1].answer
    assert theirs is not None
    lab.proxy.on("certificate", rewrite(lambda _: theirs), times=times)
    lab.issue(NAME)

    assert lab.is_active(NAME) == (times == 1)
    assert certificate(lab.world, "other.chaos.test").cert_pem.encode() == theirs.body
    if times > 1:
        assert "another key" in lab.error(NAME)["detail"]
        lab.make_due()
        lab.run(MINUTE)
        assert lab.is_active(NAME)


@pytest.mark.parametrize("what", ["the other way round", "the leaf alone"])
def test_a_chain_that_is_not_as_it_should_be(lab: Lab, what: str) -> None:
    """A31: put in order; a leaf alone is damage, unless the CA is a private one."""
    lab.world.registration = replace(lab.world.registration, private_ca=False, terms_agreed=True)
    lab.restart()
    chain = (lambda leaf, issuer: issuer + leaf) if what == "the other way round" else (lambda leaf, _: leaf)
    lab.proxy.on("certificate", rewrite(lambda answer: with_chain(answer, chain)))
    lab.want(NAME)
    lab.turn()
    at_once = lab.is_active(NAME)
    lab.run(MINUTE)

    assert at_once == (what == "the other way round")
    assert_issued_once(lab)
    leaf, issuer = x509.load_pem_x509_certificates(certificate(lab.world, NAME).cert_pem.encode())
    leaf.verify_directly_issued_by(issuer)


def with_chain(answer: Answer, chain: Callable[[bytes, bytes], bytes]) -> Answer:
    end = answer.body.index(b"-----END CERTIFICATE-----\n") + 26
    return Answer(answer.status, answer.headers, chain(answer.body[:end], answer.body[end:]))


def test_a_long_chain_with_alternates(sqlite_db: Database, tmp_path: Path) -> None:
    """A31: three intermediates and two other roots: all of the default chain is stored, and no other is asked for."""
    with (
        Pebble(nonce_reject=0, authz_reuse=0, alternate_roots=2, chain_length=3) as ca,
        FaultProxy(ca, tmp_path / "proxy") as proxy,
        lab_at(sqlite_db, ca, proxy) as lab,
    ):
        lab.issue(NAME)
        (download,) = lab.seen("certificate")

        assert_issued_once(lab)
        assert download.answer is not None
        assert 'rel="alternate"' in download.answer.headers["link"]
        assert certificate(lab.world, NAME).cert_pem.count("BEGIN") == 4


def test_finalize_once_too_often(lab: Lab) -> None:
    """A41: to an order that is processing or valid by then: orderNotReady, it is read again, and it goes on."""
    lab.proxy.on("order", rewrite(lambda answer: changed(answer, status="ready")), skip=1)
    lab.issue(NAME)

    assert_issued_once(lab)
    refused = [one.answer.json["type"].rpartition(":")[2] for one in lab.proxy.seen("finalize", 403) if one.answer]
    assert refused == ["orderNotReady"]


def test_a_ca_that_was_reset(lab: Lab) -> None:
    """A38: account made again with its key, the certificate that serves stays until its renewal is there."""
    lab.issue(NAME)
    before = certificate(lab.world, NAME)
    lab.ca.restart()
    lab.make_due()
    lab.run(MINUTE)

    assert certificate(lab.world, NAME).serial != before.serial
    accounts = lab.proxy.seen("newAccount", 201)
    assert [one.protected["jwk"] for one in accounts] == [accounts[0].protected["jwk"]] * 2
    assert len(lab.ledger()) == 2
    assert lab.world.rows("SELECT count(*) FROM audit_logs WHERE action = 'account.forgotten'") == [(1,)]


def test_a_second_ca(lab: Lab, tmp_path: Path) -> None:
    """Of A55 what holds: an account and a key of its own, and no order there names what the first CA has issued.

    Going over to it is a change of settings; nothing does so by itself.

    The first is asked for nothing any more; what it has issued stays, and is used again when it is named again.
    """
    lab.issue(NAME)
    first, query = lab.seen("newAccount")[0], "SELECT id, serial, status, cert_pem, key_pem FROM certificates"
    (before,), asked = lab.world.rows(query), len(lab.proxy.exchanges)
    with (
        Pebble(nonce_reject=0, authz_reuse=0, http_port=lab.ca.http_port) as other,
        FaultProxy(other, tmp_path / "other") as proxy,
    ):
        transport, back = Transport(proxy.ca_bundle), (lab.world.ca.directory_url, lab.world.ca.http)
        lab.ask_at(proxy.directory_url, transport)
        lab.world.take_over()
        lab.run(MINUTE)
        lab.make_due()
        lab.run(MINUTE)
        transport.close()

        assert replaced(proxy) == {int(other.ledger()[0].serial, 16)}
        assert "replaces" not in proxy.seen("newOrder")[0].payload
        assert len(other.ledger()) == 2
        (account,) = proxy.seen("newAccount", 201)
        assert account.protected["jwk"] != first.protected["jwk"]
    assert len(lab.proxy.exchanges) == asked
    assert before in lab.world.rows(query)
    assert lab.world.rows("SELECT count(DISTINCT directory_url), count(*) FROM acme_accounts") == [(2, 2)]

    lab.ask_at(*back)  # type: ignore[arg-type]
    lab.world.take_over()
    lab.make_due()
    lab.run(MINUTE)
    assert replaced(lab.proxy) == {int(lab.ledger()[0].serial, 16)}
    assert len(lab.seen("newAccount")) == 1
    assert len(lab.ledger()) == 2


def replaced(proxy: FaultProxy) -> set[int]:
    """Return the serials that orders named, whether or not the CA could find them (RFC 9773 §4.1)."""
    named = [order.payload["replaces"] for order in proxy.seen("newOrder") if "replaces" in order.payload]
    return {int.from_bytes(urlsafe_b64decode(one.partition(".")[2] + "=="), "big") for one in named}


@pytest.mark.parametrize(
    ("fault", "soonest", "latest"),
    [
        (say(200, b"{}", content_type="application/json"), 6 * HOUR, 6 * HOUR),
        (say(200, b"not JSON", content_type="application/json"), 6 * HOUR, 6 * HOUR),
        (say(200, b" " * 200_000, content_type="application/json"), 6 * HOUR, 6 * HOUR),
        (say(404), 6 * HOUR, 6 * HOUR),
        (say(500), MINUTE, 2 * MINUTE),
        (rewrite(lambda answer: answer.with_headers(retry_after="1")), MINUTE, MINUTE),
        (rewrite(lambda answer: answer.with_headers(retry_after="315360000")), DAY, DAY),
        (rewrite(lambda answer: answer.without("retry-after")), 6 * HOUR, 6 * HOUR),
    ],
    ids=["empty", "no JSON", "200 kB", "404", "500", "at once", "in ten years", "whenever"],
)
def test_renewal_information(lab: Lab, fault: Fault, soonest: timedelta, latest: timedelta) -> None:
    """A52: asked again within a minute and a day, and at best the advice is lost: the renewal stays planned."""
    lab.issue(NAME)
    before = lab.world.lineage(NAME)
    lab.proxy.on("renewalInfo", fault)
    ask(lab)
    assert len(lab.seen("renewalInfo")) == 1

    lab.clock.move(soonest - SECOND)
    ask(lab)
    assert len(lab.seen("renewalInfo")) == 1
    lab.clock.move(latest - soonest + 2 * SECOND)
    ask(lab)
    assert len(lab.seen("renewalInfo")) == 2
    after = lab.world.lineage(NAME)
    assert (after.status, after.error) == ("active", None)
    assert before.renew_at is not None
    assert after.renew_at is not None


def ask(lab: Lab) -> None:
    refresh_ari(lab.world.db, lab.bench.client, lab.clock, lambda: 0.5)


# -- a directory that must not be trusted --------------------------------------------------------------


@pytest.mark.parametrize("what", ["expired", "of another name", "of somebody else"])
def test_a_directory_that_is_not_to_be_trusted(lab: Lab, tmp_path: Path, what: str) -> None:
    """A32: nothing is sent to it, there is no other way in, and the operator is told which it is."""
    with stranger(tmp_path, what) as (url, bundle, asked):
        transport = Transport(bundle)
        lab.bench.client._http = transport
        lab.bench.client.directory_url = url
        lab.want(NAME)
        for _ in range(3):
            lab.turn()
            lab.clock.move(9 * MINUTE)
        transport.close()

    error = lab.error(NAME)
    assert asked == []
    assert (error["class"], error["type"], error["scope"]) == ("transient", "certworker:ca-tls", "ca")
    word = {"expired": "expired", "of another name": "another name", "of somebody else": "ACME_CA_BUNDLE"}[what]
    assert word in error["detail"]
    assert lab.world.last_issuance(NAME).failures == 2


@contextmanager
def stranger(folder: Path, what: str) -> Iterator[tuple[str, Path, list[bytes]]]:
    """Run an https server with a certificate that must not be trusted; the list has what anybody sent to it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stranger")])
    now, ends = datetime.now(UTC), timedelta(hours=-1) if what == "expired" else DAY
    san = x509.SubjectAlternativeName([x509.DNSName("elsewhere.test" if what == "of another name" else "localhost")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - DAY, now + ends)
    mine = builder.add_extension(san, critical=False).sign(key, hashes.SHA256())
    pem, key_path, bundle = (folder / part for part in ("stranger.pem", "stranger.key", "bundle.pem"))
    pem.write_bytes(mine.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    other = x509.CertificateBuilder(name, name, key.public_key(), 2, now - DAY, now + DAY).sign(key, hashes.SHA256())
    trusted = other if what == "of somebody else" else mine
    bundle.write_bytes(trusted.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_path)
    asked: list[bytes] = []
    (port,) = free_ports(1)
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        while not over.is_set():
            try:
                plain, _ = listener.accept()
            except TimeoutError:
                continue
            plain.settimeout(1)
            try:
                with context.wrap_socket(plain, server_side=True) as tls:
                    asked.append(tls.recv(1000))
            except OSError:
                plain.close()

    with socket.create_server((HOST, port)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve, args=[listener], name="stranger")
        thread.start()
        try:
            yield f"https://localhost:{port}/dir", bundle, asked
        finally:
            over.set()
            thread.join()
