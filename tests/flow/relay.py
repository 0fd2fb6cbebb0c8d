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


def listen_at(path: Path) -> socket.socket:
    """Return a listener in the file system."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener


class Relay:
    """The host's end: what comes in at `listener` goes to `address`, until it is closed."""

    def __init__(self, listener: socket.socket, family: socket.AddressFamily, address: object) -> None:
        self._listener = listener
        threading.Thread(target=relay, args=(listener, family, address), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def leave_by(path: Path, port: int) -> Relay:
    """Let a namespace reach a loopback port of the host."""
    return Relay(listen_at(path), socket.AF_INET, ("127.0.0.1", port))


def come_in_by(path: Path, address: str, port: int) -> Relay:
    """Let the host reach a loopback port of a namespace, under an address of its own."""
    return Relay(socket.create_server((address, port)), socket.AF_UNIX, str(path))


if __name__ == "__main__":
    # The other end, inside a namespace: any number of out:PORT:PATH and in:PORT:PATH
    for word in sys.argv[1:]:
        way, port, path = word.split(":", 2)
        if way == "out":
            Relay(socket.create_server(("127.0.0.1", int(port))), socket.AF_UNIX, path)
        else:
            Relay(listen_at(Path(path)), socket.AF_INET, ("127.0.0.1", int(port)))
    print("up", flush=True)
    threading.Event().wait()
