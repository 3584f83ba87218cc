"""Logs as JSON, a line an event, on stderr."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

LOGGER = logging.getLogger("paddlemix_qwenvl_plugin.serve")

_FIELDS = "qwenvl_fields"


def log(level: int, event: str, **fields: Any) -> None:
    """Log an event of the server.

    Args:
        event: a few words, the same each time.
        fields: what varies, as JSON has it.
    """
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, event, extra={_FIELDS: fields})


def start_logging(level: str) -> None:
    """Have all loggers of this process, uvicorn's included, write JSON to stderr.

    Args:
        level: debug, info, warning or error.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(level.upper())
    # What uvicorn says of its start and end is said by us.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, LOGGER.level))
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """A JSON object a record: time, level, logger, event, its fields, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
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
