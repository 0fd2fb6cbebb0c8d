"""`account`: the whole life of an account by hand, with a real CA, and what is said when it cannot be."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from certworker import parts
from certworker.ca.keys import AccountKey
from certworker.ca.transport import Transport
from certworker.cli.pebble import Pebble

from .conftest import Cli, Done

EAB_SECRET = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
DOCUMENT = {
    "id", "directory_url", "account_url", "status", "default", "contact", "tos_agreed_at", "created_at",
}  # fmt: skip


@pytest.fixture
def at(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Have the settings name a CA, whose terms are agreed to."""
    made: list[Transport] = []

    class Remembered(Transport):
        """One whose process does not end with its command."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(parts, "Transport", Remembered)

    def at(ca: Pebble, **settings: str) -> None:
        values = {
            "ACME_DIRECTORY_URL": ca.directory_url,
            "ACME_CA_BUNDLE": str(ca.ca_bundle),
            "ACME_TOS_AGREED": "true",
        }
        for name, value in {**values, **settings}.items():
            monkeypatch.setenv(f"CERTWORKER_{name}", value)

    yield at
    for transport in made:
        transport.close()


def ok(done: Done) -> Done:
    assert (done.code, done.err) == (0, ""), done
    assert "PRIVATE KEY" not in done.out
    assert "cw1." not in done.out
    return done


def listed(cli: Cli) -> list[dict[str, object]]:
    found: list[dict[str, object]] = ok(cli("account", "list", "--json")).json
    return found


def keys(cli: Cli) -> list[str]:
    """Return every account's key as it is stored."""
    rows = cli.sql("SELECT credentials_json FROM acme_accounts ORDER BY created_at")
    return [json.loads(text)["key"] for (text,) in rows]


@pytest.mark.pebble
def test_the_life_of_an_account(
    cli: Cli, at: Callable[..., None], pebble: Pebble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered, told new contacts, given a new key, given up, succeeded; each may be repeated and is audited."""
    at(pebble, ACME_CONTACT="ops@example.com")

    first = ok(cli("account", "register", "--json")).json
    assert set(first) == {"outcome", *DOCUMENT}
    assert (first["outcome"], first["status"], first["default"]) == ("registered", "valid", True)
    assert first["contact"] == ["mailto:ops@example.com"]
    assert first["tos_agreed_at"] is not None
    assert ok(cli("account", "register")).out == (
        f"account {first['account_url']} at {pebble.directory_url} is in order: nothing to do\n"
    )
    monkeypatch.setenv("CERTWORKER_ACME_CONTACT", "new@example.com,second@example.com")
    assert ok(cli("account", "register", "--json")).json["outcome"] == "updated"
    assert listed(cli)[0]["contact"] == ["mailto:new@example.com", "mailto:second@example.com"]

    before = keys(cli)
    changed = ok(cli("account", "rollover", "--json")).json
    assert (changed["outcome"], changed["account_url"]) == ("changed", first["account_url"])
    assert keys(cli) != before
    assert "has a new key" in ok(cli("account", "rollover")).out
    assert ok(cli("account", "register", "--json")).json["outcome"] == "unchanged"

    given_up = ok(cli("account", "deactivate", "--yes", "--json")).json
    assert (given_up["outcome"], given_up["status"]) == ("deactivated", "deactivated")
    assert "`certworker account register --new-key`" in ok(cli("account", "deactivate", "--yes")).out
    for verb in ("register", "rollover"):
        cli("account", verb).refused(1, str(first["account_url"]), "was deactivated", "--new-key", "accounturi")
    second = ok(cli("account", "register", "--new-key", "--json")).json
    assert second["account_url"] != first["account_url"]

    assert [(one["id"], one["status"], one["default"]) for one in listed(cli)] == [
        (second["id"], "valid", True), (first["id"], "deactivated", False),
    ]  # fmt: skip
    table = ok(cli("account", "list")).out
    assert table.startswith("2 accounts")
    assert str(first["account_url"]) in table
    assert cli.audited() == [
        "account.registered", "account.contact", "account.key_changed", "account.key_changed", "account.deactivated",
        "account.replaced", "account.registered",
    ]  # fmt: skip
    assert cli.sql("SELECT DISTINCT actor FROM audit_logs") == [("operator",)]


@pytest.mark.pebble
def test_a_ca_that_was_reset_gets_the_account_again(cli: Cli, at: Callable[..., None], pebble: Pebble) -> None:
    """The same key, the word on CAA, and the pause at the CA ends; while it has the account there is no successor."""
    at(pebble)
    first = ok(cli("account", "register", "--json")).json
    cli("account", "register", "--new-key").refused(2, "--new-key", "is in order", "`certworker account rollover`")
    before = keys(cli)
    pebble.restart()

    for verb in ("rollover", "deactivate"):
        cli("account", verb, *(["--yes"] if verb == "deactivate" else [])).refused(
            1, "knows neither account", "`certworker account register`"
        )
    cli.sql(
        "INSERT INTO ca_breakers (directory_url, state, state_at, probe_at) "
        "VALUES (?, 'paused', '2026-01-01T00:00:00.000000Z', '2999-01-01T00:00:00.000000Z')", pebble.directory_url,
    )  # fmt: skip
    again = ok(cli("account", "register"))

    assert cli.sql("SELECT state FROM ca_breakers") == [("half_open",)]
    assert "is in order again" in again.out
    assert "accounturi" in again.out
    assert keys(cli) == before
    assert listed(cli)[0]["account_url"] != first["account_url"]


@pytest.mark.pebble
def test_nothing_is_done_without_being_sure(
    cli: Cli, at: Callable[..., None], pebble: Pebble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody to ask, a no, or open issuances: the account stays."""
    at(pebble)
    account_id = ok(cli("account", "register", "--json")).json["id"]

    cli("account", "deactivate").refused(2, pebble.directory_url, "give --yes")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: False)
    cli("account", "deactivate").refused(1, "nothing was changed")
    ok(cli("policy", "add", "a.test"))
    ok(cli("renew", "--dry-run"))
    cli.sql("INSERT INTO issuances (id, lineage_id, reason, state_at, attempt_at, account_id) SELECT id, id, 'first', "
            "created_at, created_at, ? FROM lineages", account_id)  # fmt: skip
    cli("account", "deactivate", "--yes").refused(1, "1 open issuance(s) use it", "--force")
    assert listed(cli)[0]["status"] == "valid"
    assert ok(cli("account", "deactivate", "--yes", "--force", "--json")).json["status"] == "deactivated"


@pytest.mark.pebble
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"ACME_TOS_AGREED": "false"}, ("terms", "ACME_TOS_AGREED=true")),
        ({"ACME_EAB_KID": "kid-1", "ACME_EAB_HMAC_KEY": EAB_SECRET[::-1]}, ("unauthorized", "external credentials")),
        ({}, ("externalAccountRequired", "ACME_EAB_KID")),
    ],
    ids=["terms", "wrong key", "no key"],
)
def test_what_the_ca_wants_is_told(
    cli: Cli, at: Callable[..., None], start_pebble: Callable[..., Pebble], settings: dict[str, str],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    """A46: one line with the setting, exit code 1; secrets are neither said nor stored."""
    at(start_pebble(eab={"kid-1": EAB_SECRET}), **settings)

    cli("account", "register").refused(1, *parts)

    stored = str(cli.content()) + str(listed(cli))
    assert not any(secret in stored for secret in (EAB_SECRET, EAB_SECRET[::-1]))


@pytest.mark.pebble
def test_contacts_that_a_ca_refuses_are_told(cli: Cli, at: Callable[..., None], pebble: Pebble) -> None:
    """A45: with the setting; the account that could not be made is made when it is mended."""
    at(pebble, ACME_CONTACT=",".join(f"{n}@example.com" for n in range(3)))
    cli("account", "register").refused(1, "malformed", "too many contacts")
    assert [one["status"] for one in listed(cli)] == ["unregistered"]

    at(pebble, ACME_CONTACT="a@example.com")
    assert ok(cli("account", "register", "--json")).json["outcome"] == "registered"
    assert len(listed(cli)) == 1


def test_without_an_account_there_is_little_to_do(cli: Cli) -> None:
    """Said with the way to one; an unreachable CA is one line, and nothing is stored."""
    content = cli.content()

    assert listed(cli) == []
    assert ok(cli("account", "list")).out.startswith("0 accounts")
    cli("account", "rollover").refused(2, "no account is registered at https://127.0.0.1:9/dir", "account register")
    cli("account", "deactivate", "--yes").refused(2, "no account is registered", "ACME_DIRECTORY_URL")
    cli("account", "register").refused(1, "cannot reach https://127.0.0.1:9/dir", "ACME_DIRECTORY_URL")
    assert cli("account").code == 2
    cli("account", "rollover", "--timeout", "-1").refused(2, "--timeout")
    cli("account", "erase").refused(2, "no such command 'erase'")
    assert cli.content() == content


def test_a_row_of_another_program_is_shown_as_text(cli: Cli) -> None:
    """Whatever it holds: no key, no control character, no traceback."""
    pem = AccountKey.generate().to_pem()
    odd = {
        "key": pem,
        "account_url": "https://ca.test/\x1b[31m\u202e",
        "contact": ["a\nb", 7, pem[:5]],
        "tos_agreed_at": 3,
    }
    for number, document in enumerate(("[]", "7", json.dumps(odd))):
        cli.sql(
            "INSERT INTO acme_accounts (id, directory_url, credentials_json) VALUES (?, 'https://ca.test/dir', ?)",
            f"00000000-0000-4000-8000-00000000000{number}", document,
        )  # fmt: skip

    accounts = listed(cli)
    text = ok(cli("account", "list")).out

    assert [one["status"] for one in accounts] == ["unregistered", "unregistered", "valid"]
    assert [one["default"] for one in accounts] == [True, False, False]
    assert accounts[2]["account_url"] == "https://ca.test/ [31m"
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert pem.splitlines()[1] not in text
