"""Report of the doctor: checks with a status, a message and, if known, the command that fixes the problem."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Optional

from paddlemix_qwenvl_plugin.version import __version__

SCHEMA = 1  # version of the JSON form
Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """Result of one check.

    `name` is unique in a report, `fix` is a shell command, and `data` contains JSON-ready values whose keys depend only
    on `name` (see docs/doctor.md).
    """

    name: str
    status: Status
    message: str
    fix: Optional[str] = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All checks, in a fixed order."""

    checks: tuple[Check, ...]

    def count(self, status: Status) -> int:
        """Count the checks with this status."""
        return sum(check.status == status for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as `qwenvl doctor --json` prints it."""
        return {
            "schema": SCHEMA,
            "plugin": __version__,
            "notes": self.count("note"),
            "problems": self.count("problem"),
            "checks": [asdict(check) for check in self.checks],
        }
