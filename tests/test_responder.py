"""The HTTP-01 responder: exactly the live tokens, whatever else is asked."""

import http.client
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import pytest
from acme import challenges, client, crypto_util, messages
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from josepy.jwa import ES256
from josepy.jwk import JWKEC

from certworker.cli.pebble import Pebble
from certworker.errors import CertworkerError
from certworker.responder import Limits, Responder, read_token

TOKEN = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA"
KEY_AUTHORIZATION = f"{TOKEN}.9jg46WB3rR_AHD-EBXdN7cBkH1WOu0tA3M9fm21mqTI"
PATH = f"/.well-known/acme-challenge/{TOKEN}"
IMPATIENT = Limits(head=timedelta(seconds=0.2), idle=timedelta(seconds=0.4), lookup=timedelta(seconds=0.3))


def find_live(token: str) -> str | None:
    return KEY_AUTHORIZATION if token == TOKEN else None


Start = Callable[..., Responder]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Responder] = []

    def start(
        find: Callable[[str], str | None] = find_live,
        on_fetch: Callable[[str], object] = len,
        limits: Limits = IMPATIENT,
    ) -> Responder:
        responder = Responder("127.0.0.1", 0, find, on_fetch, limits)
        responder.start()
        started.append(responder)
        return responder

    yield start
    for responder in started:
        responder.stop()


def talk(responder: Responder, parts: Iterable[bytes]) -> bytes:
    """Send raw bytes and return everything that comes until the responder closes."""
    with socket.create_connection(responder.address, timeout=5) as client:
        for part in parts:
            client.sendall(part)
        received = b""
        while piece := client.recv(65536):
            received += piece
        return received


def request(path: str, method: str = "GET", fields: str = "Host: app.test\r\nConnection: close\r\n") -> bytes:
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode("latin-1")


def drip(data: bytes) -> Iterator[bytes]:
    for byte in data:
        time.sleep(0.02)
        yield bytes([byte])


def get(responder: Responder, path: str = PATH, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*responder.address, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_live_token_is_answered(start: Start) -> None:
    """The body is the key authorization and nothing else; no cache keeps it."""
    responder = start()

    head, body = talk(responder, [request(PATH)]).split(b"\r\n\r\n")

    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert body == KEY_AUTHORIZATION.encode()
    for line in (b"Content-Type: text/plain", b"Cache-Control: no-store", b"X-Content-Type-Options: nosniff"):
        assert line in lines
    assert any(re.fullmatch(rb"Date: \w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", line) for line in lines)
    assert responder.counters.answered == 1


def test_head_has_no_body(start: Start) -> None:
    """HEAD says what GET would, its length included."""
    head, body = talk(start(), [request(PATH, "HEAD")]).split(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 ")
    assert f"Content-Length: {len(KEY_AUTHORIZATION)}".encode() in head
    assert body == b""


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/healthz",
        "/.well-known/acme-challenge/",
        "/.well-known/acme-challenge",
        f"{PATH}/",
        f"{PATH}?",
        f"{PATH}?x=1",
        f"{PATH}#x",
        f"/{PATH}",
        PATH.replace("acme-challenge/", "acme-challenge//"),
        PATH.replace("acme-challenge/", "acme-challenge/../acme-challenge/"),
        PATH.replace("acme-challenge/", "acme-challenge/./"),
        PATH.replace("acme-challenge/", "acme-challenge%2f"),
        PATH.replace("acme-challenge/", "acme-challenge/..%2f..%2fetc%2fpasswd"),
        PATH.replace(TOKEN, f"%65{TOKEN[1:]}"),
        PATH.upper(),
        f"http://app.test{PATH}",
        "/.well-known/acme-challenge/" + "A" * 21,
        "/.well-known/acme-challenge/" + "A" * 43,
        "/.well-known/acme-challenge/" + "A" * 129,
        "/.well-known/acme-challenge/" + "A" * 7000,
        f"{PATH}.",
        f"{PATH}=",
        "*",
    ],
)
def test_anything_else_is_unknown(start: Start, path: str) -> None:
    """One constant answer, which tells nothing about what was asked."""
    responder = start()

    head, body = talk(responder, [request(path)]).split(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert body == b"not found\n"
    assert responder.counters.unknown == 1


@pytest.mark.parametrize(
    ("hostile", "status"),
    [
        pytest.param(f"GET {PATH}\r\n".encode(), 400, id="HTTP/0.9"),
        pytest.param(request(PATH).replace(b"HTTP/1.1", b"HTTP/2.0"), 400, id="HTTP/2"),
        pytest.param(request(PATH).replace(b"HTTP/1.1", b"http/1.1"), 400, id="lower-case version"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400, id="TLS hello"),
        pytest.param(request(PATH + "\0"), 400, id="NUL in path"),
        pytest.param(request(PATH + "\xff"), 400, id="raw byte in path"),
        pytest.param(request(PATH + " x"), 400, id="space in path"),
        pytest.param(request(PATH).replace(b" /", b"  /"), 400, id="two spaces"),
        pytest.param(request(PATH).replace(b"\r\n", b"\n"), 400, id="bare line feeds"),
        pytest.param(b"\r\n" + request(PATH), 400, id="leading empty line"),
        pytest.param(request(PATH, fields=""), 400, id="no Host"),
        pytest.param(request(PATH, fields="Host: a\r\nHost: b\r\n"), 400, id="two Hosts"),
        pytest.param(request(PATH, fields="Host: a\r\nno colon here\r\n"), 400, id="no colon"),
        pytest.param(request(PATH, fields="Host: a\r\nX : y\r\n"), 400, id="space before colon"),
        pytest.param(request(PATH, fields="Host: a\r\n folded\r\n"), 400, id="folded line"),
        pytest.param(request(PATH, fields="Host: a\r\nX: a\0b\r\n"), 400, id="NUL in a field"),
        pytest.param(request(PATH, fields="Host: a\r\nX: a\rb\r\n"), 400, id="CR in a field"),
        pytest.param(
            request(PATH, fields="Host: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n"), 400, id="two lengths"
        ),
        pytest.param(request(PATH, fields="Host: a\r\nContent-Length: 4\r\n") + b"body", 400, id="body"),
        pytest.param(
            request(PATH, fields="Host: a\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 400, id="chunked"
        ),
        pytest.param(request(PATH, "POST", "Host: a\r\nContent-Length: 4\r\n") + b"body", 405, id="POST"),
        pytest.param(request(PATH, "get"), 405, id="lower-case method"),
        pytest.param(request(PATH, "OPTIONS"), 405, id="OPTIONS"),
        pytest.param(request("/" + "A" * 10_000), 431, id="10 kB path"),
        pytest.param(request(PATH, fields="Host: a\r\n" + "X: y\r\n" * 2000), 431, id="2000 fields"),
        pytest.param(request(PATH, fields="Host: a\r\nX: " + "y" * 10_000 + "\r\n"), 431, id="10 kB field"),
    ],
)
def test_broken_requests_end_the_connection(start: Start, hostile: bytes, status: int) -> None:
    """The request that was smuggled in behind is never answered, and the server lives on."""
    responder = start()

    answer = talk(responder, [hostile + request(PATH)])

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.count(b"HTTP/1.1") == 1
    assert b"Connection: close" in answer
    assert KEY_AUTHORIZATION.encode() not in answer
    assert (status == 405) == (b"Allow: GET, HEAD\r\n" in answer)
    assert responder.counters.refused == 1
    assert get(responder) == (200, KEY_AUTHORIZATION.encode())


def test_http_1_0_is_answered_and_closed(start: Start) -> None:
    """As a health check of an old proxy asks."""
    answer = talk(start(), [request(PATH, fields="Host: app.test\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")])

    assert answer.endswith(KEY_AUTHORIZATION.encode())
    assert b"Connection: close" in answer


def test_one_connection_serves_many(start: Start) -> None:
    """Two requests after one another, on a connection that stays."""
    connection = http.client.HTTPConnection(*start().address, timeout=5)
    for path, status in ((PATH, 200), ("/nothing", 404), (PATH, 200)):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.close()


def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    """A HEAD among them, and a slow lookup first."""

    def find_slowly(token: str) -> str | None:
        time.sleep(0.05)
        return find_live(token)

    kept = "Host: app.test\r\n"
    pipeline = request(PATH, "HEAD", kept) + request(PATH + "x", "GET", kept) + request(PATH)

    answer = talk(start(find_slowly), [pipeline])

    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200"]
    assert answer.count(KEY_AUTHORIZATION.encode()) == 1


def test_what_comes_meanwhile_waits_its_turn(start: Start) -> None:
    """A request that needs a lookup is behind one that does not, and more arrive while it is under way."""
    responder = start(lambda token: time.sleep(0.05) or find_live(token))
    assert get(responder)[0] == 200
    kept = "Host: app.test\r\n"
    first = request(PATH, "GET", kept) + request(PATH + "x", "GET", kept) + request(PATH, "GET", kept)

    answer = talk(responder, [first, request("/nothing", "GET", kept), request(PATH)])

    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200", b"404", b"200"]


def test_slow_heads_are_cut(start: Start) -> None:
    """A byte now and then does not win time; nothing is answered."""
    responder = start()

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        talk(responder, drip(request(PATH)))

    assert responder.counters.refused == 1


def test_idle_connections_are_closed_quietly(start: Start) -> None:
    """That is no fault of the client's."""
    responder = start()

    assert talk(responder, []) == b""
    assert responder.counters.refused == 0


def test_a_busy_connection_is_not_idle(start: Start) -> None:
    """Its time begins anew with each answer, also after a lookup, a slow head, or several requests at once."""
    responder = start()
    kept = "Host: app.test\r\n"
    with socket.create_connection(responder.address, timeout=5) as client:
        for sent in (request(PATH, fields=kept), request(PATH, fields=kept) * 2, request(PATH + "x", fields=kept)):
            client.sendall(sent[:-1])
            time.sleep(0.1)
            client.sendall(sent[-1:])
            time.sleep(0.1)
            assert client.recv(65536).startswith(b"HTTP/1.1 ")

        assert client.recv(65536) == b""
    assert responder.counters.refused == 0


def test_a_client_that_does_not_read_is_left(start: Start) -> None:
    """A thousand requests at once, and none of the answers taken: others are served, and it is closed."""
    responder = start()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(responder.address)
        deaf.settimeout(0.5)
        with suppress(OSError):
            deaf.sendall(request(PATH, fields="Host: app.test\r\n") * 100_000)

        assert get(responder) == (200, KEY_AUTHORIZATION.encode())
        await_true(lambda: not responder._conversations)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\n", b"GET /\r\n", b"\r\n", b"\x16\x03\x01\n"])
def test_what_cannot_become_a_request_is_told_at_once(start: Start, data: bytes) -> None:
    """Not when its time is over."""
    responder = start(limits=replace(IMPATIENT, head=timedelta(seconds=60)))

    with socket.create_connection(responder.address, timeout=5) as client:
        client.sendall(data)

        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_connections_are_bounded(start: Start) -> None:
    """The one too many is told to come back; there is room again when one leaves."""
    responder = start(limits=replace(IMPATIENT, connections=2, idle=timedelta(seconds=5)))
    held = [socket.create_connection(responder.address, timeout=5) for _ in range(2)]

    assert talk(responder, []).startswith(b"HTTP/1.1 503 ")
    held.pop().close()
    await_true(lambda: get(responder)[0] == 200)
    held.pop().close()


def test_without_a_descriptor_clients_wait(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said and nothing runs hot while the process may open no more files; then they are answered."""
    responder = start()
    with socket.socket() as client, no_more_files():
        client.connect(responder.address)
        client.sendall(request(PATH))
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        used = time.process_time()
        with pytest.raises(TimeoutError):
            client.recv(1)
        used = time.process_time() - used
    with socket.create_connection(responder.address, timeout=5) as later:
        later.sendall(request(PATH))
        assert later.recv(65536).startswith(b"HTTP/1.1 200 ")

    assert used < 0.1
    assert caplog.records == []


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no file, pipe or socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_200_at_once_are_one_lookup(start: Start) -> None:
    """Fetches of one token share a lookup, and a live answer is remembered."""
    asked: list[str] = []

    def find(token: str) -> str | None:
        asked.append(token)
        time.sleep(0.05)
        return find_live(token)

    responder = start(find)
    with ThreadPoolExecutor(200) as crowd:
        answers = list(crowd.map(lambda _: get(responder), range(200)))

    assert answers == [(200, KEY_AUTHORIZATION.encode())] * 200
    assert asked == [TOKEN]


def test_live_answers_are_forgotten_soon(start: Start) -> None:
    """A token that was withdrawn is answered for `remember` at most, and an unknown one is asked each time."""
    live = {TOKEN: KEY_AUTHORIZATION}
    responder = start(live.get, limits=replace(IMPATIENT, remember=timedelta(seconds=0.2)))
    assert get(responder, PATH + "x")[0] == 404
    live[TOKEN + "x"] = "at once"
    assert get(responder, PATH + "x") == (200, b"at once")

    live.clear()

    await_true(lambda: get(responder, PATH + "x")[0] == 404)


def test_flood_of_unknown_tokens_is_bounded(start: Start) -> None:
    """The database is asked no more often than the limit says; the rest is 503."""
    asked: list[str] = []
    responder = start(asked.append, limits=replace(IMPATIENT, lookups_per_second=10))

    statuses = [get(responder, PATH + f"{n:04}")[0] for n in range(100)]

    assert statuses[:10] == [404] * 10
    assert 503 in statuses
    assert len(asked) == statuses.count(404) < 50


@pytest.mark.parametrize("waiting", [1, 64])
def test_lookups_that_hang_are_503(start: Start, waiting: int) -> None:
    """A database that does not answer costs a client the lookup's limit, and others too if the queue is full."""
    release = threading.Event()

    def find(token: str) -> str | None:
        release.wait(5)
        return None

    responder = start(find, limits=replace(IMPATIENT, lookups_waiting=waiting))

    answers = [talk(responder, [request(PATH + str(n))]) for n in range(2)]

    release.set()
    assert [answer[:13] for answer in answers] == [b"HTTP/1.1 503 "] * 2
    assert all(b"Retry-After: 1\r\n" in answer for answer in answers)


def test_lookup_that_raises_is_503(start: Start) -> None:
    """The next one is answered."""
    working = threading.Event()

    def find(token: str) -> str | None:
        if not working.is_set():
            raise ConnectionError("the database is away")
        return find_live(token)

    responder = start(find)

    assert get(responder)[0] == 503
    assert responder.counters.failed == 1
    working.set()
    assert get(responder)[0] == 200


def test_fetches_are_told(start: Start) -> None:
    """GET of a live token only, each one; one that raises holds up nobody."""
    told: list[str] = []

    def on_fetch(token: str) -> None:
        told.append(token)
        raise RuntimeError("nobody listens")

    responder = start(on_fetch=on_fetch)
    get(responder, method="HEAD")
    get(responder, PATH + "x")
    assert told == []
    for _ in range(4):
        assert get(responder)[0] == 200

    await_true(lambda: told == [TOKEN] * 4)


def test_stop_frees_the_port(start: Start) -> None:
    """Even with a client connected; starting there again works."""
    responder = start()
    host, port = responder.address
    with socket.create_connection((host, port), timeout=5) as client:
        client.sendall(request("/", fields="Host: app.test\r\n"))
        assert client.recv(65536)
        responder.stop()
        responder.stop()
        assert client.recv(65536) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=5)

    with Responder(host, port, find_live, len) as again:
        assert get(again)[0] == 200


def test_taken_port_is_a_clear_error(start: Start) -> None:
    """It names the address and what to do."""
    host, port = start().address

    with pytest.raises(CertworkerError, match=rf"{host}:{port}: Address already in use; .*RESPONDER_LISTEN"):
        Responder(host, port, find_live, len).start()


def test_listens_on_ipv6() -> None:
    """An address of either family will do."""
    with Responder("::1", 0, find_live, len) as responder:
        assert responder.address[0] == "::1"
        assert get(responder)[0] == 200


@given(
    target=st.one_of(
        st.binary(max_size=300), st.text("/.well-known/acme-challenge%2f?#AZ09_-", max_size=200).map(str.encode)
    )
)
def test_no_other_target_has_a_token(target: bytes) -> None:
    """What is not exactly the path of a token is none."""
    expected = re.fullmatch(rb"/\.well-known/acme-challenge/[A-Za-z0-9_-]{22,128}", target)

    assert (read_token(target) is None) == (expected is None)


@given(token=st.text("ABCZabcz0189-_", min_size=1, max_size=140))
def test_tokens_are_read_back(token: str) -> None:
    """Of the base64url alphabet, 22 to 128 characters."""
    read = read_token(b"/.well-known/acme-challenge/" + token.encode())

    assert read == (token if 22 <= len(token) <= 128 else None)


@pytest.mark.pebble
def test_pebble_is_convinced(
    start: Start, start_pebble: Callable[..., Pebble], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client of RFC 8555 gets its certificate by our answer, and the CA's ledger has it."""
    live: dict[str, str] = {}
    responder = start(live.get, limits=Limits())
    ca = start_pebble(http_port=responder.address[1], nonce_reject=0)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca.ca_bundle))
    account_key = JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
    network = client.ClientNetwork(account_key, alg=ES256)
    acme = client.ClientV2(client.ClientV2.get_directory(ca.directory_url, network), network)
    acme.new_account(messages.NewRegistration(terms_of_service_agreed=True))
    csr_pem = crypto_util.make_csr(new_key_pem(), ["app.test"])

    order = acme.new_order(csr_pem)
    body = next(c for c in order.authorizations[0].body.challenges if isinstance(c.chall, challenges.HTTP01))
    live[body.chall.encode("token")] = body.chall.key_authorization(account_key)
    acme.answer_challenge(body, body.chall.response(account_key))
    finished = acme.poll_and_finalize(order)

    (issued,) = ca.ledger()
    leaf = x509.load_pem_x509_certificate(finished.fullchain_pem.encode())
    assert int(issued.serial, 16) == leaf.serial_number
    assert responder.counters.answered >= 1
    assert ca.requests()["POST", "/order-plz"] == 1


def new_key_pem() -> bytes:
    encoding, form, sealed = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(encoding, form, sealed)


def await_true(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
