"""Certificate keys, and the requests for certificates on them (RFC 2986, RFC 8555 §7.4)."""

from collections.abc import Callable, Collection
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from certworker.errors import InputError

CertificateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_MAKERS: dict[str, Callable[[], CertificateKey]] = {
    "ecdsa-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa-2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa-3072": lambda: rsa.generate_private_key(65537, 3072),
    "rsa-4096": lambda: rsa.generate_private_key(65537, 4096),
}
KEY_TYPES = tuple(_MAKERS)


def make_key(key_type: str) -> CertificateKey:
    """Return a new private key; its type is one of KEY_TYPES, else InputError."""
    if key_type not in _MAKERS:
        raise InputError(f"key type {key_type!r}: must be one of {', '.join(KEY_TYPES)}")
    return _MAKERS[key_type]()


def make_csr(key: CertificateKey, dns_names: Collection[str]) -> bytes:
    """Return a request (DER) for exactly these A-labels: the same names always give the same request.

    The subject stays empty: a common name would say again, and only up to 64 characters, what the
    subject alternative name says (CA/Browser Forum Baseline Requirements §7.1.4.3).
    """
    names = x509.SubjectAlternativeName([x509.DNSName(name) for name in sorted(set(dns_names))])
    builder = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=False)
    p384 = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    return builder.sign(key, hashes.SHA384() if p384 else hashes.SHA256()).public_bytes(Encoding.DER)


def key_to_pem(key: CertificateKey) -> str:
    """Return the key as unencrypted PKCS #8; the caller seals it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def spki_sha256(public_key: CertificatePublicKeyTypes) -> str:
    """Return the SHA-256 of the key's SubjectPublicKeyInfo, 64 lower-case hex digits: the key's identity."""
    return sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
