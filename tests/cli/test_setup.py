"""`init`, `db`, and what every command does when the database or the key is not as it should be."""

import base64
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from certworker.cli.process import stop_signal

from .conftest import COMMANDS, LIMIT, Cli

SERVED_BY_A_DATABASE = [("policy", "list"), ("status",), ("renew",), ("config", "export"), ("run",), ("db", "check"),
                        ("db", "upgrade")]  # fmt: skip


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}


def test_init_makes_everything_once(bare: Cli) -> None:
    """Folder, key and database, for nobody else to read, whatever the umask; repeating it changes nothing."""
    before = os.umask(0)
    try:
        first = bare("init")
    finally:
        os.umask(before)
    content, key = bare.content(), (bare.data / "kek").read_bytes()
    second = bare("init")

    assert (first.code, first.err) == (0, "")
    assert "made data folder" in first.out
    assert "made key-encryption key" in first.out
    assert "made database schema" in first.out
    found = modes(bare.data)
    assert {"data", "certworker.db", "kek"} <= set(found)
    assert found.pop("data") == 0o700
    assert set(found.values()) == {0o600}
    assert (second.code, second.out, second.err) == (0, "nothing to do: everything is there\n", "")
    assert bare.content() == content
    assert (bare.data / "kek").read_bytes() == key


def test_init_without_sealing_makes_no_key(bare: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """SEAL=off needs none, and works without."""
    monkeypatch.setenv("CERTWORKER_SEAL", "off")

    assert bare("init").code == 0
    assert not (bare.data / "kek").exists()
    assert bare("policy", "add", "a.test").code == 0


@pytest.mark.parametrize("command", SERVED_BY_A_DATABASE, ids=" ".join)
def test_a_missing_database_is_not_made_by_the_way(bare: Cli, command: tuple[str, ...]) -> None:
    """One line that says what to run; nothing appears."""
    bare(*command).refused(2, "there is no database", str(bare.database), "certworker init")
    assert not bare.data.exists()


@pytest.mark.parametrize("command", [("policy", "list"), ("status",), ("renew",), ("run",), ("init",)], ids=" ".join)
def test_another_key_is_found_before_any_work(cli: Cli, command: tuple[str, ...]) -> None:
    """A key that is not the database's: one line, exit code 2, nothing changed, nothing of the key shown."""
    content = cli.content()
    other = base64.b64encode(bytes(32))
    (cli.data / "kek").write_bytes(other)

    done = cli(*command)
    done.refused(2, "key-encryption key")
    assert other.decode() not in done.err
    assert cli.content() == content


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "cannot read the key-encryption key"),
        (b"x", 0o600, "kek"),
        (b"", 0o600, "kek"),
        (b"\xff" * 45, 0o600, "kek"),
        (base64.b64encode(bytes(32)), 0o644, "can be read by others"),
    ],
)
def test_a_bad_key_file_is_one_line(cli: Cli, content: bytes | None, mode: int, said: str) -> None:
    """Missing, cut, garbage, or open to others."""
    key = cli.data / "kek"
    key.unlink()
    if content is not None:
        key.write_bytes(content)
        key.chmod(mode)

    cli("status").refused(2, said, str(key))


def test_init_does_not_hide_a_lost_key(cli: Cli) -> None:
    """A new key beside a sealed database would only look as if all were well."""
    (cli.data / "kek").unlink()

    cli("init").refused(2, "restore that file from your backup")
    assert not (cli.data / "kek").exists()


def test_settings_faults_are_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, exit code 2."""
    monkeypatch.setenv("CERTWORKER_SEAL", "perhaps")
    monkeypatch.setenv("CERTWORKER_TYPO", "1")

    cli("status").refused(2, "CERTWORKER_SEAL 'perhaps'", "CERTWORKER_TYPO: there is no such setting")


def test_a_settings_file_can_be_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config, or CERTWORKER_CONFIG."""
    file = cli.folder / "cw.toml"
    file.write_text(f'data_dir = "{cli.data}"\n')
    monkeypatch.delenv("CERTWORKER_DATA_DIR")

    assert cli("--config", str(file), "policy", "list", "--json").json == []
    cli("--config", str(file) + "x", "policy", "list").refused(2, "cannot read the settings file", "No such file")


def test_check_and_upgrade(cli: Cli) -> None:
    """A schema that fits is left alone; one that was changed is told of, exit code 1."""
    fits = cli("db", "check", "--json")
    assert (fits.code, fits.json["fits"], fits.json["differences"]) == (0, True, [])
    assert cli("db", "check").out == f"schema {fits.json['revision']} fits\n"
    assert cli("db", "upgrade").out == f"schema {fits.json['revision']}\n"

    cli.sql("ALTER TABLE listeners ADD COLUMN extra TEXT")
    broken = cli("db", "check", "--json")
    assert (broken.code, broken.json["fits"]) == (1, False)
    assert "extra" in " ".join(broken.json["differences"])


def test_a_schema_of_another_release_stops_every_command(cli: Cli) -> None:
    """One line that says what to run."""
    cli.sql("UPDATE alembic_version SET version_num = '9999'")

    cli("policy", "list").refused(1, "9999")


def test_one_service_at_a_time(cli: Cli) -> None:
    """A second `run`, and a migration, end with exit code 3 and say which process holds the database."""
    service = cli.start_service()
    second = cli.start("run")
    said = second.communicate(timeout=LIMIT)[1]

    assert second.returncode == 3
    assert said.splitlines()[-1].startswith("certworker: ")
    assert str(service.pid) in said.splitlines()[-1]
    cli("db", "upgrade").refused(3, str(service.pid))
    assert cli("status").code == 0
    assert cli("policy", "add", "meanwhile.test").code == 0

    service.send_signal(signal.SIGTERM)
    service.communicate(timeout=LIMIT)
    assert service.returncode == 0
    assert cli("db", "upgrade").code == 0


def test_ctrl_c_ends_the_service_with_130(cli: Cli) -> None:
    """It drains as on SIGTERM, and the database is free again."""
    service = cli.start_service()
    service.send_signal(signal.SIGINT)
    said = service.communicate(timeout=LIMIT)[1]

    assert service.returncode == 130
    assert "Traceback" not in said
    assert cli("db", "upgrade").code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_stop_signal_is_lost(number: signal.Signals) -> None:
    """One that comes before anybody waits is waited for no more; afterwards all is as it was."""
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with stop_signal() as await_signal:
        os.kill(os.getpid(), number)
        assert await_signal() == number

    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before


ENDLESS_STOP = """
import os, signal, sys, threading
from certworker.cli.process import stop_signal
with stop_signal(limit=float(sys.argv[1])) as await_signal:
    print("up", flush=True)
    await_signal()
    print("stopping", flush=True)
    threading.Event().wait()
"""


@contextmanager
def endless_stop(limit: float) -> Iterator[subprocess.Popen[str]]:
    """Give a process that has been sent SIGTERM and whose stop does not come to an end by itself."""
    command = [sys.executable, "-c", ENDLESS_STOP, str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        yield process
        process.kill()


def test_a_stop_has_an_end() -> None:
    """What holds it up is left as it is; a line says so."""
    with endless_stop(limit=0.2) as process:
        _, said = process.communicate(timeout=LIMIT)

    assert process.returncode == 1
    assert "service.stop_given_up" in said


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(second: signal.Signals, code: int) -> None:
    """Unless it comes so soon that it is the first one again: timeout(1) sends its own twice."""
    with endless_stop(limit=LIMIT) as process:
        process.send_signal(second)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.1)
        process.send_signal(second)

        assert process.wait(5) == code


@pytest.mark.parametrize("setting", ["API_LISTEN", "RESPONDER_LISTEN"])
def test_a_port_that_is_taken_is_one_clear_error(cli: Cli, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """The service does not start halfway, and leaves the database free."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        monkeypatch.setenv(f"CERTWORKER_{setting}", address)
        service = cli.start("run")
        said = service.communicate(timeout=LIMIT)[1]

    assert service.returncode == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("certworker: ")
    assert address.rpartition(":")[2] in said.splitlines()[-1]
    assert cli("db", "upgrade").code == 0


def test_a_restored_database_begins_a_new_epoch(cli: Cli) -> None:
    """Nodes compare everything then; and no version gets a number that was given out since the backup."""
    done = cli("db", "restored")

    counters = dict(cli.sql("SELECT name, value FROM counters"))
    assert done.out == f"epoch {counters['epoch']}: every node compares what it holds with this database\n"
    assert counters["config_version"] == 10_000
    assert cli.audited() == ["database.restored"]


# -- what holds for all commands -----------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(bare: Cli, command: tuple[str, ...]) -> None:
    """-h and --help, before anything exists; the first line is a whole sentence."""
    for flag in ("-h", "--help"):
        done = bare(*command, flag)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"Usage: certworker {' '.join(command)} ")
        assert done.out.splitlines()[2].strip().rstrip(".:")
    assert not bare.data.exists()


def test_the_overview_lists_every_command(bare: Cli) -> None:
    """And the version is there to ask for."""
    listed = bare("--help").out

    assert all(f"\n  {name[0]} " in listed for name in COMMANDS)
    assert bare("--version").out.startswith("certworker, version ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "no such command 'nonsense'"),
        (["policy", "add"], "missing argument 'NAME...'"),
        (["policy", "add", "a.test", "--mode", "x"], "'x' is not one of 'auto', 'manual'"),
        (["policy", "list", "--yaml"], "no such option"),
        (["renew", "--timeout", "-1"], "'--timeout'"),
        (["status", "a.test", "b.test"], "unexpected extra argument"),
        (["config", "apply"], "missing argument 'FILE'"),
    ],
)
def test_wrong_use_is_one_line(bare: Cli, arguments: list[str], said: str) -> None:
    """Exit code 2, and where to read more."""
    bare(*arguments).refused(2, said, "--help`")


def test_a_group_alone_shows_its_commands(bare: Cli) -> None:
    """Exit code 2, as wrong use has."""
    done = bare("policy")

    assert done.code == 2
    assert "Usage: certworker policy" in done.err


def test_an_interrupt_is_130(bare: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any command."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("certworker.cli.policy.wiring.open_app", interrupted)
    assert bare("policy", "list").code == 130
