"""The limit: the least that issues certificates. No database, no retries, no errors but the first; asyncio on uvloop.

`python minimal.py DIRECTORY CA_FILE HTTP_PORT FOLDER IN_FLIGHT` with the names on stdin leaves NAME.crt and NAME.key.
It speaks HTTP/1.1 by itself and signs with `cryptography`: seven requests a certificate, which is what RFC 8555 asks.
"""

import asyncio
import base64
import collections
import hashlib
import json
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

FETCHES = 3
"""Pebble fetches a token so often; then the order is asked for."""
NO_FETCH = 5.0
FIRST_PAUSE = 0.005
SHA256 = ec.ECDSA(hashes.SHA256())


def b64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


class Signer:
    """An account's key."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        point = self.key.public_key().public_numbers()
        self.jwk = {"crv": "P-256", "kty": "EC", "x": b64(point.x.to_bytes(32)), "y": b64(point.y.to_bytes(32))}
        self.thumbprint = b64(hashlib.sha256(json.dumps(self.jwk, separators=(",", ":")).encode()).digest())
        self.kid = ""

    def sign(self, url: str, payload: bytes, nonce: str) -> bytes:
        who = {"kid": self.kid} if self.kid else {"jwk": self.jwk}
        protected, body = b64(json.dumps({"alg": "ES256", "nonce": nonce, "url": url, **who}).encode()), b64(payload)
        r, s = decode_dss_signature(self.key.sign(f"{protected}.{body}".encode(), SHA256))
        signature = b64(r.to_bytes(32) + s.to_bytes(32))
        return f'{{"protected":"{protected}","payload":"{body}","signature":"{signature}"}}'.encode()


class Fetches:
    """Counts the CA's fetches of each token and wakes who waits for the last."""

    def __init__(self) -> None:
        self.seen: collections.Counter[str] = collections.Counter()
        self.waiting: dict[str, asyncio.Event] = {}

    def note(self, token: str) -> None:
        self.seen[token] += 1
        if self.seen[token] >= FETCHES and token in self.waiting:
            self.waiting.pop(token).set()

    async def all_of(self, token: str) -> None:
        if self.seen[token] < FETCHES:
            event = self.waiting[token] = asyncio.Event()
            async with asyncio.timeout(NO_FETCH):
                await event.wait()


class Answer(asyncio.Protocol):
    """Answers HTTP-01 for any token."""

    def __init__(self, thumbprint: str, fetches: Fetches) -> None:
        self.thumbprint, self.fetches = thumbprint, fetches

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        token = data.split(b" ", 2)[1].rsplit(b"/", 1)[1].decode()
        body = f"{token}.{self.thumbprint}"
        head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write((head + body).encode())
        self.transport.close()
        self.fetches.note(token)


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self) -> None:
        self.buffer = b""
        self.answer: asyncio.Future = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(error or ConnectionError("closed"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.split(b"\r\n")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(b":") for line in lines[1:])}
        if headers.get(b"transfer-encoding") == b"chunked":
            body = unchunk(rest)
        else:
            length = int(headers.get(b"content-length", 0))
            body = rest[:length] if len(rest) >= length else None
        if body is not None:  # the server says nothing unasked, so nothing follows
            self.buffer = b""
            self.answer.set_result((int(lines[0][9:12]), headers, body))

    async def ask(self, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


def unchunk(rest: bytes) -> bytes | None:
    """Return the whole body, None while something is missing."""
    body = b""
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found or len(rest) < int(size, 16) + 2:
            return None
        if int(size, 16) == 0:
            return body
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


class Client:
    """One CA, one account, one store of nonces for all tasks."""

    def __init__(self, directory_url: str, ca_file: str) -> None:
        self.trust = ssl.create_default_context(cafile=ca_file)
        self.url = urlsplit(directory_url)
        self.signer = Signer()
        self.nonces: collections.deque[str] = collections.deque()

    async def connect(self) -> Connection:
        loop, host = asyncio.get_running_loop(), self.url.hostname
        _, connection = await loop.create_connection(Connection, host, self.url.port, ssl=self.trust)
        return connection

    async def start(self, connection: Connection) -> None:
        _, _, body = await connection.ask(self.request("GET", self.url.geturl()))
        self.urls = json.loads(body)
        kid, _ = await self.post(connection, self.urls["newAccount"], b'{"termsOfServiceAgreed":true}')
        self.signer.kid = kid

    def request(self, method: str, url: str, body: bytes = b"") -> bytes:
        head = f"{method} {urlsplit(url).path} HTTP/1.1\r\nHost: {self.url.netloc}\r\nUser-Agent: minimal\r\n"
        if body:
            head += f"Content-Type: application/jose+json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode() + body

    async def post(self, connection: Connection, url: str, payload: bytes = b"") -> tuple[str, bytes]:
        """Return the Location and the body of the answer."""
        if not self.nonces:
            _, headers, _ = await connection.ask(self.request("GET", self.urls["newNonce"]))
            self.nonces.append(headers[b"replay-nonce"].decode())
        signed = self.signer.sign(url, payload, self.nonces.popleft())
        status, headers, body = await connection.ask(self.request("POST", url, signed))
        self.nonces.append(headers[b"replay-nonce"].decode())
        if status >= 400:
            raise RuntimeError(body)
        return headers.get(b"location", b"").decode(), body

    async def order_past(self, connection: Connection, url: str, *waiting: str) -> dict:
        pause = FIRST_PAUSE
        while True:
            order = json.loads((await self.post(connection, url))[1])
            if order["status"] not in waiting:
                return order
            await asyncio.sleep(pause)
            pause *= 1.5


async def issue(client: Client, connection: Connection, name: str, fetches: Fetches, folder: Path) -> None:
    wanted = json.dumps({"identifiers": [{"type": "dns", "value": name}]}).encode()
    order_url, body = await client.post(connection, client.urls["newOrder"], wanted)
    for authorization_url in json.loads(body)["authorizations"]:
        authorization = json.loads((await client.post(connection, authorization_url))[1])
        if authorization["status"] == "pending":
            challenge = next(one for one in authorization["challenges"] if one["type"] == "http-01")
            await client.post(connection, challenge["url"], b"{}")
            await fetches.all_of(challenge["token"])
    key, csr_der = make_csr(name)
    order = await client.order_past(connection, order_url, "pending")
    await client.post(connection, order["finalize"], json.dumps({"csr": b64(csr_der)}).encode())
    order = await client.order_past(connection, order_url, "processing")
    _, chain = await client.post(connection, order["certificate"])
    folder.joinpath(f"{name}.key").write_bytes(key)
    folder.joinpath(f"{name}.crt").write_bytes(chain)


def make_csr(name: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    csr_der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), csr_der


async def main(directory_url: str, ca_file: str, http_port: str, folder: str, in_flight: str) -> None:
    names, fetches = collections.deque(sys.stdin.read().split()), Fetches()
    client = Client(directory_url, ca_file)
    first = await client.connect()
    await client.start(first)
    thumbprint = client.signer.thumbprint
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Answer(thumbprint, fetches), "127.0.0.1", int(http_port), backlog=512)

    async def work() -> None:
        connection = await client.connect()
        while names:
            await issue(client, connection, names.popleft(), fetches, Path(folder))

    await asyncio.gather(*(work() for _ in range(int(in_flight))))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
