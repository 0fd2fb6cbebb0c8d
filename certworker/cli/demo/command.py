"""The command itself."""

import click

from certworker.cli.demo.show import Screen
from certworker.cli.demo.stage import check_tools
from certworker.cli.demo.story import tell


@click.command()
@click.option("--keep", is_flag=True, help="Leave everything running to look around, until Ctrl-C.")
def demo(keep: bool) -> None:
    """The main job on Pebble and HAProxy on this machine.

    A policy row becomes a certificate that a real proxy serves, and is renewed without one failed request.
    Everything lives in a temporary folder and on free ports, and is gone at the end.
    """
    check_tools()
    tell(Screen(), keep=keep)
