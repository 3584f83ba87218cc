"""JSON logs on stderr, one event per line."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

LOGGER = logging.getLogger("paddlemix_qwenvl_plugin.serve")

# Name of the attribute of a log record that contains the event's fields.
_FIELDS = "qwenvl_fields"


def log(level: int, event: str, **fields: Any) -> None:
    """Log an event of the server.

    Args:
        event: constant name of the event, a few words.
        fields: variable data, JSON-serializable.
    """
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, event, extra={_FIELDS: fields})


def start_logging(level: str) -> None:
    """Send the records of all loggers of this process, uvicorn's included, to stderr as JSON.

    Args:
        level: minimum level of the server's records: debug, info, warning or error. That of other loggers is warning,
            except asyncio's, which is error, and uvicorn's, which is error if `level` is.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(level.upper())
    # The server logs its own start and end.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, LOGGER.level))
    # Not logged: asyncio warns about each client that disconnects while data is sent to it.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """Formatter that writes a record as a JSON object: time, level, logger, event, fields, traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of JSON."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=True, default=str)
