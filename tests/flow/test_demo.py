"""`certworker demo` as a person runs it: what it proves, and that nothing of it is left."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from certworker.cli.main import run

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]

_LIMIT = 90.0
_DRAIN_LIMIT = 45.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder of the demo's own, with a short path."""
    path = Path("/tmp") / f"cw-test-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()  # which fails if anything is left in it


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo as `make demo` does."""
    command = [sys.executable, "-m", "certworker", "demo", *options]
    # Its processes inherit the first, whoever becomes their parent; the second must not lead them astray.
    environment = os.environ | {"TMPDIR": str(folder), "CERTWORKER_DATA_DIR": "/nonexistent"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of everything that runs in, or was told of, the demo's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if int(path.name) != os.getpid() and str(folder).encode() in command + environment:
            found.append(f"{path.name} {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def test_the_whole_story(folder: Path) -> None:
    """A refused handshake, every state in order, a verified answer, another leaf, no failed request, nothing left."""
    with started(folder) as process:
        output, errors = process.communicate(timeout=_LIMIT)

    assert (process.returncode, errors) == (0, "")
    assert "unrecognized name" in output
    states = re.findall(r"\+ *[0-9.]+ s  (\w+)", output)
    first = states[: states.index("served") + 1]
    assert [first[0], *first[-4:]] == ["queued", "validating", "finalizing", "done", "served"]
    assert {"order_intent", "ordered"} <= set(first)
    assert re.search(r"TLSv1\.[23], chain and name verified, status 200", output)
    leaves = re.findall(r"✓ leaf ([0-9a-f]{64})", output)
    assert len(set(leaves)) == len(leaves) == 2
    counted = re.search(r"(\d+) requests, 0 failed: (\d+) shown the first leaf, (\d+) the second", output)
    assert counted is not None
    assert int(counted[1]) == int(counted[2]) + int(counted[3])
    assert min(int(counted[2]), int(counted[3])) >= 25
    assert "2 certificates" in output
    assert "\x1b" not in output  # plain when nobody watches
    assert processes_of(folder) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("database schema", signal.SIGINT),
        ("validating", signal.SIGINT),
        ("certworker renew", signal.SIGINT),
        ("validating", signal.SIGTERM),
    ],
)
def test_an_interrupt_ends_everything(folder: Path, moment: str, number: signal.Signals) -> None:
    """Exit code 130, no process, no folder; a second Ctrl-C does not disturb the end."""
    with started(folder) as process:
        assert process.stdout is not None
        assert any(moment in line for line in process.stdout), process.communicate(timeout=_DRAIN_LIMIT)[1]
        process.send_signal(number)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=_DRAIN_LIMIT)

    assert (process.returncode, errors.strip()) == (130, "")
    assert "interrupted" in rest
    assert processes_of(folder) == []


def test_keep_stays_up_until_ctrl_c(folder: Path) -> None:
    """The command it prints works while it waits, and the end is as clean as ever."""
    with started(folder, "--keep") as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if "certworker renew" in line and "--force" in line and "/bin/" in line:
                break
        else:
            pytest.fail(f"the demo ended: {process.communicate(timeout=_DRAIN_LIMIT)[1]}")
        curl = next(line.removeprefix("$ ") for line in lines if line.startswith("$ curl"))
        answer = subprocess.run([*curl.split(), "--silent"], capture_output=True, text=True, timeout=20, check=True)
        settings = next(line.removeprefix("$ export ") for line in lines if line.startswith("$ export"))
        name, _, value = settings.partition("=")
        status = subprocess.run(
            [sys.executable, "-m", "certworker", "status"], env=os.environ | {name: value},
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=_DRAIN_LIMIT)

    assert "hello from the upstream" in answer.stdout
    assert "shop.demo.test" in status.stdout
    assert (process.returncode, errors) == (0, "")
    assert "Summary" in rest
    assert processes_of(folder) == []


def test_a_service_that_dies_is_told_of_and_leaves_nothing(folder: Path) -> None:
    """Exit code 1 and one line; the proxy that outlived its agent is ended too."""
    with started(folder) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "service" in line and "process" in line)
        found = re.search(r"process (\d+)", line)
        assert found is not None
        os.kill(int(found[1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=_DRAIN_LIMIT)

    assert process.returncode == 1
    assert errors.startswith("certworker: ")
    assert errors.count("\n") == 1
    assert processes_of(folder) == []


@pytest.mark.parametrize("tool", ["haproxy", "pebble"])
def test_a_missing_tool_is_named(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what installs it, exit code 2."""
    monkeypatch.setattr("certworker.cli.demo.stage.find_haproxy", lambda: None if tool == "haproxy" else "/bin/true")
    monkeypatch.setattr("certworker.cli.demo.stage._has_pebble", lambda name: tool != name)

    assert run(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"certworker: {tool}: not installed")
    assert "make demo" in said
