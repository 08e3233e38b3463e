"""Reports as JSON files, which replace earlier reports alone."""

import json
import math
from pathlib import Path
from typing import Any

from tripletjax.learn.files import part_within, write_json

# Every report begins its entry "what" with this prefix.
PREFIX = "tripletjax "


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write a report, which may replace an earlier report.

    Raises:
        FileExistsError: if the file exists and is not a report.
    """
    check_replaceable(file)
    write_json(file, report)


def check_empty(out: Path) -> None:
    """Raise FileExistsError if a path exists and is not an empty directory.

    A killed process may have left a part of a report, which `filled` removes.
    """
    if not out.exists():
        return
    if not out.is_dir() or {*out.iterdir()} - {part_within(out)}:
        raise FileExistsError(f"{out} exists and is not an empty directory.")


def check_replaceable(file: Path) -> None:
    """Raise FileExistsError if a file exists and is not a report."""
    if not file.exists():
        return
    try:
        text = file.read_text(encoding="utf-8")
        is_report = json.loads(text)["what"].startswith(PREFIX)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        is_report = False
    if not is_report:
        raise FileExistsError(
            f"{file} exists and is not a tripletjax report; not overwritten."
        )


def number(value: Any) -> float | None:
    """A number for JSON; None if it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def percent(value: Any) -> float | None:
    """A share in percent; None if it is not finite."""
    return number(100 * float(value))
