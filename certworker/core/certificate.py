"""Certificates as facts: what a chain says, and whether it is what was asked for.

Everything that a CA or a person sends is hostile until `check_chain` or `read_leaf` has read it.
"""

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from certworker.errors import ChainRefused, InputError

MAX_CHAIN_BYTES = 256 * 1024
MAX_CHAIN_LENGTH = 20
CLOCK_TOLERANCE = timedelta(minutes=5)
"""A leaf that starts this little in the future is a matter of two clocks, not of a wrong leaf."""

_LONGEST_RENEWAL_ID = 255
"""Characters; it becomes part of a URL and of an index, and a CA's own are half as long."""

_BLOCK = re.compile(r"-----BEGIN ([^-\n]+)-----.*?-----END \1-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Validity:
    """When a certificate is valid."""

    not_before: datetime
    not_after: datetime

    @property
    def lifetime(self) -> timedelta:
        return self.not_after - self.not_before

    def usable_from(self, moment: datetime) -> "Validity":
        """Return what is left of it when it arrives at `moment`: a backdated certificate has a shorter life."""
        return Validity(max(self.not_before, moment), self.not_after)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What one certificate says of itself."""

    dns_names: tuple[str, ...]
    """Lower case, sorted."""
    dns_names_only: bool
    """Whether it names nothing else: no address, no mailbox."""
    validity: Validity
    fingerprint: str
    """SHA-256 of the DER, 64 lower-case hex digits."""
    serial: str
    """Lower-case hex, no leading zeros."""
    issuer: str
    """Common name of the issuer, or its whole name."""
    spki_sha256: str
    """SHA-256 of the public key (SubjectPublicKeyInfo DER), 64 lower-case hex digits."""
    renewal_id: str | None = None
    """What its CA calls it in renewal information and `replaces` (RFC 9773 §4.1); None without a key identifier."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain that passed every check, written anew: leaf first, one blank-free PEM block after another."""

    pem: str
    leaf: Leaf


def check_chain(chain_pem: str, *, spki_sha256: str, dns_names: Iterable[str], now: datetime) -> Chain:
    """Return the CA's chain if it is the certificate that was ordered; ChainRefused says why not.

    Only CERTIFICATE blocks (RFC 8555 §11.4: anything else, a private key above all, refuses the whole
    file), the leaf's key is ours, its names are exactly those asked for, each certificate is signed
    by the next, the leaf is no CA and is valid now.
    """
    certificates = _read_blocks(chain_pem)
    leaf = _describe(certificates[0])
    if leaf.spki_sha256 != spki_sha256:
        raise ChainRefused("the CA's certificate is for another key than the one in our CSR")
    if set(leaf.dns_names) != set(dns_names):
        raise ChainRefused(f"the CA's certificate is for {', '.join(leaf.dns_names)}, not for what was ordered")
    if not leaf.dns_names_only:
        raise ChainRefused("the CA's certificate is for more than the DNS names that were ordered")
    _check_order(certificates)
    _check_leaf(certificates[0], leaf, now)
    return Chain(_to_pem(certificates), leaf)


def read_leaf(chain_pem: str) -> Leaf:
    """Return what the first certificate of a PEM text says; ChainRefused when it cannot be read."""
    return _describe(_read_blocks(chain_pem)[0])


def normalise_pair(chain_pem: str, key_pem: str) -> tuple[str, str]:
    """Return chain and key written anew; InputError when they cannot be read or do not belong together."""
    try:
        certificates = _read_blocks(chain_pem)
        spki_sha256 = _describe(certificates[0]).spki_sha256
        key = load_pem_private_key(key_pem.encode(), None)
    except (ChainRefused, ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = str(error) if isinstance(error, ChainRefused) else "the private key cannot be read as unencrypted PEM"
        raise InputError(what) from None
    if _spki_sha256(key.public_key()) != spki_sha256:
        raise InputError("the private key does not belong to the certificate")
    return _to_pem(certificates), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _read_blocks(chain_pem: str) -> list[x509.Certificate]:
    if len(chain_pem) > MAX_CHAIN_BYTES:
        raise ChainRefused(f"the chain has {len(chain_pem)} characters, at most {MAX_CHAIN_BYTES} are read")
    kinds = re.findall(r"-----BEGIN ([^-\n]*)-----", chain_pem)
    if any(kind != "CERTIFICATE" for kind in kinds):
        raise ChainRefused("the chain holds something else than certificates, so none of it is used")
    if not kinds or len(kinds) > MAX_CHAIN_LENGTH:
        raise ChainRefused(f"the chain holds {len(kinds)} certificates, 1 to {MAX_CHAIN_LENGTH} are expected")
    if _BLOCK.sub("", chain_pem).strip():
        raise ChainRefused("the chain holds text outside its certificates")
    try:
        return x509.load_pem_x509_certificates(chain_pem.encode())
    except (ValueError, x509.InvalidVersion):
        raise ChainRefused("a certificate of the chain cannot be read") from None


def _describe(certificate: x509.Certificate) -> Leaf:
    if certificate.serial_number <= 0:
        raise ChainRefused("the certificate's serial number is not positive (RFC 5280 §4.1.2.2)")
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
        public_key = certificate.public_key()
        common = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        return Leaf(
            dns_names=tuple(sorted({name.lower() for name in names})),
            dns_names_only=len(names) == len(extension.value),
            validity=Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc),
            fingerprint=hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest(),
            serial=f"{certificate.serial_number:x}",
            issuer=str(common[0].value) if common else certificate.issuer.rfc4514_string(),
            spki_sha256=_spki_sha256(public_key),
            renewal_id=_renewal_id(certificate),
        )
    except x509.ExtensionNotFound:
        raise ChainRefused("the certificate names no DNS names (no subjectAltName)") from None
    except (ValueError, x509.DuplicateExtension, UnsupportedAlgorithm):
        raise ChainRefused("the certificate cannot be read") from None


def _renewal_id(certificate: x509.Certificate) -> str | None:
    try:
        authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except x509.ExtensionNotFound:
        return None
    if not authority.key_identifier:
        return None
    number = certificate.serial_number
    # As DER has it: signed, so a number whose first bit is set comes after a byte 00.
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")
    renewal_id = f"{_base64url(authority.key_identifier)}.{_base64url(serial)}"
    return renewal_id if len(renewal_id) <= _LONGEST_RENEWAL_ID else None


def _base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _check_order(certificates: list[x509.Certificate]) -> None:
    for certificate, issuer in pairwise(certificates):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise ChainRefused("a certificate of the chain is not signed by the one after it") from None


def _check_leaf(certificate: x509.Certificate, leaf: Leaf, now: datetime) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    if constraints.ca:
        raise ChainRefused("the CA sent a CA certificate where ours should be")
    if leaf.validity.not_after <= now:
        raise ChainRefused(f"the CA's certificate has expired already, at {leaf.validity.not_after.isoformat()}")
    if leaf.validity.not_before > now + CLOCK_TOLERANCE:
        raise ChainRefused(
            f"the CA's certificate starts only at {leaf.validity.not_before.isoformat()}: check this machine's clock"
        )


def _to_pem(certificates: Iterable[x509.Certificate]) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def _spki_sha256(public_key: object) -> str:
    der = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return hashlib.sha256(der).hexdigest()
