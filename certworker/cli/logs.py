"""Logs on stderr: one event per line, text for people, JSON for machines."""

import logging
import sys
from functools import cached_property

from certworker.settings import Settings


def start_logging(settings: Settings, *, at_least: int = logging.DEBUG) -> None:
    """Send every log line of the program, those below `at_least` left out, to stderr in the settings' format."""
    handler = logging.StreamHandler(sys.stderr)
    text = settings.log_format == "text" or (settings.log_format is None and sys.stderr.isatty())
    handler.setFormatter(_Formatter(text))
    level = max(logging.getLevelNamesMapping()[settings.log_level.upper()], at_least)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # A library's debug lines show what it sends and receives, tokens included.
    for noisy in ("uvicorn", "asyncio", "apscheduler", "sqlalchemy", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    """Prints lines with structlog, which is imported for the first of them: many a command has none."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        self._text = text

    def format(self, record: logging.LogRecord) -> str:
        return self._printer.format(record)

    @cached_property
    def _printer(self) -> logging.Formatter:
        from structlog.dev import ConsoleRenderer
        from structlog.processors import JSONRenderer, TimeStamper, format_exc_info
        from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level

        last = ConsoleRenderer(colors=sys.stderr.isatty()) if self._text else JSONRenderer()
        return ProcessorFormatter(
            foreign_pre_chain=[add_log_level, ExtraAdder(), TimeStamper(fmt="iso", utc=True)],
            processors=[ProcessorFormatter.remove_processors_meta, format_exc_info, last],
        )
