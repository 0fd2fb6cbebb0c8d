"""What the demo prints: titles of acts, commands, lines of progress, proofs.

Colours on a terminal, plain text anywhere else.
"""

from rich.console import Console
from rich.text import Text

_INDENT = "   "


class Screen:
    """Prints line by line, so that a pipe sees everything at once too."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._acts = 0

    def title(self, text: str) -> None:
        """Print what this is about."""
        self._console.print(Text(text, style="bold"))

    def act(self, text: str) -> None:
        """Open the next act."""
        self._acts += 1
        self._console.print()
        self._console.print(Text.assemble((f"{self._acts}. ", "cyan"), (text, "bold")))

    def note(self, text: str) -> None:
        """Say something in passing."""
        self._console.print(Text(_INDENT + text, style="dim"))

    def fact(self, name: str, value: str) -> None:
        """Name a thing."""
        self._console.print(Text.assemble(_INDENT, (f"{name:<14} ", "cyan"), value))

    def command(self, text: str, output: str = "") -> None:
        """Show a command as it was typed, and what it said."""
        self._console.print(Text.assemble(_INDENT, ("$ ", "dim"), (text, "bold")))
        self.output(output)

    def output(self, text: str) -> None:
        """Show what a command said."""
        for line in text.splitlines():
            self._console.print(Text(f"{_INDENT}  {line}"))

    def file(self, name: str, content: str) -> None:
        """Show a file that was written."""
        self._console.print(Text.assemble(_INDENT, (name, "cyan")))
        for line in content.strip().splitlines():
            self._console.print(Text(f"{_INDENT}  {line}", style="dim"))

    def step(self, seconds: float, name: str, meaning: str) -> None:
        """Show one state of a thing that moves, and when it was reached."""
        self._console.print(
            Text.assemble(_INDENT, (f"+{seconds:5.2f} s  ", "dim"), (f"{name:<17}", "green"), (meaning, "default"))
        )

    def proof(self, text: str) -> None:
        """Say what was shown to be so."""
        self._console.print(Text.assemble(_INDENT, ("✓ ", "bold green"), text))

    def trouble(self, text: str) -> None:
        """Say what did not go well."""
        self._console.print(Text.assemble(_INDENT, ("! ", "bold red"), text))
