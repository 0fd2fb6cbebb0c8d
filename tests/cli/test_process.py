"""What a command that runs for long asks of its process."""

import subprocess
import sys

THREADS = """
import ctypes, threading, tempfile
from certworker.cli.process import share_memory
share_memory()
libc, all_there = ctypes.CDLL(None), threading.Barrier(12)
def work():
    all_there.wait()  # each has to have a place of its own while the others are there
    libc.free(ctypes.c_void_p(libc.malloc(5000)))
    all_there.wait()
libc.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with tempfile.TemporaryFile() as told:
    libc.fdopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fdopen(told.fileno(), b"w"))
    libc.malloc_info(0, stream)
    libc.fflush(stream)
    told.seek(0)
    print(told.read().count(b"<heap nr="))
"""


def test_threads_share_memory() -> None:
    """However many there are: glibc would give each a place of its own, up to eight for each core."""
    with_it = subprocess.check_output([sys.executable, "-c", THREADS], text=True)
    without = subprocess.check_output([sys.executable, "-c", THREADS.replace("\nshare_memory()", "")], text=True)

    assert int(with_it) <= 2 < int(without)
