"""TCP between two network namespaces, through a socket in the file system, which all of them share."""

import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path


def relay(listener: socket.socket, family: socket.AddressFamily, address: object) -> None:
    """Pass on every connection of `listener` to `address`, until the listener is closed."""
    with suppress(OSError):
        while True:
            near, _ = listener.accept()
            far = socket.socket(family, socket.SOCK_STREAM)
            try:
                far.connect(address)
            except OSError:
                near.close()
                far.close()
                continue
            threading.Thread(target=_join, args=(near, far), daemon=True).start()


def _join(near: socket.socket, far: socket.socket) -> None:
    with near, far:
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Gate:
    """The host's end: what comes in at `path` goes to a loopback port, while the gate is open."""

    def __init__(self, path: Path, port: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=relay, args=(self._listener, socket.AF_INET, ("127.0.0.1", port)), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


if __name__ == "__main__":
    # The other end, inside a namespace: PORT PATH
    inside = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    print("up", flush=True)
    relay(inside, socket.AF_UNIX, sys.argv[2])
