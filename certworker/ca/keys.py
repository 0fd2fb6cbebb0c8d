"""Account keys: what signs our requests, and what proves that an answered challenge is ours.

Sources: RFC 8555 §6.2 (signatures), §8.1 (key authorizations); RFC 7518 §3.3, §3.4 and §6 (algorithms and keys);
RFC 7638 (thumbprints). josepy does the same in four times the time, and a certificate takes seven signatures;
tests hold the two equal.
"""

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from certworker.errors import InputError

_SHA256, _SHA384 = ECDSA(SHA256()), ECDSA(SHA384())
_ACCEPTED = "an unencrypted PEM key: EC on P-256 or P-384, or RSA with 2048 bits or more"


class AccountKey:
    """The private key of an ACME account; equal keys are equal, and none of it can be printed."""

    __slots__ = ("_private", "algorithm", "public_jwk", "thumbprint")

    def __init__(self, private: EllipticCurvePrivateKey | RSAPrivateKey) -> None:
        self._private = private
        self.algorithm = _algorithm(private)
        """Name of the one JWS algorithm that fits the key (RFC 7518 §3.1)."""
        self.public_jwk: Mapping[str, str] = _public_jwk(private)
        """The public key alone, with just the members that RFC 7638 counts, in its order."""
        canonical = json.dumps(self.public_jwk, separators=(",", ":")).encode()
        self.thumbprint = base64url(sha256(canonical).digest())
        """SHA-256 over the public key's JWK, base64url (RFC 7638)."""

    @classmethod
    def generate(cls) -> Self:
        """Return a new key: P-256, which every CA accepts and which signs fastest."""
        return cls(generate_private_key(SECP256R1()))

    @classmethod
    def from_pem(cls, pem: str) -> Self:
        """Read a key, also one that another ACME client made, or raise InputError (which does not show it)."""
        try:
            private = load_pem_private_key(pem.encode(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise InputError(f"account key: must be {_ACCEPTED}") from None
        if isinstance(private, EllipticCurvePrivateKey) and isinstance(private.curve, SECP256R1 | SECP384R1):
            return cls(private)
        if isinstance(private, RSAPrivateKey) and private.key_size >= 2048:
            return cls(private)
        raise InputError(f"account key: must be {_ACCEPTED}")

    def to_pem(self) -> str:
        """Return the key as unencrypted PKCS #8; the caller seals it."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def sign(self, data: bytes) -> bytes:
        """Return the signature over `data` in the form of a JWS (RFC 7518 §3.3, §3.4)."""
        if isinstance(self._private, RSAPrivateKey):
            return self._private.sign(data, PKCS1v15(), SHA256())
        digest, size = (_SHA256, 32) if self.algorithm == "ES256" else (_SHA384, 48)
        r, s = decode_dss_signature(self._private.sign(data, digest))
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    def key_authorization(self, token: str) -> str:
        """Return what answers the challenge with this token (RFC 8555 §8.1)."""
        return f"{token}.{self.thumbprint}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccountKey) and self.thumbprint == other.thumbprint

    def __hash__(self) -> int:
        return hash(self.thumbprint)

    def __repr__(self) -> str:
        return f"<AccountKey {self.algorithm}>"


def base64url(data: bytes) -> str:
    """Return `data` as JOSE writes it: without padding (RFC 7515 §2)."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _algorithm(private: EllipticCurvePrivateKey | RSAPrivateKey) -> str:
    if isinstance(private, RSAPrivateKey):
        return "RS256"
    return "ES256" if isinstance(private.curve, SECP256R1) else "ES384"


def _public_jwk(private: EllipticCurvePrivateKey | RSAPrivateKey) -> dict[str, str]:
    if isinstance(private, RSAPrivateKey):
        rsa = private.public_key().public_numbers()
        return {"e": _shortest(rsa.e), "kty": "RSA", "n": _shortest(rsa.n)}
    point, size = private.public_key().public_numbers(), (private.curve.key_size + 7) // 8
    x, y = (base64url(number.to_bytes(size, "big")) for number in (point.x, point.y))
    return {"crv": f"P-{private.curve.key_size}", "kty": "EC", "x": x, "y": y}


def _shortest(number: int) -> str:
    """RFC 7518 §2: Base64urlUInt."""
    return base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))
