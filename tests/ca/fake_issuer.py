"""A root and an intermediate in memory, for the fake CA to issue real certificates with."""

from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TEN_YEARS = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Issuer:
    """A certificate and the key to sign others with."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_hierarchy(now: datetime) -> tuple[Issuer, Issuer]:
    """Return a new root and an intermediate below it."""
    root_key, intermediate_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, intermediate_name = _name("Fake Root"), _name("Fake Intermediate")
    root = _authority(root_name, root_name, root_key, root_key, now, path_length=1)
    intermediate = _authority(intermediate_name, root_name, intermediate_key, root_key, now, path_length=0)
    return Issuer(root, root_key), Issuer(intermediate, intermediate_key)


def issue(
    issuer: Issuer, csr: x509.CertificateSigningRequest, not_before: datetime, lifetime: timedelta
) -> x509.Certificate:
    """Return a leaf for what the request asks, as public CAs fill it."""
    names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.certificate.subject)
        .public_key(csr.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before.replace(microsecond=0))
        .not_valid_after(not_before.replace(microsecond=0) + lifetime - timedelta(seconds=1))
        .add_extension(names, critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(aki, critical=False)
        .sign(issuer.key, hashes.SHA256())
    )


def to_pem(*certificates: x509.Certificate) -> str:
    """Return the certificates one after the other."""
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def renewal_id(certificate: x509.Certificate) -> str:
    """Return the name that RFC 9773 §4.1 gives to a certificate."""
    aki = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    serial = certificate.serial_number
    return f"{base64url(aki or b'')}.{base64url(serial.to_bytes(serial.bit_length() // 8 + 1, 'big'))}"


def base64url(data: bytes) -> str:
    """Encode as all of JOSE does, without padding."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _authority(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    path_length: int,
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - TEN_YEARS)
        .not_valid_after(now + TEN_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
