"""The transport against real sockets: what a server, a proxy or a network can do to a request."""

import base64
import os
import resource
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest

from certworker.ca.proxies import Proxies
from certworker.ca.transport import Transport
from certworker.cli.pebble import free_ports
from certworker.errors import AnswerFault, CaError, SettingsError, TransportFault

from .servers import Peer, answer, make_tls, serving

LIMIT = timedelta(seconds=0.4)
LATE = 1.5
"""Seconds after which a limit of 0.4 has not held, on a busy machine."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def transport(tls: tuple[Path, ssl.SSLContext]) -> Iterator[Transport]:
    with closing(Transport(tls[0])) as transport:
        yield transport


@contextmanager
def closing(transport: Transport) -> Iterator[Transport]:
    """Close a transport at the end, so that no socket is left to the garbage collector."""
    try:
        yield transport
    finally:
        transport.close()


def always(data: bytes):  # type: ignore[no-untyped-def]
    """Serve the same answer to every request."""

    def serve(peer: Peer) -> None:
        while peer.read_request():
            peer.send(data)

    return serve


# -- the plain case -------------------------------------------------------------------------------------


def test_an_answer_comes_back_whole(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """Status, body, and headers in lower case with repeated ones joined."""
    with serving(always(answer(b"body", status="418 teapot", headers="Link: <a>\r\nLINK: <b>\r\n")), tls[1]) as server:
        response = transport.request("GET", server.url)

    assert (response.status, response.body, response.url) == (418, b"body", server.url)
    assert response.headers["link"] == "<a>, <b>"


def test_the_request_says_who_asks(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """RFC 8555 §6.1 wants a User-Agent; ours tells nothing about the machine."""
    requests: list[bytes] = []

    def serve(peer: Peer) -> None:
        requests.append(peer.read_request())
        peer.send(answer())

    with serving(serve, tls[1]) as server:
        transport.request("POST", f"{server.url}?a=b", b"{}", {"Content-Type": "application/jose+json"})

    lines = requests[0].split(b"\r\n")
    assert lines[0] == b"POST /dir?a=b HTTP/1.1"
    assert lines[-1] == b"{}"
    assert {b"User-Agent: certworker/0.1.0", f"Host: 127.0.0.1:{server.port}".encode()} <= set(lines)


def test_connections_are_kept(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """Many requests, one TLS handshake."""
    with serving(always(answer()), tls[1]) as server:
        for _ in range(5):
            transport.request("GET", server.url)

    assert transport.connections_opened == server.connections == 1


def test_threads_do_not_share_a_connection(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """At most one for each that asks at the same time."""
    with serving(always(answer()), tls[1]) as server, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: transport.request("GET", server.url), range(200)))

    assert {response.status for response in responses} == {200}
    assert server.connections <= 8


def test_nothing_is_kept_after_close(tls: tuple[Path, ssl.SSLContext]) -> None:
    """The server sees the end of it, and a later request does not leave a connection behind."""
    ended: list[bytes] = []

    def serve(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer())
        ended.append(peer.read_request())

    transport = Transport(tls[0])
    with serving(serve, tls[1]) as server:
        transport.request("GET", server.url)
        transport.close()
        transport.request("GET", server.url)

    assert ended == [b"", b""]


# -- time -----------------------------------------------------------------------------------------------


def stall(peer: Peer) -> None:
    peer.read_request()
    peer.stop.wait(10)


def trickle_headers(peer: Peer) -> None:
    peer.read_request()
    peer.trickle(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000)


def trickle_body(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    peer.trickle(b"x" * 1000)


def trickle_chunks(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    peer.trickle(b"1\r\nx\r\n" * 200)


def trickle_continues(peer: Peer) -> None:
    peer.read_request()
    while not peer.stop.wait(0.02):
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("serve", [stall, trickle_headers, trickle_body, trickle_chunks, trickle_continues])
def test_no_server_holds_a_thread(tls: tuple[Path, ssl.SSLContext], serve) -> None:  # type: ignore[no-untyped-def]
    """The limit is for the whole request, not for each read."""
    with serving(serve, tls[1]) as server, closing(Transport(tls[0], time_limit=LIMIT)) as transport:
        started = time.monotonic()
        with pytest.raises(TransportFault, match="check network and firewall") as caught:
            transport.request("GET", server.url)

        assert (caught.value.kind, time.monotonic() - started < LATE) == ("timeout", True)


def test_a_server_that_does_not_read_holds_no_thread(tls: tuple[Path, ssl.SSLContext]) -> None:
    """More than the kernels hold between the two of us."""
    with (
        serving(lambda peer: peer.stop.wait(10), tls[1]) as server,
        closing(Transport(tls[0], time_limit=LIMIT)) as transport,
        pytest.raises(TransportFault) as caught,
    ):
        transport.request("POST", server.url, bytes(32 * 1024 * 1024))

    assert caught.value.kind == "timeout"


def test_each_request_on_a_kept_connection_has_all_its_time(tls: tuple[Path, ssl.SSLContext]) -> None:
    """However little of theirs the ones before it had left."""

    def serve(peer: Peer) -> None:
        for _ in range(3):
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\n")
            peer.stop.wait(LIMIT.total_seconds() * 0.4)
            peer.send(b"Content-Length: 0\r\n\r\n")

    with serving(serve, tls[1]) as server, closing(Transport(tls[0], time_limit=LIMIT)) as transport:
        statuses = [transport.request("GET", server.url).status for _ in range(3)]

    assert (statuses, server.connections) == ([200] * 3, 1)


def test_a_silent_handshake_ends(tls: tuple[Path, ssl.SSLContext]) -> None:
    """A port that accepts and never speaks TLS."""
    with (
        serving(stall) as server,
        closing(Transport(tls[0], time_limit=LIMIT)) as transport,
        pytest.raises(TransportFault) as caught,
    ):
        transport.request("GET", server.url.replace("http:", "https:"))

    assert caught.value.kind == "timeout"


def test_a_full_backlog_ends(tls: tuple[Path, ssl.SSLContext]) -> None:
    """A host that does not even accept."""
    (port,) = free_ports(1)
    with (
        socket.create_server(("127.0.0.1", port), backlog=0),
        closing(Transport(tls[0], time_limit=LIMIT)) as transport,
    ):
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        with pytest.raises(TransportFault) as caught:
            transport.request("GET", f"https://127.0.0.1:{port}/")
        for sock in waiting:
            sock.close()

    assert caught.value.kind == "timeout"


# -- answers that are cut, too large, or not HTTP -----------------------------------------------------------


def once(data: bytes):  # type: ignore[no-untyped-def]
    """Serve one answer and close."""

    def serve(peer: Peer) -> None:
        peer.read_request()
        peer.send(data)

    return serve


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nno length, and cut without a farewell",
    ],
)
def test_a_cut_answer_is_no_answer(transport: Transport, tls: tuple[Path, ssl.SSLContext], data: bytes) -> None:
    """However the end of it is told: half a chain must not pass for a whole one."""
    with serving(once(data), tls[1]) as server, pytest.raises(TransportFault, match="before the answer was complete"):
        transport.request("POST", server.url, b"{}")


def test_a_reset_is_told(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """RST instead of an answer."""

    def serve(peer: Peer) -> None:
        peer.read_request()
        peer.reset()

    with serving(serve, tls[1]) as server, pytest.raises(TransportFault, match="was closed") as caught:
        transport.request("GET", server.url)

    assert caught.value.kind == "reset"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n"
NO_LENGTH = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 1024
HUGE = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"


@pytest.mark.parametrize("data", [answer(b"x" * 1024), CHUNKED, NO_LENGTH, HUGE])
def test_an_answer_has_a_limit(transport: Transport, tls: tuple[Path, ssl.SSLContext], data: bytes) -> None:
    """However its length is told, and without reading it all."""
    with serving(once(data), tls[1]) as server, pytest.raises(AnswerFault, match="larger than allowed"):
        transport.request("GET", server.url, max_bytes=1023)


@pytest.mark.parametrize("data", [answer(b"x" * 1024), CHUNKED])
def test_an_answer_may_fill_its_limit(transport: Transport, tls: tuple[Path, ssl.SSLContext], data: bytes) -> None:
    """The limit itself is allowed."""
    with serving(once(data), tls[1]) as server:
        assert len(transport.request("GET", server.url, max_bytes=1024).body) == 1024


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_unusable(transport: Transport, tls: tuple[Path, ssl.SSLContext], data: bytes) -> None:
    """Garbage is an answer, though not one to use."""
    with serving(once(data), tls[1]) as server, pytest.raises(CaError):
        transport.request("GET", server.url)


# -- kept connections that end --------------------------------------------------------------------------


def test_a_closed_connection_is_replaced(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """A server that closes after each answer without saying so costs a handshake, not a failure."""
    with serving(once(answer()), tls[1]) as server:
        for count in range(1, 4):
            transport.request("POST", server.url, b"{}")
            wait_until_closed(transport)

            assert server.connections == count


def wait_until_closed(transport: Transport) -> None:
    """Wait until the server's farewell has arrived on every kept connection."""
    kept = [connection for idle in transport._idle.values() for connection in idle]
    ends_at = time.monotonic() + 5
    while any(connection.is_idle() for connection in kept) and time.monotonic() < ends_at:
        time.sleep(0.01)


def second_time_unlucky(peer: Peer) -> None:
    """Answer one request, then take the next and close without an answer."""
    peer.read_request()
    peer.send(answer())
    peer.read_request()


@pytest.mark.parametrize(("method", "repeatable"), [("GET", False), ("HEAD", False), ("POST", True)])
def test_a_harmless_request_is_repeated(
    transport: Transport, tls: tuple[Path, ssl.SSLContext], method: str, repeatable: bool
) -> None:
    """A kept connection that fails before a byte of an answer: once more, on a new one."""
    with serving(second_time_unlucky, tls[1]) as server:
        transport.request("POST", server.url, b"{}")

        assert transport.request(method, server.url, None, repeatable=repeatable).status == 200
        assert server.connections == 2


def test_an_act_is_never_repeated(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """The server may have done it: only the caller can find out."""
    with serving(second_time_unlucky, tls[1]) as server:
        transport.request("POST", server.url, b"{}")

        with pytest.raises(TransportFault) as caught:
            transport.request("POST", server.url, b"{}")
        assert (caught.value.kind, server.connections) == ("reset", 1)


def test_a_begun_answer_is_never_repeated(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """Not even of a GET: a server that breaks off once will do it again."""

    def serve(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer())
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")

    with serving(serve, tls[1]) as server:
        transport.request("GET", server.url)

        with pytest.raises(TransportFault):
            transport.request("GET", server.url)
        assert server.connections == 1


# -- redirects ------------------------------------------------------------------------------------------


def redirecting(*locations: str):  # type: ignore[no-untyped-def]
    """Redirect along `locations`, then answer."""

    def serve(peer: Peer) -> None:
        for location in locations:
            peer.read_request()
            peer.send(answer(b"", status="307 Temporary Redirect", headers=f"Location: {location}\r\n"))
        while peer.read_request():
            peer.send(answer(b"there"))

    return serve


def test_a_get_follows_within_its_origin(transport: Transport, tls: tuple[Path, ssl.SSLContext]) -> None:
    """Three times; the answer says where it came from."""
    with serving(redirecting("/one", "two", "/three#here"), tls[1]) as server:
        response = transport.request("GET", server.url)

    assert (response.body, response.url) == (b"there", server.url.replace("/dir", "/three"))


@pytest.mark.parametrize(
    ("method", "locations"),
    [
        ("POST", ["/one"]),
        ("HEAD", ["/one"]),
        ("GET", ["/1", "/2", "/3", "/4"]),
        ("GET", ["https://other.test/"]),
        ("GET", ["https://127.0.0.1:1/"]),
        ("GET", ["http://127.0.0.1/"]),
        ("GET", ["//user@127.0.0.1/"]),
        ("GET", ["file:///etc/passwd"]),
    ],
)
def test_nothing_else_is_followed(
    transport: Transport, tls: tuple[Path, ssl.SSLContext], method: str, locations: list[str]
) -> None:
    """The redirect itself is the answer; what it leads to is not asked."""
    with serving(redirecting(*locations), tls[1]) as server:
        assert transport.request(method, server.url).status == 307


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "ftp://a.test/",
        "https://",
        "https://u:p@a.test/",
        "https://a.test/\n",
        "https://a.test:0x/",
        "",
    ],
)
def test_only_https_is_asked(transport: Transport, url: str) -> None:
    """And nothing that is not plainly a URL."""
    with pytest.raises(TransportFault, match="check ACME_DIRECTORY_URL"):
        transport.request("GET", url)


def test_http_has_to_be_allowed(tls: tuple[Path, ssl.SSLContext]) -> None:
    """For a CA on this machine, by whoever constructs the transport."""
    with serving(always(answer())) as server, closing(Transport(tls[0], allow_http=True)) as transport:
        assert transport.request("GET", server.url).status == 200


# -- who answers ----------------------------------------------------------------------------------------


def test_an_unknown_ca_is_not_trusted(transport: Transport, tmp_path: Path) -> None:
    """The message names the setting that can change it."""
    _, other = make_tls(tmp_path)
    with (
        serving(always(answer()), other) as server,
        pytest.raises(TransportFault, match="set ACME_CA_BUNDLE") as caught,
    ):
        transport.request("GET", server.url)

    assert caught.value.kind == "tls"


@pytest.mark.parametrize(
    ("name", "lifetime", "advice"),
    [
        ("other.test", timedelta(days=1), "check the address"),
        ("127.0.0.1", timedelta(days=-1), "check this machine's clock"),
    ],
)
def test_a_wrong_certificate_is_explained(tmp_path: Path, name: str, lifetime: timedelta, advice: str) -> None:
    """For another name, or expired."""
    trusted, context = make_tls(tmp_path, name, lifetime)
    with (
        serving(always(answer()), context) as server,
        closing(Transport(trusted)) as transport,
        pytest.raises(TransportFault, match=advice) as caught,
    ):
        transport.request("GET", server.url)

    assert caught.value.kind == "tls"


def test_old_tls_is_refused(tls: tuple[Path, ssl.SSLContext]) -> None:
    """1.2 is the least, whatever the machine's own policy says."""
    with closing(Transport(tls[0])) as transport:
        assert transport._tls.minimum_version == ssl.TLSVersion.TLSv1_2
        assert transport._tls.check_hostname


def test_http_where_https_was_meant(transport: Transport) -> None:
    """A port that speaks plain HTTP."""

    def serve(peer: Peer) -> None:
        peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with serving(serve) as server, pytest.raises(TransportFault) as caught:
        transport.request("GET", server.url.replace("http:", "https:"))

    assert caught.value.kind in ("tls", "reset")


@pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_bundle_must_hold_certificates(tmp_path: Path, content: str | None) -> None:
    """A wrong setting is told when it is read, not as a failed request later."""
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_text(content)

    with pytest.raises(SettingsError, match="ACME_CA_BUNDLE"):
        Transport(bundle)


def test_a_closed_port_is_refused(transport: Transport) -> None:
    (port,) = free_ports(1)
    with pytest.raises(TransportFault, match="refused; check address and port") as caught:
        transport.request("GET", f"https://127.0.0.1:{port}/")

    assert caught.value.kind == "connect"


def test_a_process_without_descriptors_says_so(transport: Transport) -> None:
    """It is not the CA, and not the network."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(TransportFault, match=r"may open no more files; raise its limit") as refused:
            transport.request("GET", "https://127.0.0.1:9/")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert refused.value.kind == "connect"


def test_a_name_that_is_none_does_not_resolve(transport: Transport) -> None:
    """Decided by the resolver's own rules, without asking anybody: the label is too long."""
    with pytest.raises(TransportFault, match="does not resolve") as caught:
        transport.request("GET", f"https://{'a' * 70}.invalid/")

    assert caught.value.kind == "dns"


# -- proxies --------------------------------------------------------------------------------------------


def tunnelling(seen: list[bytes]):  # type: ignore[no-untyped-def]
    """Be a proxy that opens tunnels."""

    def serve(peer: Peer) -> None:
        request = peer.read_request()
        seen.append(request)
        host, _, port = request.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port)), 5) as far:
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = Thread(target=copy, args=(far, peer.sock))
            back.start()
            copy(peer.sock, far)
            back.join(5)

    return serve


def copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_proxy_only_sees_ciphertext(tls: tuple[Path, ssl.SSLContext]) -> None:
    """It is asked to CONNECT, with the credentials of its URL, and once for all requests."""
    seen: list[bytes] = []
    with serving(always(answer()), tls[1]) as server, serving(tunnelling(seen)) as proxy:
        environ = {"HTTPS_PROXY": f"http://us%40er:pa%3Ass@127.0.0.1:{proxy.port}"}
        with closing(Transport(tls[0], environ)) as transport:
            for _ in range(2):
                assert transport.request("GET", server.url).status == 200

    credentials = base64.b64encode(b"us@er:pa:ss")
    assert len(seen) == 1
    assert seen[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic " + credentials in seen[0]


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        (once(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"), "answered 407"),
        (once(b"nonsense\r\n"), "broke off"),
        (once(b""), "broke off"),
        (trickle_headers, "broke off"),
    ],
)
def test_a_proxy_that_refuses_is_named(tls: tuple[Path, ssl.SSLContext], serve, said: str) -> None:  # type: ignore[no-untyped-def]
    """As what to check; its password is not."""
    with serving(serve) as proxy:
        environ = {"https_proxy": f"http://user:hunter2@127.0.0.1:{proxy.port}"}
        with (
            closing(Transport(tls[0], environ, time_limit=LIMIT)) as transport,
            pytest.raises(TransportFault) as caught,
        ):
            transport.request("GET", "https://ca.test/")

    assert caught.value.kind == "proxy"
    assert said in str(caught.value)
    assert "check HTTPS_PROXY and NO_PROXY" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_named(tls: tuple[Path, ssl.SSLContext]) -> None:
    (port,) = free_ports(1)
    with (
        closing(Transport(tls[0], {"HTTPS_PROXY": f"127.0.0.1:{port}"})) as transport,
        pytest.raises(TransportFault, match="cannot reach the proxy") as caught,
    ):
        transport.request("GET", "https://ca.test/")

    assert caught.value.kind == "proxy"


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "spared"),
    [
        ("", "a.test", 443, False),
        ("*", "a.test", 443, True),
        ("a.test", "a.test", 443, True),
        ("a.test", "b.a.test", 443, True),
        (".a.test", "b.a.test", 443, True),
        ("*.a.test", "b.a.test", 443, True),
        ("a.test", "ba.test", 443, False),
        ("A.Test", "a.tesT", 443, True),
        ("x, a.test:14000", "a.test", 14000, True),
        ("a.test:14000", "a.test", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("::1", "::1", 443, True),
        ("[::1]:14000", "::1", 14000, True),
        ("fd00::/8", "fd00::1", 443, True),
        ("127.0.0.1", "localhost", 443, False),
        (",,", "a.test", 443, False),
    ],
)
def test_no_proxy_spares(no_proxy: str, host: str, port: int, spared: bool) -> None:
    """As curl and Go read it."""
    proxies = Proxies({"HTTPS_PROXY": "http://proxy.test:3128", "NO_PROXY": no_proxy})

    assert (proxies.find("https", host, port) is None) is spared


@pytest.mark.parametrize("value", ["socks5://proxy.test", "https://proxy.test", "http://", "http://u:hunter2@p.test:x"])
def test_a_proxy_of_another_kind_is_a_wrong_setting(value: str) -> None:
    """Named, and not repeated: it may hold a password."""
    with pytest.raises(SettingsError, match="HTTPS_PROXY: must be") as caught:
        Proxies({"HTTPS_PROXY": value})

    assert "hunter2" not in str(caught.value)


def test_a_proxy_is_for_its_scheme() -> None:
    """HTTP_PROXY says nothing about https, and lower case wins."""
    proxies = Proxies({"http_proxy": "one.test:1", "HTTP_PROXY": "two.test:2"})
    proxy = proxies.find("http", "a.test", 80)

    assert proxies.find("https", "a.test", 443) is None
    assert proxy is not None
    assert (proxy.host, proxy.port, proxy.authorization) == ("one.test", 1, None)
