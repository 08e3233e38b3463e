"""Reports of evaluations as JSON files, and how numbers are printed."""

import json
import math
from pathlib import Path
from typing import Any

from tripletjax.learn.files import write_json

OURS = "tripletjax "


def write_report(report: dict[str, Any], file: Path) -> None:
    """Writes a report, in place of an earlier report alone.

    Raises:
        FileExistsError: if the file is there and is something else.
    """
    check_replaceable(file)
    write_json(file, report)


def check_empty(out: Path) -> None:
    """Raises FileExistsError if something is there, and is no empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is there and is no empty directory.")


def check_replaceable(file: Path) -> None:
    """Raises FileExistsError if a file is there and is no report."""
    if not file.exists():
        return
    try:
        ours = json.loads(file.read_text(encoding="utf-8"))["what"].startswith(OURS)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        ours = False
    if not ours:
        raise FileExistsError(f"{file} is there and is no report; it is left as it is.")


def number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def percent(value: Any) -> float | None:
    return number(100 * float(value))
