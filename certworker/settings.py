"""The settings: read once from the environment and a TOML file, frozen, all faults named together.

`CERTWORKER_<NAME>` in the environment wins over `<name>` in the file. Nothing else in the program looks
at the environment.
"""

import os
import re
import shlex
import socket
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from certworker.core.budget import Limits, read_limits
from certworker.errors import InputError, SettingsError

PREFIX = "CERTWORKER_"
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"


_SECRETS = frozenset(["acme_eab_hmac_key", "database_url"])
"""Values that no message shows; a database URL may hold a password."""
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]):(?P<port>[0-9]{1,5})")
_E_MAIL = re.compile(r"mailto:[!-~]+@[A-Za-z0-9.-]+")


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ValueError("must be the path of a file or folder")
    return value


def _existing(value: Path) -> Path:
    if not value.is_file():
        raise ValueError("there is no such file")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool):  # TOML's true is a 1 to Python
        raise ValueError("must be a whole number")
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be printable text")
    return value


def _address(value: str) -> str:
    found = _ADDRESS.fullmatch(value)
    if found is None or int(found["port"]) > 65535:
        raise ValueError("must be host:port")
    return value


def _addresses(value: object) -> object:
    parts = tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    if not parts:
        raise ValueError("must name at least one host:port")
    return parts


def read_command(value: object) -> tuple[str, ...]:
    """Return the words of a command line, as a shell would split it, or raise `ValueError`."""
    try:
        words = shlex.split(value) if isinstance(value, str) else []
    except ValueError:  # a quotation without its end
        words = []
    if not words or not words[0] or "\0" in "".join(words):
        raise ValueError("must be a command line; it is run without a shell")
    return tuple(words)


def _command(value: object) -> tuple[str, ...] | None:
    return None if value is None else read_command(value)


def _https(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        raise ValueError("must be an https URL without a user name")
    return value


def _contacts(value: object) -> object:
    parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError("must be e-mail addresses")
    contacts = tuple(part if ":" in part else f"mailto:{part}" for part in map(str, parts))
    # RFC 8555 §7.3: one address each, and no header fields.
    if not all(_E_MAIL.fullmatch(contact) and not set(contact) & set(",?") for contact in contacts):
        raise ValueError("must be e-mail addresses, separated by commas")
    return contacts


def _base64url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text) or len(text.rstrip("=")) % 4 == 1:
        raise ValueError("must be the base64url text that the CA gave")
    return value


def _rate_limits(value: object, info: ValidationInfo) -> Limits:
    if not isinstance(value, str):
        raise ValueError("must be text such as orders=50/45s,names=off")
    try:
        return read_limits(value, private=info.data.get("acme_private_ca", False))
    except InputError as error:
        raise ValueError(str(error)) from None


def _database(value: str) -> str:
    if not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        raise ValueError("must start with sqlite:/// or postgresql://")
    return value


File = Annotated[Path, BeforeValidator(_path)]
Address = Annotated[str, AfterValidator(_address)]
Whole = Annotated[int, BeforeValidator(_number)]
Seconds = Annotated[Whole, Field(ge=1, le=86400)]


class Settings(BaseModel):
    """Every setting; the names are the contract's, in lower case."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    data_dir: File = Path(".certworker")
    database_url: Annotated[str, AfterValidator(_database)] = Field(default="", repr=False)
    acme_directory_url: Annotated[str, AfterValidator(_https)] = LETS_ENCRYPT
    acme_ca_bundle: Annotated[File, AfterValidator(_existing)] | None = None
    acme_private_ca: bool = False
    acme_contact: Annotated[tuple[str, ...], BeforeValidator(_contacts)] = ()
    acme_tos_agreed: bool = False
    acme_eab_kid: str | None = None
    acme_eab_hmac_key: Annotated[SecretStr, AfterValidator(_base64url)] | None = None
    acme_profile: str | None = None
    acme_rate_limits: Annotated[Limits, PlainValidator(_rate_limits)] = Limits()
    key_type: Literal["ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096"] = "ecdsa-p256"
    responder_listen: Address = "127.0.0.1:8402"
    responder_addresses: Annotated[tuple[Address, ...], BeforeValidator(_addresses)] = ()
    embedded_node: Literal["none", "haproxy", "nginx"] = "none"
    haproxy_bin: File | None = None
    nginx_bin: File | None = None
    proxy_reload: Annotated[tuple[str, ...] | None, PlainValidator(_command)] = None
    proxy_check: Annotated[tuple[str, ...] | None, PlainValidator(_command)] = None
    node_name: Annotated[str, Field(min_length=1, max_length=253), AfterValidator(_printable)] = Field(
        default_factory=socket.gethostname
    )
    node_silent_secs: Seconds = 60
    node_listen: Address | None = None
    node_url: Annotated[str, AfterValidator(_https)] | None = None
    auto_publish: Literal["on", "off"] = "on"
    on_bad_row: Literal["refuse", "leave_out"] = "refuse"
    dns_resolver: Address | None = None
    seal: Literal["on", "off"] = "on"
    kek_file: File | None = None
    scan_interval_secs: Seconds = 30
    concurrency: Annotated[Whole, Field(ge=1, le=1024)] = 16
    api_listen: Address = "127.0.0.1:8400"
    health_check_interval_secs: Annotated[Whole, Field(ge=1, le=3600)] = 10
    health_check_timeout_ms: Annotated[Whole, Field(ge=1, le=3_600_000)] = 2000
    log_format: Literal["text", "json"] | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fill what another setting decides."""
        values = dict(given)
        folder = Path(str(values.get("data_dir", ".certworker")))
        values.setdefault("database_url", f"sqlite:///{folder / 'certworker.db'}")
        values.setdefault("kek_file", folder / "kek")
        values.setdefault("acme_private_ca", values.get("acme_ca_bundle") is not None)
        values.setdefault("acme_rate_limits", "")
        values.setdefault("responder_addresses", values.get("responder_listen", "127.0.0.1:8402"))
        return values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if faults := _disagreements(self.__dict__):
            raise ValueError("; ".join(faults))
        return self

    @property
    def own_addresses(self) -> tuple[Address, ...]:
        """What is certworker's own, and no upstream of anybody."""
        always = (self.api_listen, self.responder_listen, *self.responder_addresses)
        return always if self.node_listen is None else (*always, self.node_listen)

    @property
    def scan_interval(self) -> timedelta:
        return timedelta(seconds=self.scan_interval_secs)

    @property
    def node_silent(self) -> timedelta:
        return timedelta(seconds=self.node_silent_secs)


def load(environ: Mapping[str, str] | None = None, config_file: Path | None = None) -> Settings:
    """Return the settings of `environ` (default: the process's) and the TOML file, if one is named.

    Raises SettingsError with every fault in one message: the setting, its value, the rule.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(f"{PREFIX}CONFIG")
    path = config_file or (Path(named) if named else None)
    values = _from_file(path) if path is not None else {}
    for key, value in environ.items():
        name = key.removeprefix(PREFIX).lower()
        if key.startswith(PREFIX) and name != "config" and value != "":
            values[name] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_faults(error, values))) from None


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} is not TOML: {error}") from None


def _disagreements(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong between settings; `values` may be as they were given."""
    faults = []
    if (values.get("acme_eab_kid") is None) != (values.get("acme_eab_hmac_key") is None):
        faults.append("ACME_EAB_KID and ACME_EAB_HMAC_KEY belong together: set both or none")
    if values.get("proxy_check") and not values.get("proxy_reload"):
        faults.append("PROXY_CHECK is for a proxy of your own: set PROXY_RELOAD too")
    try:
        interval = int(values.get("health_check_interval_secs", 10))
        timeout = int(values.get("health_check_timeout_ms", 2000))
    except (TypeError, ValueError):
        return faults  # one of them is a fault of its own
    if timeout > interval * 1000:
        faults.append("HEALTH_CHECK_TIMEOUT_MS must not be longer than HEALTH_CHECK_INTERVAL_SECS")
    return faults


def _faults(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    given, derived = [], []
    for fault in error.errors(include_url=False, include_context=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        rule = fault["msg"].removeprefix("Value error, ")
        rule = rule[:1].lower() + rule[1:]
        if fault["type"] == "extra_forbidden":
            given.append(_unknown(name))
        elif name in values:
            given.append(f"{PREFIX}{name.upper()}{_shown(name, values[name])}: {rule}")
        elif name:
            derived.append(f"{PREFIX}{name.upper()}: {rule}")
    # What lies between settings is not looked at by the model while one of them is wrong in itself.
    given += _disagreements(values)
    return list(dict.fromkeys(given)) or derived


def _unknown(name: str) -> str:
    if name.lower() in Settings.model_fields:
        return f"{name}: settings are written in lower case in the file"
    shown = f"{PREFIX}{name.upper()}" if name.isidentifier() else repr(name)
    return f"{shown}: there is no such setting"


def _shown(name: str, value: object) -> str:
    hidden = name in _SECRETS or (name.endswith("_url") and "@" in str(value))
    return "" if hidden else f" {str(value)[:200]!r}"
