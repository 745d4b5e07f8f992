"""What every measurement ends with: where and when it was made, and its file."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from selfforcing_core.atomic import replacing


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write(told: dict[str, Any], out: Path | None) -> str:
    """The report as JSON, also in the file `out` if one is named, complete or not at all."""
    text = json.dumps(told, indent=1)
    if out is not None:
        with replacing(out) as temporary:
            Path(temporary).write_text(text + "\n")
    return text
