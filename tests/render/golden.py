"""The golden folders. `python -m tests.render.golden` writes what the renderers print now; read the diff."""

import json
from pathlib import Path

from certworker.core.snapshot import Snapshot, read_snapshot
from certworker.render import haproxy, nginx
from certworker.render.haproxy import HaproxyOptions, render_haproxy
from certworker.render.nginx import NginxOptions, render_nginx

GOLDEN = Path(__file__).parent / "golden"
FOLDER = "/srv/gateway"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"
ADDRESSES = {"app.internal": ("192.0.2.1", "2001:db8::1")}


def load(case: str) -> Snapshot:
    return read_snapshot(json.loads((GOLDEN / case / "snapshot.json").read_text()))


def print_haproxy(case: str, folder: str = FOLDER) -> bytes:
    return render_haproxy(load(case), HaproxyOptions(folder, number=42)).files[haproxy.CONFIG].content


def print_nginx(
    case: str, folder: str = FOLDER, stream_module: str | None = STREAM_MODULE, version: tuple[int, ...] = (1, 22)
) -> bytes:
    options = NginxOptions(folder, number=42, version=version, stream_module=stream_module, addresses=ADDRESSES)
    return render_nginx(load(case), options).files[nginx.CONFIG].content


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / name / haproxy.CONFIG).write_bytes(print_haproxy(name))
        (GOLDEN / name / nginx.CONFIG).write_bytes(print_nginx(name))
