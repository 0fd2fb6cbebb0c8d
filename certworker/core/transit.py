"""What travels between a gateway machine and the node API: JSON documents over HTTPS.

The control plane is upgraded first. So it refuses keys that it does not know, and an agent passes over
those that it does not know; what an older agent must not pass over raises `SCHEMA`.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.snapshot import check_host
from certworker.errors import InputError

SCHEMA: Literal[1] = 1

PREFIX = "cwe1."
_RANDOM = r"^[A-Za-z0-9_-]{43}$"
"""256 random bits in base64url."""
_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
_HEX = r"^[0-9a-f]{64}$"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_LONGEST_LINE = 1000

T = TypeVar("T", bound=BaseModel)


def check_node_name(value: str) -> str:
    """Return `value` if a node can have that name."""
    if not _NAME.fullmatch(value):
        raise ValueError("must be letters and digits, with . _ - between them, at most 253")
    return value


def _line(value: str) -> str:
    """Make a stranger's text fit for a log line, a terminal and both databases."""
    return "".join(char if char.isprintable() else "?" for char in value[:_LONGEST_LINE])


def check_url(value: str) -> str:
    """Return `value` if it is where a node API can be: https, a host, maybe a port."""
    try:
        parts = urlsplit(value)
        plain = parts.port != 0 and not (parts.username or parts.path.strip("/") or parts.query or parts.fragment)
    except ValueError:  # a port out of range, half an IPv6 address
        plain = False
    if not plain or parts.scheme != "https" or not parts.hostname or not value.isprintable():
        raise ValueError("must be an https URL of a host and maybe a port")
    return value


Uuid = Annotated[str, Field(pattern=_UUID)]
Hex = Annotated[str, Field(pattern=_HEX)]
Secret = Annotated[str, Field(pattern=_RANDOM, repr=False)]
Name = Annotated[str, AfterValidator(check_node_name)]
Line = Annotated[str, AfterValidator(_line)]
Host = Annotated[str, AfterValidator(check_host)]
Url = Annotated[str, AfterValidator(check_url)]


class _Asked(BaseModel):
    """What a node sends: nothing that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class _Answered(BaseModel):
    """What the control plane answers; a newer one may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    schema_version: Literal[1] = SCHEMA


class EnrolmentToken(_Asked):
    """What a person carries from the control plane to a gateway machine, good for one node and one hour."""

    url: Url
    """https, where the node API is."""
    pin: Hex
    """SHA-256 of the public key (SubjectPublicKeyInfo, DER) that the node API proves to have."""
    name: Name
    enrolment_id: Uuid
    secret: Secret

    def text(self) -> str:
        """Return it as one word."""
        return PREFIX + base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


def read_enrolment_token(text: str) -> EnrolmentToken:
    """Read what `EnrolmentToken.text` gave, or raise `InputError`, which quotes nothing of it."""
    rule = "the enrolment token is not one of `certworker node enroll`: copy the whole word"
    if not text.startswith(PREFIX):
        raise InputError(rule)
    word = text.removeprefix(PREFIX)
    try:
        document = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InputError(rule) from None
    return read(EnrolmentToken, document, "the enrolment token")


class EnrolRequest(_Asked):
    """`POST /v1/enrol`. The node makes its secret itself, so that an answer that is lost can be asked for again."""

    enrolment_id: Uuid
    secret: Secret
    """The enrolment token's."""
    name: Name
    node_secret: Secret
    """Half of the node's token from now on; the control plane keeps its hash only."""


class EnrolAnswer(_Answered):
    node_id: Uuid
    """The other half: the token is `node_id.node_secret`."""


class VersionDocument(_Answered):
    """A published version as it travels; the snapshot is read by `core.snapshot.read_snapshot`."""

    id: Uuid
    number: int
    snapshot: dict[str, Any]


class VersionAnswer(_Answered):
    """`GET /v1/node/version`, when it is another one than the node has."""

    version: VersionDocument | None
    """None: there is none for this node yet."""


class ChangesAnswer(_Answered):
    """`GET /v1/node/certificates`."""

    changes: CertificateChanges


class HeartbeatAnswer(_Answered):
    heartbeat_secs: Annotated[float, Field(gt=0, le=3600)]
    """How soon the control plane wants to hear of the node again."""


class HeartbeatBody(_Asked):
    """`POST /v1/node/heartbeat`: what a node proved. Which node it is, the token says."""

    version_id: Uuid | None
    version_number: int | None
    cursor: Cursor
    proxy: Line
    agent: Line
    """The program that sends it, for example `certworker 1.0.0`."""
    fingerprints: dict[Uuid, Hex]
    unserved: dict[Uuid, Line]
    refused: dict[Uuid, Line]
    refused_version_id: Uuid | None
    unanswered: dict[Host, Line]
    untold: Annotated[int, Field(ge=0)] = 0
    warnings: Annotated[tuple[Line, ...], Field(max_length=1000)]
    error: Line | None

    def heartbeat(self, node_id: str) -> Heartbeat:
        """Return it as the heartbeat of the node that sent it."""
        return Heartbeat(node_id, **{name: getattr(self, name) for name in type(self).model_fields if name != "agent"})

    @classmethod
    def of(cls, heartbeat: Heartbeat, agent: str) -> "HeartbeatBody":
        """Return what a node sends of its heartbeat."""
        names = cls.model_fields.keys() - {"agent"}
        return cls(agent=agent, **{name: getattr(heartbeat, name) for name in names})


@dataclass(frozen=True, slots=True)
class NodeToken:
    """What a node proves itself with."""

    node_id: str
    secret: str = field(repr=False)

    def text(self) -> str:
        return f"{self.node_id}.{self.secret}"


def read_node_token(text: str) -> NodeToken | None:
    """Read what `NodeToken.text` gave; None if it is something else."""
    node_id, _, secret = text.partition(".")
    if not re.fullmatch(_UUID, node_id) or not re.fullmatch(_RANDOM, secret):
        return None
    return NodeToken(node_id, secret)


def read(kind: type[T], content: bytes, what: str) -> T:
    """Read a document, or raise `InputError` naming the field and the rule, and never the value."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as refused:
        error = refused.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(_line(str(part)) for part in error["loc"]) or "the document"
        raise InputError(f"{what}: {where[:200]}: {error['msg'].removeprefix('Value error, ')}") from None
