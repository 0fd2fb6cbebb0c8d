"""Logs on stderr: one event per line, text for people, JSON for machines."""

import logging
import sys

import structlog

from certworker.settings import Settings

_SHARED: list[structlog.typing.Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def start_logging(settings: Settings, *, at_least: int = logging.DEBUG) -> None:
    """Send every log line of the program, those below `at_least` left out, to stderr in the settings' format."""
    text = settings.log_format == "text" or (settings.log_format is None and sys.stderr.isatty())
    last: structlog.typing.Processor
    last = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text else structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            last,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    level = max(logging.getLevelNamesMapping()[settings.log_level.upper()], at_least)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # A library's debug lines show what it sends and receives, tokens included.
    for noisy in ("uvicorn", "asyncio", "apscheduler", "sqlalchemy", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
