"""What both proxies do with the rendered routes: real requests to real upstreams."""

import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from .conftest import (
    Authority,
    EchoHandler,
    Gateway,
    HttpHandler,
    Node,
    Ports,
    Upstream,
    ask,
    ask_tls,
    await_true,
)

pytestmark = pytest.mark.proxy

Start = Callable[..., Upstream]


def publish(node: Node, gateway: Gateway) -> None:
    node.source.publish(gateway.snapshot())
    heartbeat = node.step()
    assert (heartbeat.error, heartbeat.warnings) == (None, ())


PRINTABLE = "/" + "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "%?#/")
PUNCTUATION = "/" + "".join(f"\\{character}" for character in "!\"$&'()*+,-.:;<=>@[\\]^_`{|}~")
MATCHES: list[tuple[dict[str, Any], str, str, bool]] = [
    ({}, "/any", "any.test", True),
    ({"host": "a.test"}, "/", "A.Test.:80", True),
    ({"host": "a.test"}, "/", "b.a.test", False),
    ({"host": "*.a.test"}, "/", "b.a.test", True),
    ({"host": "*.a.test"}, "/", "a.test", False),
    ({"host": "*.a.test"}, "/", "c.b.a.test", False),
    ({"host": "*.a.test"}, "/", "b.axtest", False),
    ({"path": {"exact": "/api"}}, "/api?q=1", "a.test", True),
    ({"path": {"exact": "/api"}}, "/api/", "a.test", False),
    ({"path": {"exact": "/a'p\"i $HOME".replace(" ", "")}}, "/a'p\"i$HOME", "a.test", True),
    ({"path": {"exact": PRINTABLE}}, PRINTABLE, "a.test", True),
    ({"path": {"exact": PRINTABLE}}, PRINTABLE + "x", "a.test", False),
    ({"path": {"prefix": PRINTABLE}}, PRINTABLE + "/x", "a.test", True),
    ({"path": {"regex": PUNCTUATION}}, PUNCTUATION.replace("\\", "").replace("[]", "[\\]"), "a.test", True),
    ({"path": {"regex": "^/a$|/b$"}}, "/a", "a.test", True),
    ({"path": {"regex": "^/a$|/b$"}}, "/a/b", "a.test", False),
    ({"path": {"regex": "a.*"}}, "/x", "a.test", False),
    ({"path": {"prefix": "/api"}}, "/api", "a.test", True),
    ({"path": {"prefix": "/api"}}, "/api/x", "a.test", True),
    ({"path": {"prefix": "/api"}}, "/%61pi/x", "a.test", True),
    ({"path": {"prefix": "/api"}}, "/apix", "a.test", False),
    ({"path": {"prefix": "/"}}, "/x", "a.test", True),
    ({"path": {"regex": "/v[0-9]+/items"}}, "/v12/items", "a.test", True),
    ({"path": {"regex": "/v[0-9]+/items"}}, "/v12/items/x", "a.test", False),
    ({"path": {"regex": "/a|/b"}}, "/b", "a.test", True),
    ({"path": {"regex": "/a|/b"}}, "/bc", "a.test", False),
    ({"host": "a.test", "path": {"exact": "/x"}}, "/x", "b.test", False),
]


def test_a_match_takes_what_it_says(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """A request is taken if host and path match, and gets 404 if not."""
    pool = gateway.pool(upstream("up").port)
    listening = [ports.take() for _ in MATCHES]
    for port, (match, *_) in zip(listening, MATCHES, strict=True):
        gateway.route(gateway.listener(port), pool, **match)
    publish(node, gateway)

    answers = [(row, ask(port, *row[1:3])) for port, row in zip(listening, MATCHES, strict=True)]
    assert answers == [(row, (200, "up") if row[3] else (404, "no route")) for row in MATCHES]


def test_the_lower_priority_goes_first(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """Routes are tried in the order of their priority, whatever the order of the rows."""
    listener = gateway.listener(port := ports.take())
    gateway.route(listener, gateway.pool(upstream("all").port), priority=20)
    gateway.route(listener, gateway.pool(upstream("special").port), priority=5, path={"prefix": "/special"})
    publish(node, gateway)

    assert ask(port, "/special/x")[1] == "special"
    assert ask(port, "/x")[1] == "all"


@pytest.fixture
def echo(ports: Ports) -> Iterator[int]:
    """Give the port of a websocket server that says everything back."""

    def answer(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(answer, "127.0.0.1", port := ports.take()) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield port
        server.shutdown()
        thread.join()


def test_a_websocket_route_takes_upgrades_only(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start, echo: int
) -> None:
    """An upgraded connection carries messages both ways, over a reload too; a plain request goes on."""
    listener = gateway.listener(port := ports.take())
    gateway.route(listener, gateway.pool(echo), "ws", 1, path={"prefix": "/ws"})
    gateway.route(listener, gateway.pool(upstream("plain").port), priority=2)
    publish(node, gateway)

    assert ask(port, "/ws") == (200, "plain")
    with connect(f"ws://127.0.0.1:{port}/ws/x", proxy=None) as connection:
        connection.send("ping")
        assert connection.recv(timeout=10) == "ping"
        gateway.route(listener, gateway.pools[0].id, priority=3)
        publish(node, gateway)
        connection.send(b"pong" * 10_000)
        assert connection.recv(timeout=10) == b"pong" * 10_000


def test_a_websocket_is_carried_over_tls(
    node: Node, gateway: Gateway, ports: Ports, echo: int, authority: Authority
) -> None:
    """The same on an https listener."""
    gateway.route(gateway.listener(port := ports.take(), "https"), gateway.pool(echo), "ws", host="a.test")
    node.source.put(authority.issue(1, "a.test"))
    publish(node, gateway)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)

    with connect(f"wss://a.test:{port}/", sock=raw, ssl=trusting, proxy=None) as connection:
        connection.send("ping")
        assert connection.recv(timeout=10) == "ping"


def test_a_port_route_passes_bytes(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """Whatever is said on the port comes to the upstream as it is, a challenge's path included."""
    gateway.route(gateway.listener(port := ports.take()), gateway.pool(upstream("raw", EchoHandler).port), "port")
    publish(node, gateway)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answer = connection.makefile("rb")
        connection.sendall(b"GET /.well-known/acme-challenge/x\n")

        assert answer.readline() == b"raw\n"
        assert answer.readline() == b"GET /.well-known/acme-challenge/x\n"


def test_round_robin_ignores_weights_and_weighted_keeps_them(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """Ten requests each, or three to one."""
    first, second = upstream("first"), upstream("second")
    listener = gateway.listener(port := ports.take())
    for policy, path in (("round_robin", "/even"), ("weighted", "/odd")):
        pool = gateway.pool(first.port, second.port, policy=policy, weights=(3, 1))
        gateway.route(listener, pool, path={"exact": path})
    publish(node, gateway)

    assert Counter(ask(port, "/even")[1] for _ in range(20)) == {"first": 10, "second": 10}
    assert Counter(ask(port, "/odd")[1] for _ in range(20)) == {"first": 15, "second": 5}


def test_least_conn_avoids_the_busy_one(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """While one upstream holds its requests back, the other gets the rest."""
    busy, idle = upstream("busy"), upstream("idle")
    pool = gateway.pool(busy.port, idle.port, policy="least_conn", check=False)
    gateway.route(gateway.listener(port := ports.take()), pool)
    publish(node, gateway)
    for held in (busy, idle):
        held.gate.clear()

    def arrived(sent: int) -> bool:
        return len(busy.asked) + len(idle.asked) == sent

    with ThreadPoolExecutor(max_workers=8) as visitors:
        # Four on each: a proxy may count a request for a moment after its answer arrived, so one would be no majority.
        visits = []
        for sent in range(1, 9):
            visits.append(visitors.submit(ask, port))
            await_true(partial(arrived, sent), "the request arrives")
        assert (len(busy.asked), len(idle.asked)) == (4, 4)
        idle.gate.set()
        await_true(lambda: sum(visit.done() for visit in visits) == 4, "the idle one's four answers")

        assert {ask(port)[1] for _ in range(10)} == {"idle"}
        busy.gate.set()


def test_a_killed_upstream_fails_no_request(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """Requests go on to the one that lives; the other is back once it answers its check."""
    first, second = upstream("first"), upstream("second")
    gateway.route(gateway.listener(port := ports.take()), gateway.pool(first.port, second.port))
    publish(node, gateway)
    first.shutdown()
    first.server_close()

    assert {ask(port) for _ in range(40)} == {(200, "second")}
    upstream("back", port=first.port)
    await_true(lambda: ask(port)[1] == "back", "the upstream is used again")


def test_a_pool_without_a_living_target_says_so(node: Node, gateway: Gateway, ports: Ports) -> None:
    """503, and no other route is tried."""
    listener = gateway.listener(port := ports.take())
    gateway.route(listener, gateway.pool(), priority=1)
    publish(node, gateway)

    assert ask(port)[0] == 503


TOKEN = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA"
PREFIX = "/.well-known/acme-challenge/"


CHALLENGES = [
    ("GET", PREFIX + TOKEN, 200),
    ("GET", PREFIX + "a" * 22, 200),
    ("GET", PREFIX + "a" * 128, 200),
    ("HEAD", PREFIX + TOKEN, 200),
    ("POST", PREFIX + TOKEN, 405),
    ("DELETE", PREFIX + "short", 405),
    ("GET", PREFIX, 404),
    ("GET", PREFIX + "a" * 21, 404),
    ("GET", PREFIX + "a" * 129, 404),
    ("GET", PREFIX + TOKEN + "/", 404),
    ("GET", PREFIX + TOKEN + "%0a", 404),
    ("GET", PREFIX + TOKEN[:-1] + "%41", 404),
    ("GET", PREFIX + "<script>alert(1)</script>", 404),
]


def test_a_challenge_goes_to_the_responder_or_nowhere(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """Only a token is asked for, and nothing under the prefix falls through to the routes."""
    responder = upstream("responder")
    gateway.responders = (f"127.0.0.1:{responder.port}",)
    gateway.route(gateway.listener(port := ports.take()), gateway.pool(upstream("user").port), priority=-1000)
    publish(node, gateway)

    answers = [(method, path, *ask(port, path, method=method)) for method, path, _ in CHALLENGES]

    assert [answer[:3] for answer in answers] == CHALLENGES
    assert "user" not in {body for *_, body in answers}
    assert len(responder.asked) == sum(status == 200 for *_, status in CHALLENGES)
    assert ask(port, "/x") == (200, "user")


def test_a_path_that_leads_out_of_the_prefix_is_no_challenge(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """HAProxy takes it as it stands, nginx as the path it comes to; the responder is asked by neither."""
    responder = upstream("responder")
    gateway.responders = (f"127.0.0.1:{responder.port}",)
    gateway.route(gateway.listener(port := ports.take()), gateway.pool(upstream("user").port))
    publish(node, gateway)

    assert ask(port, PREFIX + "../" + TOKEN)[0] == (404 if node.kind == "haproxy" else 200)
    assert responder.asked == []


def test_a_responder_is_reached_as_soon_as_it_runs(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """One that started a moment ago answers, and those that are dead are passed over."""
    dead, late = ports.take(), ports.take()
    gateway.responders = (f"127.0.0.1:{dead}", f"127.0.0.1:{late}")
    gateway.listener(port := ports.take())
    publish(node, gateway)
    assert ask(port, PREFIX + TOKEN)[0] in (502, 503)
    upstream("late", port=late)

    assert [ask(port, PREFIX + TOKEN) for _ in range(4)] == [(200, "late")] * 4


def test_what_a_client_says_of_itself_is_not_passed_on(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """The upstream sees one forwarding header of each kind, and it is ours."""
    up = upstream("up")
    gateway.route(gateway.listener(port := ports.take()), gateway.pool(up.port))
    publish(node, gateway)
    ask(port, host="a.test\r\nX-Forwarded-For: 10.9.9.9\r\nX-Forwarded-Proto: gopher")

    said = [line.lower() for line in up.asked[-1].splitlines() if line.lower().startswith("x-forwarded")]
    assert sorted(said) == ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http"]


THUMBPRINT = "LPJNul-wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ"


def stateless_node(node: Node, gateway: Gateway, port: int, *dns_names: str) -> None:
    """Serve a listener that answers challenges by itself, with these names in its map."""
    gateway.listener(port, challenge="stateless")
    for name in dns_names:
        node.source.put_thumbprint(name, THUMBPRINT)
    publish(node, gateway)


STATELESS = [
    ("GET", PREFIX + TOKEN, "a.test", 200),
    ("GET", PREFIX + TOKEN + "?x=1", "A.Test.:80", 200),
    ("GET", PREFIX + "a" * 22, "a.test", 200),
    ("GET", PREFIX + "a" * 128, "a.test", 200),
    ("GET", PREFIX + TOKEN, "default", 200),
    ("GET", PREFIX + TOKEN, "b.test", 404),
    ("GET", PREFIX + TOKEN, "x.a.test", 404),
    ("GET", PREFIX + "a" * 21, "a.test", 404),
    ("GET", PREFIX + "a" * 129, "a.test", 404),
    ("GET", PREFIX + TOKEN + "%0a", "a.test", 404),
    ("GET", PREFIX + TOKEN[:-1] + "%41", "a.test", 404),
    ("GET", PREFIX + TOKEN + "/", "a.test", 404),
    ("GET", PREFIX + "<script>alert(1)</script>", "a.test", 404),
    ("GET", PREFIX, "a.test", 404),
    ("POST", PREFIX + TOKEN, "a.test", 405),
]


def test_a_stateless_listener_answers_for_the_names_it_was_given(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """Any token, with the thumbprint of the name's account; everything else under the prefix gets nothing."""
    responder = upstream("responder")
    gateway.responders = (f"127.0.0.1:{responder.port}",)
    stateless_node(node, gateway, port := ports.take(), "a.test", "default")

    answers = [(method, path, host, *ask(port, path, host, method)) for method, path, host, _ in STATELESS]

    assert [answer[:4] for answer in answers] == STATELESS
    for _, path, _, status, body in answers:
        token = path.removeprefix(PREFIX).partition("?")[0]
        assert (body == f"{token}.{THUMBPRINT}") == (status == 200)
    assert responder.asked == []


def test_a_stateless_answer_cannot_be_taken_for_something_else(node: Node, gateway: Gateway, ports: Ports) -> None:
    """It is text, for nobody to keep; HEAD gets no body."""
    stateless_node(node, gateway, port := ports.take(), "a.test")
    request = f"GET {PREFIX + TOKEN} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request.encode())
        head = connection.makefile("rb").read().lower().partition(b"\r\n\r\n")[0].split(b"\r\n")

    assert {b"content-type: text/plain", b"cache-control: no-store", b"x-content-type-options: nosniff"} <= set(head)
    assert ask(port, PREFIX + TOKEN, "a.test", "HEAD") == (200, "")


def test_each_listener_answers_in_its_own_way(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start, authority: Authority
) -> None:
    """One asks the responder and one does not; a CA that is redirected to https is answered there too."""
    responder = upstream("responder")
    gateway.responders = (f"127.0.0.1:{responder.port}",)
    gateway.listener(forward := ports.take())
    gateway.listener(secure := ports.take(), "https", challenge="stateless")
    node.source.put(authority.issue(1, "a.test"))
    stateless_node(node, gateway, stateless := ports.take(), "a.test")

    assert ask(forward, PREFIX + TOKEN) == (200, "responder")
    assert ask(stateless, PREFIX + TOKEN) == (200, f"{TOKEN}.{THUMBPRINT}")
    assert ask_tls(secure, "a.test", "a.test", PREFIX + TOKEN) == (200, f"{TOKEN}.{THUMBPRINT}")


def test_thumbprints_come_change_and_go_while_it_runs(node: Node, gateway: Gateway, ports: Ports) -> None:
    """Each row is proved before the cursor moves, and HAProxy is not reloaded for it."""
    stateless_node(node, gateway, port := ports.take(), "a.test")
    workers, other = node.workers(), THUMBPRINT[::-1]
    node.source.put_thumbprint("a.test", other)
    node.source.put_thumbprint("b.test", THUMBPRINT)

    heartbeat = node.step()

    assert (heartbeat.error, heartbeat.unanswered, heartbeat.cursor.revision) == (None, {}, 3)
    assert ask(port, PREFIX + TOKEN, "a.test")[1] == f"{TOKEN}.{other}"
    assert ask(port, PREFIX + TOKEN, "b.test")[1] == f"{TOKEN}.{THUMBPRINT}"
    node.source.remove_thumbprint("b.test")
    assert node.step().unanswered == {}
    assert ask(port, PREFIX + TOKEN, "b.test")[0] == 404
    node.assert_kept(workers)


def test_a_row_that_is_not_answered_is_named(node: Node, gateway: Gateway, ports: Ports) -> None:
    """With a value that no map may hold. Without a listener that answers by itself the responders do, for all."""
    gateway.listener(ports.take())
    publish(node, gateway)
    node.source.put_thumbprint("a.test", THUMBPRINT)
    node.source.put_thumbprint("b.test evil", THUMBPRINT)
    node.source.put_thumbprint("c.test", "$evil")

    assert sorted(node.step().unanswered) == ["b.test evil", "c.test"]
    gateway.listener(ports.take(), challenge="stateless")
    node.source.publish(gateway.snapshot())
    assert sorted(node.step().unanswered) == ["b.test evil", "c.test"]
    node.source.remove_thumbprint("b.test evil")
    node.source.put_thumbprint("c.test", THUMBPRINT)
    assert node.step().unanswered == {}
    node.source.epoch += 1
    node.source.thumbprints.clear()
    assert node.step().unanswered == {}
    assert node.agent._state.thumbprints == {}


def test_a_restart_keeps_the_thumbprints(node: Node, gateway: Gateway, ports: Ports) -> None:
    """A new agent finds them in its state, and the proxy as it was."""
    stateless_node(node, gateway, port := ports.take(), "a.test")
    workers = node.workers()
    node.agent.close()
    node.start_agent()

    assert node.step().unanswered == {}
    assert node.workers() == workers
    assert ask(port, PREFIX + TOKEN)[1] == f"{TOKEN}.{THUMBPRINT}"


def test_a_name_that_does_not_resolve_keeps_nobody_waiting(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """The version is served, and so is the pool by its other target; a pool without one says so."""
    listener = gateway.listener(port := ports.take())
    gateway.target(pool := gateway.pool(upstream("up").port), "nowhere.invalid:80")
    gateway.route(listener, pool, priority=2)
    gateway.target(pool := gateway.pool(), "nowhere.invalid:80")
    gateway.route(listener, pool, priority=1, path={"exact": "/alone"})
    gateway.responders = ("nowhere.invalid:80",)
    publish(node, gateway)

    assert {ask(port) for _ in range(10)} == {(200, "up")}
    assert ask(port, "/alone")[0] == 503
    assert ask(port, PREFIX + TOKEN)[0] == 503


@pytest.mark.parametrize("kind", ["nginx"])
def test_a_name_is_followed_to_its_new_address(node: Node, gateway: Gateway, ports: Ports, upstream: Start) -> None:
    """What a name resolves to is taken over while nginx runs, and kept while DNS is away, by the next agent too."""
    up = upstream("up")
    gateway.target(pool := gateway.pool(), f"app.internal:{up.port}")
    gateway.route(gateway.listener(port := ports.take()), pool)
    publish(node, gateway)
    assert ask(port)[0] == 503
    node.hosts["app.internal"] = ("127.0.0.1",)

    await_true(lambda: node.step().error is None and ask(port) == (200, "up"), "the address is used")
    workers = node.workers()
    node.hosts.clear()
    assert [node.step().error for _ in range(3)] == [None] * 3
    node.agent.close()
    node.start_agent()
    assert node.step().error is None
    assert ask(port) == (200, "up")
    assert node.workers() == workers


class RedirectingHandler(HttpHandler):
    """Tells nginx to go on with another of its locations."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Accel-Redirect: //r1\r\nContent-Length: 4\r\n\r\nmine")


def test_an_upstream_cannot_send_a_request_elsewhere(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """Neither can a client ask for a location of ours."""
    listener = gateway.listener(port := ports.take())
    gateway.route(listener, gateway.pool(upstream("other").port), priority=1, host="other.test")
    gateway.route(listener, gateway.pool(upstream("evil", RedirectingHandler).port, check=False), priority=2)
    publish(node, gateway)

    assert {ask(port, path) for path in ("/", "//r1", "/%2fr1", "/r1")} == {(200, "mine")}


def test_the_upstream_sees_the_host_as_it_was_asked_for(
    node: Node, gateway: Gateway, ports: Ports, upstream: Start
) -> None:
    """With the port, which it needs for links to itself."""
    up = upstream("up")
    gateway.route(gateway.listener(port := ports.take()), gateway.pool(up.port))
    publish(node, gateway)
    ask(port, host=f"a.test:{port}")

    assert f"host: a.test:{port}" in up.asked[-1].lower().splitlines()
    assert up.asked[-1].startswith("GET / HTTP/1.1")
