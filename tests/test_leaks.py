"""No secret where it does not belong: a scan of everything the program leaves or says, with planted canaries.

A secret is looked for in every form it could take: raw, hex, base64, base64url, and in windows of its PEM.
"""

import base64
import sqlite3
import subprocess
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from certworker.ca.client import ExternalAccount
from certworker.cli.pebble import Pebble
from certworker.core.rollout import Cursor
from certworker.errors import SealError
from certworker.settings import load
from certworker.source import DatabaseSource
from certworker.store import accounts, certificates, issuances
from certworker.store.seal import Sealer, read_kek
from certworker.wiring import open_app
from tests.flow.box import Box, until
from tests.flow.conftest import folder as folder

EAB_SECRET = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
_WINDOW = 24


@dataclass(frozen=True)
class Secret:
    """Something that must not be found, in all its forms."""

    name: str
    forms: frozenset[bytes]

    @classmethod
    def of_bytes(cls, name: str, raw: bytes) -> "Secret":
        encoded = [base64.b64encode(raw), base64.urlsafe_b64encode(raw), raw.hex().encode(), raw.hex().upper().encode()]
        return cls(name, frozenset({raw, *(form.rstrip(b"=") for form in encoded)}))

    @classmethod
    def of_key(cls, name: str, pem: str) -> "Secret":
        key = load_pem_private_key(pem.encode(), None)
        assert isinstance(key, EllipticCurvePrivateKey)
        scalar = key.private_numbers().private_value.to_bytes(32, "big")
        # The windows that overlap the scalar: the rest of the DER is the same in every key, or public.
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        at = der.index(scalar)
        text = base64.b64encode(der).decode()
        first, last = at * 4 // 3 + 1, (at + 32) * 4 // 3 - _WINDOW
        windows = {text[start : start + _WINDOW].encode() for start in range(first, last)}
        return cls(name, cls.of_bytes(name, scalar).forms | windows)

    def is_in(self, content: bytes) -> bool:
        # PEM breaks its lines.
        joined = content.replace(b"\n", b"").replace(b"\\n", b"")
        return any(form in content or form in joined for form in self.forms)


@dataclass
class Scene:
    """A box in which everything happened once, and the secrets it held."""

    box: Box
    secrets: list[Secret]
    heartbeat_files: Path

    def found_in(self, content: bytes) -> list[str]:
        return [secret.name for secret in self.secrets if secret.is_in(content)]


@pytest.fixture
def scene(folder: Path, start_pebble: Callable[..., Pebble]) -> Iterator[Scene]:
    """Issue, renew, fail, restart and ask for everything, at log level debug."""
    ca = start_pebble(eab={"kid-1": EAB_SECRET}, blocklist=("blocked.leak.test",))
    box = Box.make(folder, ca, ACME_EAB_KID="kid-1", ACME_EAB_HMAC_KEY=EAB_SECRET, LOG_LEVEL="debug")
    box.configure("a.leak.test", "b.leak.test", "blocked.leak.test")
    with box.upstream(), box.service() as process:
        until(lambda: box.served("a.leak.test") and box.served("b.leak.test"))
        box.run("renew", "a.leak.test", "--force")
        box.run("renew", "blocked.leak.test", expect=1)
        for path in ("/metrics", "/readyz", "/healthz", "/nothing"):
            box.api(path)
        for command in (["status"], ["status", "--json"], ["policy", "list", "--json"], ["config", "export"]):
            box.run(*command)
        box.outputs.append(Path(f"/proc/{process.pid}/cmdline").read_text())
    app = open_app(load({k: v for k, v in box.environ.items() if k.startswith("CERTWORKER_")}))
    yield Scene(box, list(_secrets_of(box)), folder / "data")
    app.close()


def _secrets_of(box: Box) -> Iterator[Secret]:
    kek = read_kek(box.folder / "data" / "kek")
    sealer = Sealer(kek)
    yield Secret.of_bytes("key-encryption key", kek)
    yield Secret("EAB secret", frozenset({EAB_SECRET.encode(), base64.urlsafe_b64decode(EAB_SECRET + "==")}))
    app = open_app(load({k: v for k, v in box.environ.items() if k.startswith("CERTWORKER_")}))
    account = app.db.read(lambda tx: accounts.find_default(tx, app.settings.acme_directory_url))
    assert account is not None
    yield Secret.of_key("account key", account.open(account.key, sealer))
    db = sqlite3.connect(box.folder / "data" / "certworker.db")
    for table in ("certificates", "issuances"):
        for row_id, sealed in db.execute(f"SELECT id, key_pem FROM {table} WHERE key_pem IS NOT NULL"):
            pem = sealer.open(sealed, table=table, column="key_pem", row_id=row_id)
            yield Secret.of_key(f"{table} {row_id}", pem)
    db.close()
    app.close()


@pytest.mark.pebble
@pytest.mark.proxy
def test_nothing_leaks(scene: Scene) -> None:
    """Outputs, logs, API, process arguments, database, snapshots, every file but the proxy's own pairs and the KEK."""
    assert len(scene.secrets) >= 6

    said = "\n".join(scene.box.outputs).encode()
    assert scene.found_in(said) == []
    assert b"PRIVATE KEY" not in said
    data = scene.box.folder / "data"
    dump = "\n".join(sqlite3.connect(data / "certworker.db").iterdump()).encode()
    assert scene.found_in(dump) == []
    assert b"PRIVATE KEY" not in dump
    pairs = set((data / "node" / "certs").iterdir())
    for path in (path for path in data.rglob("*") if path.is_file() and path not in pairs and path.name != "kek"):
        assert scene.found_in(path.read_bytes()) == [], path
    assert {path.stat().st_mode & 0o777 for path in pairs} == {0o600}

    # Positive control: the scan sees a key where one is, and in what it was read from.
    assert any(scene.found_in(path.read_bytes()) for path in pairs)
    for secret in scene.secrets:
        form = max(secret.forms, key=len)
        assert secret.is_in(b"noise " + form + b" noise")
        assert scene.found_in(said + form) != []


@pytest.mark.pebble
@pytest.mark.proxy
def test_reprs_and_exceptions_show_no_key(scene: Scene) -> None:
    """What a log line or a traceback would print of the values that hold keys."""
    app = open_app(load({k: v for k, v in scene.box.environ.items() if k.startswith("CERTWORKER_")}))
    lineages = [row["id"] for row in scene.box.json("status")["lineages"] if row["serial"]]
    certificate = app.db.read(lambda tx: certificates.find_of_lineage(tx, lineages[0]))
    changes = DatabaseSource(app).changes_after(Cursor())
    assert certificate is not None
    shown = [
        app, app.settings, app.sealer, changes, certificate,
        app.db.read(lambda tx: issuances.history(tx, lineages[0])),
        app.db.read(lambda tx: accounts.find_default(tx, app.settings.acme_directory_url)),
        ExternalAccount("kid-1", EAB_SECRET),
    ]  # fmt: skip
    text = "\n".join(f"{value!r} {value!s}" for value in shown)
    try:
        app.sealer.open(certificate.key_pem, table="certificates", column="key_pem", row_id="elsewhere")
    except SealError as error:
        text += "".join(traceback.format_exception(error))
    app.close()

    assert len(changes.changed) >= 2
    assert scene.found_in(text.encode()) == []
    assert scene.found_in(changes.changed[0].key_pem.encode()) != []


@pytest.mark.pebble
@pytest.mark.proxy
def test_seal_off_stores_plain_pem(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """SEAL=off is for gateways that read the column: then the scan finds the key in the database (control)."""
    ca = start_pebble()
    box = Box.make(folder, ca, SEAL="off")
    box.configure("plain.leak.test")
    box.run("renew")
    db = sqlite3.connect(folder / "data" / "certworker.db")
    ((key_pem,),) = db.execute("SELECT key_pem FROM certificates").fetchall()
    dump = "\n".join(db.iterdump()).encode()
    db.close()

    assert key_pem.startswith("-----BEGIN PRIVATE KEY-----")
    assert Secret.of_key("certificate", key_pem).is_in(dump)
    assert not (folder / "data" / "kek").exists()
    checked = subprocess.run(["openssl", "pkey", "-noout"], input=key_pem, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
