"""A fake CA and a client of it for every test of this room; real Pebbles where a test asks for one."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from certworker.ca.client import Account, Client
from certworker.ca.keys import AccountKey

from .fake import FakeCa

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def key() -> AccountKey:
    return AccountKey.generate()


@pytest.fixture
def ca(key: AccountKey) -> FakeCa:
    """A CA for whose challenges the right answer is always there."""
    return FakeCa(lambda: NOW, validate=lambda token, _: key.key_authorization(token))


@pytest.fixture
def client(ca: FakeCa) -> Client:
    return Client(ca.directory_url, ca.http, ca.now)


@pytest.fixture
def account(client: Client, key: AccountKey) -> Account:
    return client.new_account(key, (), terms_agreed=True, eab=None)


@pytest.fixture
def respond() -> Iterator[Callable[[int, AccountKey], None]]:
    """Answer every HTTP-01 challenge on a port for an account, as the stateless strategy does."""
    servers: list[ThreadingHTTPServer] = []

    def start(port: int, key: AccountKey) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = key.key_authorization(self.path.rpartition("/")[2]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
