"""`demo`: the main job on this machine, with a real CA, a real proxy and a real client.

`story` tells it act by act, `stage` holds what is there before certworker does anything, `service` runs and
follows it, `visitor` is the client that has to be convinced, `show` prints, `interrupts` is Ctrl-C.
"""

from certworker.cli.demo.command import demo

__all__ = ["demo"]
