"""The settings: read once from the environment and a TOML file, frozen, all faults named together.

`CERTWORKER_<NAME>` in the environment wins over `<name>` in the file. Nothing else in the program looks
at the environment.
"""

import os
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
    SecretStr,
    ValidationError,
    model_validator,
)

from certworker.errors import SettingsError

PREFIX = "CERTWORKER_"
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError("must be host:port")
    return value


def _addresses(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _https(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        raise ValueError("must be an https URL without a user name")
    return value


def _contacts(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return tuple(part if ":" in part else f"mailto:{part}" for part in parts)


def _database(value: str) -> str:
    if not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        raise ValueError("must start with sqlite:/// or postgresql://")
    return value


Address = Annotated[str, AfterValidator(_address)]
Seconds = Annotated[int, Field(ge=1, le=86400)]


class Settings(BaseModel):
    """Every setting; the names are the contract's, in lower case."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    data_dir: Path = Path(".certworker")
    database_url: Annotated[str, AfterValidator(_database)] = Field(default="", repr=False)
    acme_directory_url: Annotated[str, AfterValidator(_https)] = LETS_ENCRYPT
    acme_ca_bundle: Path | None = None
    acme_private_ca: bool = False
    acme_contact: Annotated[tuple[str, ...], BeforeValidator(_contacts)] = ()
    acme_tos_agreed: bool = False
    acme_eab_kid: str | None = None
    acme_eab_hmac_key: SecretStr | None = None
    acme_profile: str | None = None
    key_type: Literal["ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096"] = "ecdsa-p256"
    responder_listen: Address = "127.0.0.1:8402"
    responder_addresses: Annotated[tuple[Address, ...], BeforeValidator(_addresses)] = ()
    embedded_node: Literal["none", "haproxy", "nginx"] = "none"
    haproxy_bin: Path | None = None
    nginx_bin: Path | None = None
    node_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(default_factory=socket.gethostname)
    node_silent_secs: Seconds = 60
    auto_publish: Literal["on", "off"] = "on"
    dns_resolver: Address | None = None
    seal: Literal["on", "off"] = "on"
    kek_file: Path | None = None
    scan_interval_secs: Seconds = 30
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    api_listen: Address = "127.0.0.1:8400"
    health_check_interval_secs: Annotated[int, Field(ge=1, le=3600)] = 10
    health_check_timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 2000
    log_format: Literal["text", "json"] | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fill what another setting decides."""
        values = dict(given)
        folder = Path(values.get("data_dir", ".certworker"))
        values.setdefault("database_url", f"sqlite:///{folder / 'certworker.db'}")
        values.setdefault("kek_file", folder / "kek")
        values.setdefault("acme_private_ca", values.get("acme_ca_bundle") is not None)
        values.setdefault("responder_addresses", values.get("responder_listen", "127.0.0.1:8402"))
        return values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.acme_eab_kid is None) != (self.acme_eab_hmac_key is None):
            raise ValueError("ACME_EAB_KID and ACME_EAB_HMAC_KEY belong together: set both or none")
        if self.health_check_timeout_ms > self.health_check_interval_secs * 1000:
            raise ValueError("HEALTH_CHECK_TIMEOUT_MS must not be longer than HEALTH_CHECK_INTERVAL_SECS")
        if self.acme_ca_bundle is not None and not self.acme_ca_bundle.is_file():
            raise ValueError(f"ACME_CA_BUNDLE {str(self.acme_ca_bundle)!r}: there is no such file")
        return self

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


def _faults(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    lines = []
    for fault in error.errors(include_url=False, include_context=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        rule = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            lines.append(f"{PREFIX}{name.upper()}: there is no such setting")
        elif not name:
            lines.append(rule)
        else:
            shown = "" if "key" in name or name == "database_url" else f" {str(values.get(name, ''))!r}"
            lines.append(f"{PREFIX}{name.upper()}{shown}: {rule[:1].lower()}{rule[1:]}")
    return lines
