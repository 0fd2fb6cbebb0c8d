"""Account keys: what signs our requests, and what proves that an answered challenge is ours.

Sources: RFC 8555 §6.2 (signatures), §8.1 (key authorizations); RFC 7638 (thumbprints). josepy does the
work. `acme.challenges` would compute key authorizations too, but its import pulls in `requests` and
doubles the time a short command takes to start; a test holds the two equal.
"""

from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from josepy.b64 import b64encode
from josepy.jwa import ES256, ES384, RS256, JWASignature
from josepy.jwk import JWK, JWKEC, JWKRSA
from josepy.util import ComparableECKey, ComparableRSAKey

from certworker.errors import InputError

_ACCEPTED = "an unencrypted PEM key: EC on P-256 or P-384, or RSA with 2048 bits or more"


class AccountKey:
    """The private key of an ACME account; equal keys are equal, and none of it can be printed."""

    __slots__ = ("_private", "algorithm", "jwk", "thumbprint")

    def __init__(self, private: EllipticCurvePrivateKey | RSAPrivateKey) -> None:
        self._private = private
        self.jwk: JWK
        self.algorithm: JWASignature
        """The one JWS algorithm that fits the key (RFC 7518 §3.1)."""
        if isinstance(private, RSAPrivateKey):
            self.jwk = JWKRSA(key=ComparableRSAKey(private))
            self.algorithm = RS256
        else:
            self.jwk = JWKEC(key=ComparableECKey(private))
            self.algorithm = ES256 if isinstance(private.curve, SECP256R1) else ES384
        self.thumbprint = b64encode(self.jwk.thumbprint()).decode()
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

    def key_authorization(self, token: str) -> str:
        """Return what answers the challenge with this token (RFC 8555 §8.1)."""
        return f"{token}.{self.thumbprint}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccountKey) and self.thumbprint == other.thumbprint

    def __hash__(self) -> int:
        return hash(self.thumbprint)

    def __repr__(self) -> str:
        return f"<AccountKey {self.algorithm.name}>"
