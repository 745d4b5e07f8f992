"""What every measurement ends with: where and when it was made, and its file."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from selfforcing_core.atomic import replacing


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write(report: dict[str, Any], out: Path | None) -> str:
    """Write a report to the file `out` if one is named, whole or not at all, and return it as JSON."""
    text = json.dumps(report, indent=1)
    if out is not None:
        with replacing(out) as temporary:
            Path(temporary).write_text(text + "\n")
    return text
