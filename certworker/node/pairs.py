"""From a certificate with its key to the bytes of a file: parsed, checked, and written out anew.

Nothing of the text that came in goes through, so nothing but certificates and a key can reach a
proxy. Sources: RFC 9525 §6.3 (names), RFC 7468 (PEM).
"""

import hashlib
import re
import ssl

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from certworker.core.certificate import MAX_CHAIN_BYTES
from certworker.core.rollout import NodeCertificate
from certworker.core.snapshot import check_host
from certworker.errors import PairRefused

_BLANK_LINE = re.compile(rb"\n\s*\n")


def render_pair(certificate: NodeCertificate) -> bytes:
    """Return leaf, intermediates and key as one PEM, or raise `PairRefused` saying what does not fit."""
    if len(certificate.chain_pem) > MAX_CHAIN_BYTES:
        # No client would read it, and nginx reads no certificate any more if one has too many parts.
        raise _refusal(certificate, f"the chain has more than {MAX_CHAIN_BYTES} characters")
    try:
        chain = x509.load_pem_x509_certificates(certificate.chain_pem.encode())
        key = load_pem_private_key(certificate.key_pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        # The exception's text may quote what it could not read.
        raise _refusal(certificate, "chain or key cannot be read") from None
    leaf = chain[0]
    if _public_bytes(leaf.public_key()) != _public_bytes(key.public_key()):
        raise _refusal(certificate, "the key is not the leaf's")
    if hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest() != certificate.fingerprint:
        raise _refusal(certificate, f"the leaf's fingerprint is not {certificate.fingerprint}")
    _check_names(certificate, leaf)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = b"".join(part.public_bytes(Encoding.PEM) for part in chain) + secret
    if _BLANK_LINE.search(pem):
        # HAProxy's socket ends a payload at a blank line, and runs the rest as commands.
        raise _refusal(certificate, "its PEM has a blank line")
    return pem


def load_pair(file: str) -> None:
    """Let OpenSSL load a file of `render_pair` as a proxy would, or raise `PairRefused`."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file)
    except ssl.SSLError as refused:
        raise PairRefused(f"OpenSSL refuses it: is its key or signature too weak? {refused.reason}") from None


def _public_bytes(key: object) -> bytes:
    public_bytes = getattr(key, "public_bytes")  # noqa: B009  # every kind of key has it, without a common type
    encoded: bytes = public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _check_names(certificate: NodeCertificate, leaf: x509.Certificate) -> None:
    if not certificate.dns_names:
        raise _refusal(certificate, "it has no names to answer")
    covered = _covered_names(leaf)
    for name in certificate.dns_names:
        _check_form(certificate, name)
        if name not in covered and f"*.{name.partition('.')[2]}" not in covered:
            raise _refusal(certificate, f"the leaf does not cover {name}")


def _check_form(certificate: NodeCertificate, name: str) -> None:
    try:
        as_written = check_host(name) == name
    except ValueError:
        as_written = False
    if not as_written:
        raise _refusal(certificate, f"{name!r} is no name in A-labels and lower case")


def _covered_names(leaf: x509.Certificate) -> set[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {name.lower() for name in names.get_values_for_type(x509.DNSName)}


def _refusal(certificate: NodeCertificate, why: str) -> PairRefused:
    return PairRefused(f"certificate {certificate.id}: {why}; it is not given to the proxy")
