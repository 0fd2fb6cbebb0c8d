"""An operator with a proxy, a configuration and a service manager of their own.

The configuration is the example of docs/operations.md.
"""

import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .conftest import ask, await_true

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def example(kind: str) -> str:
    """Return the operator's configuration as the documentation has it."""
    return OPERATIONS.split(f"<!-- existing: {kind} -->\n```\n", 1)[1].split("\n```\n", 1)[0] + "\n"


@dataclass
class Operator:
    """A person with a proxy, a configuration and a way to reload it."""

    path: Path
    kind: str
    binary: Path
    plain: int
    secure: int
    upstream: int
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.include = self.path / "node" / "include"
        self.config, self.pid = self.path / "proxy.conf", self.path / "proxy.pid"
        self.say(self.reload_script, f"echo reloaded >> {self.path}/reloads\n{self._signal()}")
        self.say(self.check_script, f"exec {self.binary} {self._check()}")
        self.configure(example(self.kind))

    @property
    def reload_script(self) -> Path:
        return self.path / "reload"

    @property
    def check_script(self) -> Path:
        return self.path / "check"

    def say(self, script: Path, text: str) -> None:
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o700)

    def _signal(self) -> str:
        return f"exec kill -{'USR2' if self.kind == 'haproxy' else 'HUP'} $(cat {self.pid})"

    def _files(self) -> list[str]:
        if self.kind == "haproxy":
            return ["-f", str(self.config), "-f", str(self.include / "haproxy.cfg")]
        return ["-c", str(self.config), "-p", f"{self.path}/", "-e", "stderr"]

    def _check(self) -> str:
        return " ".join([{"haproxy": "-c", "nginx": "-t"}[self.kind], *self._files()])

    def configure(self, text: str) -> None:
        """Write the configuration, with this machine's paths and ports."""
        text = text.replace("/var/lib/certworker/node/include", str(self.include))
        for port, ours in (("80", self.plain), ("443", self.secure)):
            text = re.sub(rf"(bind :|listen ){port}\b", rf"\g<1>{ours}", text)
        text = text.replace("127.0.0.1:8080", f"127.0.0.1:{self.upstream}")
        if self.kind == "nginx":
            temp = "".join(
                f"{what}_temp_path {self.path}/{what};" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            text = f"pid {self.pid};\nerror_log stderr;\nevents {{ }}\nhttp {{\naccess_log off;{temp}\n{text}}}\n"
        self.config.write_text(text)

    def start(self) -> None:
        """Start the proxy as a service manager would."""
        extra = ["-W", "-p", str(self.pid)] if self.kind == "haproxy" else ["-g", "daemon off;"]
        with (self.path / "proxy.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binary), *self._files(), *extra], stdout=log, stderr=log, start_new_session=True
            )
        await_true(self.is_up, "the operator's proxy listens")
        await_true(self.pid.is_file, "the operator's proxy has a pid file")

    def is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.path / "proxy.log").read_text()
        try:
            return ask(self.plain)[0] > 0
        except OSError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None

    def count_reloads(self) -> int:
        path = self.path / "reloads"
        return len(path.read_text().splitlines()) if path.exists() else 0
