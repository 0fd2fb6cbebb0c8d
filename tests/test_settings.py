"""The settings are the contract's: names, defaults, who wins, and one message for everything that is wrong."""

import re
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from certworker.core import budget
from certworker.core.budget import Limit, Limits
from certworker.core.gateway import Defaults, GatewayRows, PoolRow, TargetRow, build
from certworker.errors import SettingsError
from certworker.settings import LETS_ENCRYPT, Settings, load

CONTRACT = {
    "DATA_DIR": Path(".certworker"),
    "DATABASE_URL": "sqlite:///.certworker/certworker.db",
    "ACME_DIRECTORY_URL": "https://acme-v02.api.letsencrypt.org/directory",
    "ACME_CA_BUNDLE": None,
    "ACME_PRIVATE_CA": False,
    "ACME_CONTACT": (),
    "ACME_TOS_AGREED": False,
    "ACME_EAB_KID": None,
    "ACME_EAB_HMAC_KEY": None,
    "ACME_PROFILE": None,
    "ACME_RATE_LIMITS": budget.LETS_ENCRYPT,
    "KEY_TYPE": "ecdsa-p256",
    "RESPONDER_LISTEN": "127.0.0.1:8402",
    "RESPONDER_ADDRESSES": ("127.0.0.1:8402",),
    "EMBEDDED_NODE": "none",
    "HAPROXY_BIN": None,
    "NGINX_BIN": None,
    "PROXY_RELOAD": None,
    "PROXY_CHECK": None,
    "NODE_NAME": socket.gethostname(),
    "NODE_SILENT_SECS": 60,
    "NODE_LISTEN": None,
    "NODE_URL": None,
    "AUTO_PUBLISH": "on",
    "ON_BAD_ROW": "refuse",
    "DNS_RESOLVER": None,
    "SEAL": "on",
    "KEK_FILE": Path(".certworker/kek"),
    "SCAN_INTERVAL_SECS": 30,
    "CONCURRENCY": 16,
    "API_LISTEN": "127.0.0.1:8400",
    "HEALTH_CHECK_INTERVAL_SECS": 10,
    "HEALTH_CHECK_TIMEOUT_MS": 2000,
    "LOG_FORMAT": None,
    "LOG_LEVEL": "info",
}
GIVEN: dict[str, tuple[str, Any]] = {
    "DATA_DIR": ("/srv/cw", Path("/srv/cw")),
    "DATABASE_URL": ("postgresql://cw@db/cw", "postgresql://cw@db/cw"),
    "ACME_DIRECTORY_URL": ("https://ca.test/dir", "https://ca.test/dir"),
    "ACME_PRIVATE_CA": ("true", True),
    "ACME_CONTACT": ("ops@a.test, mailto:b@a.test", ("mailto:ops@a.test", "mailto:b@a.test")),
    "ACME_TOS_AGREED": ("true", True),
    "ACME_PROFILE": ("shortlived", "shortlived"),
    "ACME_RATE_LIMITS": ("none, orders=5/1m", Limits(orders=Limit(5, timedelta(minutes=1)))),
    "KEY_TYPE": ("rsa-4096", "rsa-4096"),
    "RESPONDER_LISTEN": ("[::1]:80", "[::1]:80"),
    "RESPONDER_ADDRESSES": ("10.0.0.1:8402, host-2:8402", ("10.0.0.1:8402", "host-2:8402")),
    "EMBEDDED_NODE": ("haproxy", "haproxy"),
    "HAPROXY_BIN": ("/usr/sbin/haproxy", Path("/usr/sbin/haproxy")),
    "NGINX_BIN": ("/usr/sbin/nginx", Path("/usr/sbin/nginx")),
    "PROXY_RELOAD": ("sudo systemctl reload 'a b'", ("sudo", "systemctl", "reload", "a b")),
    "NODE_NAME": ("edge-1", "edge-1"),
    "NODE_SILENT_SECS": ("5", 5),
    "NODE_LISTEN": ("[::]:8401", "[::]:8401"),
    "NODE_URL": ("https://nodes.example.com:8401", "https://nodes.example.com:8401"),
    "AUTO_PUBLISH": ("off", "off"),
    "ON_BAD_ROW": ("leave_out", "leave_out"),
    "DNS_RESOLVER": ("127.0.0.1:53", "127.0.0.1:53"),
    "SEAL": ("off", "off"),
    "KEK_FILE": ("/etc/kek", Path("/etc/kek")),
    "SCAN_INTERVAL_SECS": ("1", 1),
    "CONCURRENCY": ("64", 64),
    "API_LISTEN": ("0.0.0.0:0", "0.0.0.0:0"),
    "HEALTH_CHECK_INTERVAL_SECS": ("3", 3),
    "HEALTH_CHECK_TIMEOUT_MS": ("500", 500),
    "LOG_FORMAT": ("json", "json"),
    "LOG_LEVEL": ("debug", "debug"),
}


def env(**values: str) -> dict[str, str]:
    return {f"CERTWORKER_{name}": value for name, value in values.items()}


def toml(folder: Path, text: str) -> Path:
    path = folder / "certworker.toml"
    path.write_text(text)
    return path


def test_the_contract_has_these_settings_and_no_others() -> None:
    """Design section 8."""
    assert set(CONTRACT) == {name.upper() for name in Settings.model_fields}
    assert CONTRACT["ACME_DIRECTORY_URL"] == LETS_ENCRYPT


@pytest.mark.parametrize(("name", "default"), CONTRACT.items())
def test_a_default(name: str, default: object) -> None:
    """Nothing set: the contract's default."""
    assert getattr(load({}), name.lower()) == default


@pytest.mark.parametrize(("name", "given", "value"), [(name, *pair) for name, pair in GIVEN.items()])
def test_environment_and_file_say_the_same(name: str, given: str, value: object, tmp_path: Path) -> None:
    """CERTWORKER_<NAME>, or <name> in the file; the environment wins, an empty variable is none."""
    file = toml(tmp_path, f'{name.lower()} = "{given}"')

    assert getattr(load(env(**{name: given})), name.lower()) == value
    assert getattr(load({}, file), name.lower()) == value
    assert getattr(load(env(**{name: ""}), file), name.lower()) == value
    assert getattr(load(env(CONFIG=str(file))), name.lower()) == value


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    """One variable changes one setting, the others stay the file's."""
    file = toml(tmp_path, "concurrency = 4\nscan_interval_secs = 7\nresponder_addresses = ['a:1', 'b:2']\n")
    settings = load(env(CONCURRENCY="9", CONFIG="/nonexistent"), file)

    assert (settings.concurrency, settings.scan_interval_secs) == (9, 7)
    assert settings.responder_addresses == ("a:1", "b:2")


def test_what_follows_from_other_settings(tmp_path: Path) -> None:
    """Data folder, responder and CA bundle each decide about one more."""
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    settings = load(env(DATA_DIR="/srv/cw", RESPONDER_LISTEN="10.0.0.1:80", ACME_CA_BUNDLE=str(bundle)))

    assert settings.database_url == "sqlite:////srv/cw/certworker.db"
    assert settings.kek_file == Path("/srv/cw/kek")
    assert settings.responder_addresses == ("10.0.0.1:80",)
    assert settings.acme_private_ca
    assert not load(env(ACME_CA_BUNDLE=str(bundle), ACME_PRIVATE_CA="false")).acme_private_ca


def test_rate_limits_follow_from_the_kind_of_ca() -> None:
    """A CA of one's own is held off by nothing but the guard, unless told otherwise; what is named is changed."""
    orders = Limit(5, timedelta(seconds=10))

    assert load(env(ACME_PRIVATE_CA="true")).acme_rate_limits == Limits()
    assert load(env(ACME_PRIVATE_CA="true", ACME_RATE_LIMITS="letsencrypt")).acme_rate_limits == budget.LETS_ENCRYPT
    assert load(env(ACME_PRIVATE_CA="true", ACME_RATE_LIMITS="orders=5/10s")).acme_rate_limits == Limits(orders)
    changed = load(env(ACME_RATE_LIMITS="orders=5/10s")).acme_rate_limits
    assert changed == replace(budget.LETS_ENCRYPT, orders=orders)


def test_other_programs_variables_are_not_ours() -> None:
    """Only the prefix counts."""
    assert load({"DATA_DIR": "/x", "XCERTWORKER_SEAL": "off", "PATH": "/bin"}) == load({})


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("DATABASE_URL", "mysql://x/y", "must start with sqlite:/// or postgresql://"),
        ("ACME_DIRECTORY_URL", "http://ca.test/dir", "must be an https URL"),
        ("ACME_DIRECTORY_URL", "https://", "must be an https URL"),
        ("ACME_DIRECTORY_URL", "https://[::1", "invalid IPv6 URL"),
        ("ACME_CA_BUNDLE", "/nonexistent", "there is no such file"),
        ("ACME_CA_BUNDLE", "/", "there is no such file"),
        ("ACME_PRIVATE_CA", "perhaps", "valid boolean"),
        ("ACME_CONTACT", "nobody", "must be e-mail addresses"),
        ("ACME_CONTACT", "tel:5", "must be e-mail addresses"),
        ("ACME_CONTACT", "a@b.test?subject=x", "must be e-mail addresses"),
        ("ACME_TOS_AGREED", "2", "valid boolean"),
        ("ACME_RATE_LIMITS", "orders=5", "limit orders '5': must be a burst and the time of one more"),
        ("ACME_RATE_LIMITS", "runaway=off", "limit runaway 'off': it is what ends a loop of ours"),
        ("KEY_TYPE", "dsa", "'rsa-4096'"),
        ("RESPONDER_LISTEN", "8402", "must be host:port"),
        ("RESPONDER_LISTEN", "::1:8402", "must be host:port"),
        ("RESPONDER_LISTEN", "127.0.0.1:65536", "must be host:port"),
        ("RESPONDER_LISTEN", "127.0.0.1:٣", "must be host:port"),
        ("RESPONDER_LISTEN", "a b:1", "must be host:port"),
        ("RESPONDER_ADDRESSES", ",", "must name at least one host:port"),
        ("RESPONDER_ADDRESSES", "a:1,b", "must be host:port"),
        ("EMBEDDED_NODE", "apache", "'haproxy' or 'nginx'"),
        ("PROXY_RELOAD", "systemctl 'reload", "must be a command line"),
        ("PROXY_RELOAD", " ", "must be a command line"),
        ("PROXY_CHECK", "''", "must be a command line"),
        ("NODE_NAME", "a\nb", "must be printable text"),
        ("NODE_NAME", "n" * 254, "at most 253"),
        ("NODE_SILENT_SECS", "0", "greater than or equal to 1"),
        ("NODE_LISTEN", "8401", "must be host:port"),
        ("NODE_URL", "http://nodes.example.com", "must be an https URL"),
        ("AUTO_PUBLISH", "maybe", "'on' or 'off'"),
        ("DNS_RESOLVER", "9.9.9.9", "must be host:port"),
        ("SEAL", "yes", "'on' or 'off'"),
        ("SCAN_INTERVAL_SECS", "1.5", "valid integer"),
        ("SCAN_INTERVAL_SECS", "86401", "less than or equal to 86400"),
        ("CONCURRENCY", "0", "greater than or equal to 1"),
        ("CONCURRENCY", "many", "valid integer"),
        ("API_LISTEN", "localhost", "must be host:port"),
        ("HEALTH_CHECK_TIMEOUT_MS", "0", "greater than or equal to 1"),
        ("LOG_FORMAT", "xml", "'text' or 'json'"),
        ("LOG_LEVEL", "trace", "'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, rule: str) -> None:
    """The setting, its value and the rule, in one line; nothing that merely follows from it."""
    with pytest.raises(SettingsError, match=re.escape(rule)) as refused:
        load(env(**{name: value}))
    said = str(refused.value)
    assert said.startswith(f"CERTWORKER_{name}")
    assert said.count("CERTWORKER_") == 1
    assert said.isprintable()
    assert name in ("DATABASE_URL",) or repr(value)[:100] in said


def test_all_faults_are_in_one_message(tmp_path: Path) -> None:
    """Also what does not agree with each other, while others are wrong in themselves."""
    file = toml(tmp_path, "log_level = 5\nnonsense = true\n")
    with pytest.raises(SettingsError) as refused:
        load(
            env(
                SEAL="x", ACME_CA_BUNDLE="/nope", ACME_PRIVATE_CA="?", ACME_RATE_LIMITS="x", ACME_EAB_KID="k",
                HEALTH_CHECK_TIMEOUT_MS="20000", UNKNOWN="1",
            ),
            file,
        )  # fmt: skip

    said = str(refused.value)
    for part in ("LOG_LEVEL '5'", "NONSENSE: there is no such setting", "SEAL 'x'", "ACME_CA_BUNDLE '/nope'",
                 "ACME_PRIVATE_CA '?'", "ACME_RATE_LIMITS 'x': limit 'x': must be one of",
                 "UNKNOWN: there is no such setting", "ACME_EAB_KID and ACME_EAB_HMAC_KEY belong together",
                 "HEALTH_CHECK_TIMEOUT_MS must not be longer"):  # fmt: skip
        assert said.count(part) == 1, part
    assert said.count("; ") == 8
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (env(ACME_EAB_KID="k"), "belong together"),
        (env(ACME_EAB_HMAC_KEY="c2VjcmV0"), "belong together"),
        (env(HEALTH_CHECK_INTERVAL_SECS="1"), "HEALTH_CHECK_TIMEOUT_MS must not be longer"),
        (env(HEALTH_CHECK_TIMEOUT_MS="10001"), "HEALTH_CHECK_TIMEOUT_MS must not be longer"),
    ],
)
def test_what_does_not_agree(given: dict[str, str], fault: str) -> None:
    """Each alone would do."""
    with pytest.raises(SettingsError, match=fault):
        load(given)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data_dir = 5", "CERTWORKER_DATA_DIR '5': must be the path"),
        ("data_dir = ['a']", "CERTWORKER_DATA_DIR \"['a']\": must be the path"),
        ('kek_file = "a\\u0000b"', "CERTWORKER_KEK_FILE"),
        ("concurrency = true", "CERTWORKER_CONCURRENCY 'True': must be a whole number"),
        ("acme_contact = 5", "CERTWORKER_ACME_CONTACT '5': must be e-mail addresses"),
        ("[acme_rate_limits]\norders = 5", "CERTWORKER_ACME_RATE_LIMITS \"{'orders': 5}\": must be text"),
        ("responder_addresses = ['a:1', 5]", "CERTWORKER_RESPONDER_ADDRESSES"),
        ("responder_addresses = []", "must name at least one host:port"),
        ("database_url = 7", "CERTWORKER_DATABASE_URL: "),
        ("DATA_DIR = 'x'", "DATA_DIR: settings are written in lower case in the file"),
        ("[acme]\nprofile = 'x'", "CERTWORKER_ACME: there is no such setting"),
        ('"a\\nb" = 1', r"'a\nb': there is no such setting"),
        ("seal = on", "is not TOML: Invalid value"),
        ("seal", "is not TOML"),
        ("seal = 'on'\nseal = 'on'", "is not TOML: Cannot overwrite a value"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, fault: str, tmp_path: Path) -> None:
    """A file can hold what no variable can."""
    with pytest.raises(SettingsError, match=re.escape(fault)) as refused:
        load({}, toml(tmp_path, text))
    assert str(refused.value).isprintable()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, a folder, or not text."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for path, why in ((tmp_path / "none.toml", "No such file"), (tmp_path, "directory"), (binary, "is not TOML")):
        with pytest.raises(SettingsError, match=rf"{re.escape(str(path))}.*{why}"):
            load({}, path)


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    """Not in a message, not in a repr; the value itself is there for who needs it."""
    canary, dsn = "Y2FuYXJ5", "postgresql://cw:hunter2@db/cw"
    settings = load(env(ACME_EAB_KID="kid", ACME_EAB_HMAC_KEY=canary, DATABASE_URL=dsn))
    shown = [repr(settings), str(settings), repr(settings.acme_eab_hmac_key)]
    for wrong in (
        env(ACME_EAB_KID="kid", ACME_EAB_HMAC_KEY=f"not base64 {canary}"),
        env(ACME_EAB_HMAC_KEY=canary, SEAL="x"),
        env(DATABASE_URL=f"mysql{dsn}"),
        env(ACME_DIRECTORY_URL="https://cw:hunter2@ca.test/dir"),
    ):
        with pytest.raises(SettingsError) as refused:
            load(wrong)
        shown += [str(refused.value), repr(refused.value)]
        assert refused.value.__cause__ is None

    assert settings.acme_eab_hmac_key == SecretStr(canary)
    for text in shown:
        assert canary not in text
        assert "hunter2" not in text


def test_settings_do_not_change() -> None:
    """Read once, frozen."""
    with pytest.raises(ValueError, match="frozen"):
        load({}).seal = "off"


def test_what_is_our_own_is_no_upstream() -> None:
    """Every socket that a setting names, the node API's included."""
    own = ("127.0.0.1:8400", "127.0.0.1:8402", "10.0.0.12:8402", "10.0.0.11:8401")
    pool_id = str(UUID(int=1))
    settings = load({"CERTWORKER_NODE_LISTEN": own[3], "CERTWORKER_RESPONDER_ADDRESSES": own[2]})
    target = TargetRow(pool_id, pool_id, own[3], 1, True)
    rows = GatewayRows(pools=(PoolRow(pool_id, "web", "round_robin", None),), targets=(target,))
    defaults = Defaults(
        timedelta(seconds=10), timedelta(seconds=2), settings.responder_addresses, settings.own_addresses
    )

    assert settings.own_addresses == own
    assert [(fault.field, "certworker's own" in fault.rule) for fault in build(rows, defaults).faults] == [
        ("address", True)
    ]
