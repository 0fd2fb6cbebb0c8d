"""Private keys and secrets at rest: an AES-256-GCM envelope bound to table, column and row.

    cw1.<base64url( kek_id 8 | nonce 12 | wrapped data key 48 | nonce 12 | ciphertext and tag )>

Each value has a data key of its own, so no nonce is ever used twice with a key that matters; the
key-encryption key (KEK) wraps data keys only. The additional data is `cw1|table|column|row id` for
both layers: a ciphertext copied to another row does not open there. Values without the prefix are
plain PEM that another program wrote; they are read as they are.
"""

import base64
import hashlib
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from certworker.errors import SealError

PREFIX = "cw1."
_KEY = 32
_NONCE = 12
_TAG = 16
_ID = 8


class Sealer:
    """Seals and opens values; `kek` None opens plain values only, `sealing` False writes plain ones."""

    def __init__(self, kek: bytes | None, *, sealing: bool = True) -> None:
        if sealing and kek is None:
            raise SealError("sealing needs a key-encryption key: run `certworker init`, or set CERTWORKER_SEAL=off")
        self._kek = kek
        self._kek_id = hashlib.sha256(b"certworker kek id" + (kek or b"")).digest()[:_ID]
        self.sealing = sealing

    def __repr__(self) -> str:
        return f"Sealer(sealing={self.sealing})"

    def seal(self, plain: str, *, table: str, column: str, row_id: str) -> str:
        """Return `plain` sealed for one place, or as it is when sealing is off."""
        if not self.sealing or self._kek is None:
            return plain
        bound = _bound(table, column, row_id)
        data_key, outer, inner = secrets.token_bytes(_KEY), secrets.token_bytes(_NONCE), secrets.token_bytes(_NONCE)
        wrapped = AESGCM(self._kek).encrypt(outer, data_key, bound)
        sealed = AESGCM(data_key).encrypt(inner, plain.encode(), bound)
        return PREFIX + base64.urlsafe_b64encode(self._kek_id + outer + wrapped + inner + sealed).decode()

    def open(self, text: str, *, table: str, column: str, row_id: str) -> str:
        """Return the plain value; SealError when it was sealed for another place or key, or changed."""
        if not text.startswith(PREFIX):
            return text
        where = f"{table}.{column} of row {row_id}"
        if self._kek is None:
            raise SealError(f"{where} is sealed, but there is no key-encryption key: set CERTWORKER_KEK_FILE")
        try:
            return self._open(_decode(text[len(PREFIX) :]), _bound(table, column, row_id))
        except _OtherKey:
            raise SealError(f"{where} was sealed with another key-encryption key: check CERTWORKER_KEK_FILE") from None
        except (InvalidTag, ValueError):
            raise SealError(f"{where} cannot be opened: it was changed, or copied from another row") from None

    def _open(self, blob: bytes, bound: bytes) -> str:
        assert self._kek is not None
        kek_id, rest = blob[:_ID], blob[_ID:]
        if kek_id != self._kek_id:
            raise _OtherKey
        outer, rest = rest[:_NONCE], rest[_NONCE:]
        wrapped, rest = rest[: _KEY + _TAG], rest[_KEY + _TAG :]
        data_key = AESGCM(self._kek).decrypt(outer, wrapped, bound)
        return AESGCM(data_key).decrypt(rest[:_NONCE], rest[_NONCE:], bound).decode()


class _OtherKey(Exception):
    pass


def is_sealed(text: str) -> bool:
    """Say whether `text` is one of ours; plain PEM is not."""
    return text.startswith(PREFIX)


def make_kek(path: Path) -> bool:
    """Write a new key-encryption key, mode 0600, unless one is there; say whether it was written.

    It appears whole or not at all. SealError when it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        _write_key(unfinished)
        try:
            os.link(unfinished, path)  # unlike a rename, never in the place of a key that is there
        except FileExistsError:
            return False
        finally:
            unfinished.unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise SealError(f"cannot write the key-encryption key {path}: {error.strerror}") from None
    return True


def _write_key(path: Path) -> None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(base64.b64encode(secrets.token_bytes(_KEY)) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_kek(path: Path) -> bytes:
    """Return the key-encryption key; SealError when it is missing, readable by others or no key."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise SealError(
            f"cannot read the key-encryption key {path}: {error.strerror}; "
            "run `certworker init` on a new system, restore the file from your backup on an old one"
        ) from None
    if stat.S_IMODE(mode) & 0o077:
        raise SealError(f"the key-encryption key {path} can be read by others: run `chmod 600 {path}`")
    try:
        kek = base64.b64decode(content.strip(), validate=True)
    except ValueError:
        kek = b""
    if len(kek) != _KEY:
        raise SealError(f"the key-encryption key {path} is damaged: it must hold 32 bytes in base64")
    return kek


def _decode(text: str) -> bytes:
    """Read base64url in its one right spelling: Python's own reader skips what it does not know."""
    decoded = base64.urlsafe_b64decode(text)
    if base64.urlsafe_b64encode(decoded) != text.encode():
        raise ValueError("not base64url")
    return decoded


def _bound(table: str, column: str, row_id: str) -> bytes:
    return f"cw1|{table}|{column}|{row_id}".encode()
