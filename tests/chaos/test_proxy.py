"""The kit itself: each fault really happens, and no other."""

import http.client
import json
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from certworker.ca.client import Client
from certworker.ca.keys import AccountKey
from certworker.ca.transport import Transport
from certworker.cli.pebble import Pebble
from tests.conftest import PostgresServer
from tests.flow.box import until

from .database import held_write
from .pgproxy import PostgresProxy, parameter
from .proxy import (
    Exchange,
    FaultProxy,
    Hold,
    close_after,
    misstate_length,
    redirect,
    reset_after,
    reset_before,
    rewrite,
    say,
    say_problem,
    stall,
    trickle,
    truncate,
)

pytestmark = pytest.mark.pebble

NONCE = "/nonce-plz"


class Browser:
    """A client that hides nothing: one connection, no second try."""

    def __init__(self, proxy: FaultProxy, timeout: float = 10) -> None:
        trust = ssl.create_default_context(cafile=str(proxy.ca_bundle))
        trust.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        self.host = urlsplit(proxy.directory_url).netloc
        self.connection = http.client.HTTPSConnection(self.host, timeout=timeout, context=trust)

    def ask(self, path: str = "/dir", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        self.connection.request(method, path, headers={"User-Agent": "chaos"})
        with self.connection.getresponse() as answer:
            return answer.status, dict(answer.getheaders()), answer.read()


@pytest.fixture
def browser(proxy: FaultProxy) -> Iterator[Browser]:
    browser = Browser(proxy)
    with closing(browser.connection):
        yield browser


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[tuple[Client, Transport]]:
    transport = Transport(proxy.ca_bundle)
    yield Client(proxy.directory_url, transport, lambda: datetime.now(UTC)), transport
    transport.close()


@contextmanager
def meanwhile(act: Callable[[], Any]) -> Iterator[list[Any]]:
    """Do something in a thread while the block lasts; what came of it is in the list afterwards."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(act())
        except (OSError, http.client.HTTPException, psycopg.Error, sqlite3.Error) as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield outcome
    thread.join(20)
    assert not thread.is_alive()


# -- the way through ----------------------------------------------------------------------------------


def test_a_client_stays_on_the_proxy(proxy: FaultProxy, ca: Pebble, client: tuple[Client, Transport]) -> None:
    """Pebble builds its URLs of the Host it is asked with; every request is told by route and by what it says."""
    acme, transport = client
    account = acme.new_account(AccountKey.generate(), ["mailto:ops@chaos.test"], terms_agreed=True, eab=None)
    order = acme.new_order(account, ["stays.chaos.test"])
    acme.fetch_order(account, order.url)
    acme.fetch_authorization(account, order.authorization_urls[0])

    ours = proxy.directory_url.removesuffix("dir")
    assert all(url.startswith(ours) for url in (account.url, order.url, order.finalize_url))
    routes = ["directory", "newNonce", "newAccount", "newOrder", "order", "authorization"]
    assert [exchange.route for exchange in proxy.exchanges] == routes
    assert proxy.exchanges[3].payload == {"identifiers": [{"type": "dns", "value": "stays.chaos.test"}]}
    assert proxy.exchanges[3].protected["kid"] == account.url
    assert proxy.exchanges[4].payload is None
    assert proxy.posts() == 4
    assert len(proxy.seen("newOrder", status=201)) == 1
    assert transport.connections_opened == 1


def test_other_routes_have_names_too(proxy: FaultProxy, browser: Browser) -> None:
    """By what the directory says: renewal information is a path below."""
    document = json.loads(browser.ask()[2])
    browser.ask(urlsplit(document["renewalInfo"]).path + "/abc.def")
    browser.ask("/nothing-of-the-kind")

    assert [exchange.route for exchange in proxy.exchanges] == ["directory", "renewalInfo", ""]


def test_many_connections_and_none_left_over(ca: Pebble, tmp_path: Path) -> None:
    """Fifty clients at once, some of them held; with the proxy its threads are gone."""
    before = set(threading.enumerate())
    with FaultProxy(ca, tmp_path / "many") as proxy:
        proxy.on(None, stall, where=lambda exchange: exchange.path == "/stalled", times=None)
        browsers = [Browser(proxy) for _ in range(50)]
        assert [browser.ask()[0] for browser in browsers] == [200] * 50
        for browser in browsers[:5]:
            browser.connection.request("GET", "/stalled")
        until(lambda: len(proxy.exchanges) == 55)
    left = set(threading.enumerate()) - before
    for browser in browsers:
        browser.connection.close()

    assert left == set()


# -- before the CA ------------------------------------------------------------------------------------


def test_held_before_the_ca(proxy: FaultProxy, ca: Pebble, browser: Browser) -> None:
    """The CA has not seen it; when it is released, it goes on."""
    hold, asked = Hold(), ca.requests()
    proxy.on("newNonce", hold)
    with meanwhile(lambda: browser.ask(NONCE, "HEAD")) as outcome:
        until(lambda: hold.reached)
        assert ca.requests() == asked
        assert outcome == []
        hold.release()

    assert outcome[0][0] == 200
    assert (ca.requests() - asked)["HEAD", NONCE] == 1


def test_a_client_that_leaves_takes_what_was_held_along(proxy: FaultProxy, ca: Pebble, browser: Browser) -> None:
    """What was never sent on is not sent on for the dead."""
    hold, asked = Hold(), ca.requests()
    proxy.on("newNonce", hold)
    with closing(Browser(proxy).connection) as leaving:
        leaving.request("HEAD", NONCE, headers={"User-Agent": "chaos"})
        until(lambda: hold.reached)
    time.sleep(0.05)  # longer than the proxy needs to see it
    hold.release()
    browser.ask()

    assert (ca.requests() - asked)["HEAD", NONCE] == 0
    assert proxy.seen("newNonce")[0].answer is None


def test_half_a_request_is_none(ca: Pebble, tmp_path: Path) -> None:
    """Its client died while it was sent: the CA never hears of it, and nobody has asked."""
    with FaultProxy(ca, tmp_path / "half") as proxy, closing(Browser(proxy).connection) as dying:
        dying.request("GET", "/dir", headers={"User-Agent": "chaos"})
        dying.getresponse().read()
        dying.putrequest("POST", "/order-plz")
        dying.putheader("Content-Length", "100")
        dying.endheaders(b'{"payload": ')

    assert [exchange.path for exchange in proxy.exchanges] == ["/dir"]


def test_a_request_that_outlives_its_client(proxy: FaultProxy, ca: Pebble) -> None:
    """It was on the way already: the CA does its part for nobody."""
    hold, asked = Hold(outlive=True), ca.requests()
    proxy.on("newNonce", hold)
    with closing(Browser(proxy).connection) as leaving:
        leaving.request("HEAD", NONCE, headers={"User-Agent": "chaos"})
        until(lambda: hold.reached)
    hold.release()
    until(lambda: proxy.seen("newNonce", status=200))

    assert (ca.requests() - asked)["HEAD", NONCE] == 1


@pytest.mark.parametrize(
    ("fault", "status", "header"),
    [
        (say(503, b"<html>", content_type="text/html", retry_after="120"), 503, ("retry-after", "120")),
        (say_problem(429, "rateLimited", "too many"), 429, ("content-type", "application/problem+json")),
        (redirect("https://elsewhere.test/dir"), 307, ("location", "https://elsewhere.test/dir")),
    ],
)
def test_an_answer_in_the_cas_place(
    proxy: FaultProxy, ca: Pebble, browser: Browser, fault: Any, status: int, header: tuple[str, str]
) -> None:
    """The CA is not asked, and the connection goes on."""
    asked = ca.requests()
    proxy.on("directory", fault)
    first = browser.ask()
    assert ca.requests() == asked

    assert (first[0], first[1][header[0]]) == (status, header[1])
    assert browser.ask()[0] == 200
    assert [exchange.answer is None for exchange in proxy.exchanges] == [True, False]


def test_nothing_comes_of_a_stall(proxy: FaultProxy) -> None:
    """No byte and no end, until the client has had enough."""
    proxy.on("directory", stall)
    impatient = Browser(proxy, timeout=0.3)
    with closing(impatient.connection), pytest.raises(TimeoutError):
        impatient.ask()

    assert proxy.exchanges[0].answer is None


@pytest.mark.parametrize(("fault", "asked"), [(reset_before, 0), (reset_after, 1)])
def test_reset(proxy: FaultProxy, ca: Pebble, browser: Browser, fault: Any, asked: int) -> None:
    """RST, before the CA or after it did its part."""
    earlier = ca.requests()
    proxy.on("newNonce", fault)
    with pytest.raises(ConnectionResetError):
        browser.ask(NONCE, "HEAD")

    assert (ca.requests() - earlier)["HEAD", NONCE] == asked


# -- after the CA -------------------------------------------------------------------------------------


def test_held_after_the_ca(proxy: FaultProxy, ca: Pebble, browser: Browser) -> None:
    """The CA did its part, and the client does not know."""
    hold, asked = Hold(answered=True), ca.requests()
    proxy.on("newNonce", hold)
    with meanwhile(lambda: browser.ask(NONCE, "HEAD")) as outcome:
        until(lambda: hold.reached)
        assert (ca.requests() - asked)["HEAD", NONCE] == 1
        assert outcome == []
        hold.release()

    assert outcome[0][0] == 200


def test_a_truncated_answer(proxy: FaultProxy, browser: Browser) -> None:
    """Fewer bytes than Content-Length says, then the end."""
    proxy.on("directory", truncate)
    with pytest.raises((http.client.IncompleteRead, ssl.SSLEOFError)):
        browser.ask()

    assert proxy.exchanges[0].answer is not None


def test_an_end_in_the_place_of_an_answer(proxy: FaultProxy, browser: Browser) -> None:
    """Closed early: not one byte."""
    proxy.on("directory", close_after)
    with pytest.raises((http.client.RemoteDisconnected, ssl.SSLEOFError)):
        browser.ask()

    assert proxy.exchanges[0].answer is not None


def test_content_length_too_much(proxy: FaultProxy, browser: Browser) -> None:
    """More is promised than comes."""
    proxy.on("directory", misstate_length(by=10))
    with pytest.raises((http.client.IncompleteRead, ssl.SSLEOFError)):
        browser.ask()


def test_content_length_too_little(proxy: FaultProxy, browser: Browser) -> None:
    """All of it comes, and the rest lies where the next answer should begin."""
    whole = browser.ask()[2]
    proxy.on("directory", misstate_length(by=-10))
    request = f"GET /dir HTTP/1.1\r\nHost: {browser.host}\r\nUser-Agent: chaos\r\n\r\n"
    browser.connection.sock.sendall(request.encode())
    came = b""
    while whole not in came:
        came += browser.connection.sock.recv(65536)

    assert f"content-length: {len(whole) - 10}\r\n".encode() in came


def test_byte_by_byte(proxy: FaultProxy, browser: Browser) -> None:
    """Whole in the end, and slow."""
    proxy.on("newNonce", trickle(0.001))
    started = time.monotonic()
    status, headers, _ = browser.ask(NONCE, "HEAD")

    assert status == 200
    assert headers["replay-nonce"]
    assert time.monotonic() - started > 0.1


def test_rewritten(proxy: FaultProxy, browser: Browser) -> None:
    """What the CA said, changed on the way."""
    proxy.on("newNonce", rewrite(lambda answer: answer.without("replay-nonce").with_headers(x_chaos="yes")))
    headers = browser.ask(NONCE, "HEAD")[1]

    assert "replay-nonce" not in headers
    assert headers["x-chaos"] == "yes"
    assert "replay-nonce" in browser.ask(NONCE, "HEAD")[1]


# -- rules --------------------------------------------------------------------------------------------


def test_which_requests_meet_a_fault(proxy: FaultProxy, browser: Browser) -> None:
    """By route, method and what they are; some let through first, then so many and no more."""

    def is_plain(exchange: Exchange) -> bool:
        return "?" not in exchange.path

    rule = proxy.on("directory", say(503), method="GET", where=is_plain, skip=1, times=2)
    asked = [("/dir", "GET"), ("/dir?x", "GET"), ("/dir", "HEAD"), (NONCE, "HEAD")] + [("/dir", "GET")] * 3
    got = [browser.ask(path, method)[0] for path, method in asked]

    assert [status == 503 for status in got] == [False, False, False, False, True, True, False]
    assert rule.met == 2
    always = proxy.on("directory", say(500), times=None)
    assert [browser.ask()[0] for _ in range(3)] == [500] * 3
    assert always.met == 3
    proxy.clear()
    assert browser.ask()[0] == 200


# -- the database -------------------------------------------------------------------------------------


@pytest.fixture
def guarded(postgresql: PostgresServer, postgresql_database: str) -> Iterator[tuple[PostgresProxy, str]]:
    """A proxy before PostgreSQL, and the URL of a database through it that has a table `t`."""
    with psycopg.connect(postgresql_database, autocommit=True) as session:
        session.execute("CREATE TABLE t (word text)")
    with PostgresProxy(postgresql.port) as proxy:
        yield proxy, postgresql_database.replace(f":{postgresql.port}", f":{proxy.port}")


def words(url: str) -> list[str]:
    with psycopg.connect(url) as session:
        return [word for (word,) in session.execute("SELECT word FROM t ORDER BY word")]


def write(url: str, word: str) -> str:
    with psycopg.connect(url) as session:
        session.execute("INSERT INTO t VALUES (%s)", [word])
    return word


def test_a_cut_database_connection(guarded: tuple[PostgresProxy, str]) -> None:
    """RST for who is connected; who comes next gets in."""
    proxy, url = guarded
    with psycopg.connect(url) as session:
        session.execute("SELECT 1")
        assert proxy.connections == 1
        proxy.cut()
        until(lambda: proxy.connections == 0)
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")

    assert write(url, "later") == "later"


def test_a_half_open_database_connection(guarded: tuple[PostgresProxy, str]) -> None:
    """Nothing passes and nothing ends, until it goes on."""
    proxy, url = guarded
    with psycopg.connect(url) as session:
        session.execute("SELECT 1")
        proxy.stall()
        with meanwhile(lambda: session.execute("SELECT 2").fetchone()) as outcome:
            time.sleep(0.2)
            assert outcome == []
            proxy.resume()

    assert outcome == [(2,)]


def test_a_commit_that_nobody_hears_of(guarded: tuple[PostgresProxy, str], postgresql_database: str) -> None:
    """Carried out, and the connection ended; a transaction without the mark is left alone."""
    proxy, url = guarded
    loss = proxy.lose_commit(parameter("lost"))
    write(url, "heard")
    assert not loss.reached
    with pytest.raises(psycopg.OperationalError):
        write(url, "lost")

    assert loss.reached
    assert words(postgresql_database) == ["heard", "lost"]
    assert write(url, "once only")


def test_a_commit_that_stays_unanswered(guarded: tuple[PostgresProxy, str], postgresql_database: str) -> None:
    """Carried out, and silence: who waits for it can be killed in peace."""
    proxy, url = guarded
    loss = proxy.lose_commit(parameter("silence"), cut=False)
    with meanwhile(lambda: write(url, "silence")) as outcome:
        until(lambda: loss.reached)
        assert words(postgresql_database) == ["silence"]
        assert outcome == []
        proxy.cut()

    assert isinstance(outcome[0], psycopg.OperationalError)
    until(lambda: proxy.connections == 0)


def test_a_held_write_on_postgresql(postgresql_database: str) -> None:
    """The one that is meant, before its commit; another passes; released, it goes on and the trigger is gone."""
    with psycopg.connect(postgresql_database, autocommit=True) as session:
        session.execute("CREATE TABLE t (word text)")
    with held_write(postgresql_database, "t", "NEW.word = 'held'") as held:
        write(postgresql_database, "other")
        assert not held.reached
        with meanwhile(lambda: write(postgresql_database, "held")) as outcome:
            until(lambda: held.reached)
            assert words(postgresql_database) == ["other"]
            assert outcome == []
            held.release()

    assert outcome == ["held"]
    write(postgresql_database, "held")
    assert words(postgresql_database) == ["held", "held", "other"]


def test_a_held_write_on_sqlite(tmp_path: Path) -> None:
    """The one that is meant, before its commit; a run of short commits is not mistaken for it."""
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as session:
        session.execute("PRAGMA journal_mode=WAL")
        session.execute("CREATE TABLE t (word text)")
        with held_write(f"sqlite:///{path}", "t", "NEW.word = 'held'") as held:
            over = threading.Event()
            with meanwhile(lambda: write_until(session, over)):
                assert not any(held.reached for _ in range(5))
                over.set()
            with meanwhile(lambda: session.execute("INSERT INTO t VALUES ('held')")) as outcome:
                until(lambda: held.reached)
                session.interrupt()
        assert isinstance(outcome[0], sqlite3.OperationalError)
        session.execute("INSERT INTO t VALUES ('held')")
        found = session.execute("SELECT count(*) FROM t WHERE word = 'held'").fetchone()

    assert found == (1,)


def write_until(session: sqlite3.Connection, over: threading.Event) -> None:
    while not over.is_set():
        session.execute("INSERT INTO t VALUES ('short')")
