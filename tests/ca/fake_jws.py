"""Verifies requests as a CA does (RFC 8555 §6.2), with cryptography alone: not with what signed them."""

import hmac
import json
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from .fake_issuer import base64url

_CURVES = {"P-256": (ec.SECP256R1(), hashes.SHA256()), "P-384": (ec.SECP384R1(), hashes.SHA384())}


class Jws(NamedTuple):
    """The parts of a flattened JWS (RFC 7515 §7.2.2)."""

    header: Mapping[str, Any]
    payload: bytes
    signed: bytes
    signature: bytes


def parse(body: bytes | Mapping[str, str]) -> Jws:
    """Take a JWS apart; nothing is verified yet."""
    outer = json.loads(body) if isinstance(body, bytes) else body
    assert set(outer) == {"protected", "payload", "signature"}, "RFC 8555 §6.2 allows nothing else"
    signed = f"{outer['protected']}.{outer['payload']}".encode()
    header = json.loads(decode(outer["protected"]))
    return Jws(header, decode(outer["payload"]), signed, decode(outer["signature"]))


def is_signed(jws: Jws, jwk: Mapping[str, str]) -> bool:
    """Say whether the key signed it with the algorithm that the header names."""
    try:
        if jwk["kty"] == "RSA" and jws.header["alg"] == "RS256":
            numbers = rsa.RSAPublicNumbers(_number(jwk["e"]), _number(jwk["n"]))
            numbers.public_key().verify(jws.signature, jws.signed, padding.PKCS1v15(), hashes.SHA256())
            return True
        curve, digest = _CURVES[jwk["crv"]]
        if jws.header["alg"] != f"ES{digest.digest_size * 8}" or len(jws.signature) != 2 * digest.digest_size:
            return False
        half = digest.digest_size
        r, s = int.from_bytes(jws.signature[:half], "big"), int.from_bytes(jws.signature[half:], "big")
        public = ec.EllipticCurvePublicNumbers(_number(jwk["x"]), _number(jwk["y"]), curve).public_key()
        public.verify(encode_dss_signature(r, s), jws.signed, ec.ECDSA(digest))
    except (InvalidSignature, KeyError, ValueError):
        return False
    return True


def is_maced(jws: Jws, key: bytes) -> bool:
    """Say whether an external account binding was made with this key (RFC 8555 §7.3.4)."""
    expected = hmac.digest(key, jws.signed, "sha256")
    return jws.header.get("alg") == "HS256" and hmac.compare_digest(expected, jws.signature)


def thumbprint(jwk: Mapping[str, str]) -> str:
    """RFC 7638."""
    names = ("e", "kty", "n") if jwk["kty"] == "RSA" else ("crv", "kty", "x", "y")
    canonical = json.dumps({name: jwk[name] for name in names}, separators=(",", ":"))
    return base64url(sha256(canonical.encode()).digest())


def decode(text: str) -> bytes:
    """Undo base64url without padding; with padding is an error."""
    assert "=" not in text, "RFC 7515 §2: no padding"
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _number(text: str) -> int:
    return int.from_bytes(decode(text), "big")
