"""The node API's own key and certificate: made once, kept sealed in the database, the same for all workers.

No name and no CA is in play. A node has the SHA-256 of the public key from its enrolment token, and talks to
whoever proves to have the private one.
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from certworker.store import settings_kv
from certworker.store.database import Database
from certworker.store.seal import Sealer

_PLACE = {"table": "settings_kv", "column": "value", "row_id": settings_kv.NODE_API}
_BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280 §4.1.2.5: no end. Nobody looks at the dates: it is the key that is pinned."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the node API shows, and proves to have."""

    certificate_pem: str
    key_pem: str = field(repr=False)

    @property
    def pin(self) -> str:
        """SHA-256 of the public key (SubjectPublicKeyInfo, DER), 64 lower-case hex digits."""
        key = x509.load_pem_x509_certificate(self.certificate_pem.encode()).public_key()
        return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def take_identity(db: Database, sealer: Sealer) -> Identity:
    """Return the node API's identity; the first one who asks makes it. SealError if it cannot be opened."""
    stored = db.read(lambda tx: settings_kv.find(tx, settings_kv.NODE_API))
    if stored is None:
        made = _make()
        sealed = {"certificate": made.certificate_pem, "key": sealer.seal(made.key_pem, **_PLACE)}
        stored = db.write(lambda tx: settings_kv.put_first(tx, settings_kv.NODE_API, json.dumps(sealed)))
    document = json.loads(stored)
    return Identity(document["certificate"], sealer.open(document["key"], **_PLACE))


def _make() -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "certworker node API")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(certificate.public_bytes(Encoding.PEM).decode(), secret.decode())
