"""`node` and `agent`, as typed."""

from tempfile import TemporaryDirectory

import pytest

from certworker.core.transit import read_enrolment_token

from .conftest import Cli, Done

pytestmark = pytest.mark.check


def ok(cli: Cli, *words: str) -> Done:
    done = cli(*words)
    assert done.code == 0, done
    return done


def test_enroll_prints_one_word(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """That has all a machine needs; what to do with it stands on stderr."""
    monkeypatch.setenv("CERTWORKER_NODE_LISTEN", "192.0.2.1:8401")
    done = ok(cli, "node", "enroll", "gw1")
    document = ok(cli, "node", "enroll", "gw2", "--canary", "--url", "https://gw.example.com", "--json").json
    token, other = read_enrolment_token(done.out.strip()), read_enrolment_token(document["token"])

    assert (token.name, token.url) == ("gw1", "https://192.0.2.1:8401")
    assert "certworker agent --enroll" in done.err
    assert (other.name, other.url, document["canary"]) == ("gw2", "https://gw.example.com", True)
    assert other.pin == token.pin


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a b"], "letters and digits"),
        ([""], "letters and digits"),
        (["-x"], "no such option"),
        (["gw1", "--url", "http://192.0.2.1"], "must be an https URL"),
        (["gw1", "--url", "https://u:p@host"], "must be an https URL"),
        (["gw1", "--url", "https://0.0.0.0:8401"], "NODE_URL"),
        (["gw1", "--url", "https://[::]:8401"], "NODE_URL"),
        (["gw1", "--url", "https://host:99999"], "must be an https URL"),
        (["gw1"], "set NODE_LISTEN"),
    ],
)
def test_what_enroll_refuses(cli: Cli, words: list[str], said: str) -> None:
    """Before anything is stored."""
    cli("node", "enroll", *words).refused(2, said)


def test_an_invitation_is_listed_and_can_be_taken_back(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token would make a node until its time is over."""
    monkeypatch.setenv("CERTWORKER_NODE_LISTEN", "127.0.0.1:8401")
    ok(cli, "node", "enroll", "gw7")
    (invited,) = ok(cli, "node", "list", "--json").json["invited"]
    assert invited["name"] == "gw7"
    assert "gw7: invited until" in ok(cli, "node", "list").out

    ok(cli, "node", "remove", "gw7")

    assert ok(cli, "node", "list", "--json").json["invited"] == []
    assert "node.removed" in cli.audited()
    cli("node", "remove", "gw7").refused(2, "there is no node 'gw7'")


def test_a_name_is_one_nodes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node that reports under it is not shadowed."""
    monkeypatch.setenv("CERTWORKER_NODE_LISTEN", "127.0.0.1:8401")
    cli.sql(
        "INSERT INTO node_status (id, node_id, heartbeat_at, metadata) VALUES"
        " ('7a0c0c5e-7a53-4f43-9f53-0a2b8d8f1c11', 'box', '2026-11-22T12:00:00.000000Z', '[1]')"
    )
    cli("node", "enroll", "box").refused(2, "has reported already")
    (listed,) = ok(cli, "node", "list", "--json").json["nodes"]
    assert (listed["name"], listed["canary"], listed["version"], listed["error"]) == ("box", False, None, None)
    assert "box" in ok(cli, "node", "list").out

    ok(cli, "node", "remove", "box")
    cli("node", "remove", "box").refused(2, "there is no node 'box'")
    ok(cli, "node", "enroll", "box")


def test_an_agent_without_a_token(cli: Cli) -> None:
    """Says what to do; a wrong token is not shown."""
    with TemporaryDirectory(prefix="cw-") as folder:  # its path has room for a socket's
        assert_a_token_is_asked_for(cli, folder)


def assert_a_token_is_asked_for(cli: Cli, folder: str) -> None:
    cli("agent", "--folder", folder).refused(2, "certworker node enroll NAME")
    refused = cli("agent", "--folder", folder, "--enroll", "cwe1.c2VjcmV0")
    refused.refused(2, "the enrolment token")
    assert "c2VjcmV0" not in refused.err
    cli("agent", "--folder", "x" * 200).refused(1, "too long for the path of a socket")


def test_an_agent_beside_a_proxy_of_its_own(cli: Cli) -> None:
    """Its commands are looked at before anything is done."""
    with TemporaryDirectory(prefix="cw-") as folder:
        assert_commands_are_looked_at(cli, folder)


def assert_commands_are_looked_at(cli: Cli, folder: str) -> None:
    cli("agent", "--folder", folder, "--check", "nginx -t").refused(2, "say --reload too")
    cli("agent", "--folder", folder, "--reload", "systemctl 'reload").refused(2, "must be a command line")
    cli("agent", "--folder", folder, "--reload", "no-such-program -x").refused(2, "no program 'no-such-program'")
    cli("agent", "--folder", folder, "--reload", "true").refused(2, "certworker node enroll NAME")
