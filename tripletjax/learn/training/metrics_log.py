"""Records of metrics in ``metrics.jsonl``, and as files of TensorBoard."""

import json
from pathlib import Path
from typing import Any

from tripletjax.learn.files import write_text


class MetricsLog:
    """A JSON Lines file of metrics; each record is written when it is added.

    Args:
        path: the file. Records of an existing file are read; an unfinished last line
            is removed.

    Attributes:
        lines: the records, in order.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._board = None
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    self.lines.append(json.loads(line))
        self._write_all()

    def add(self, line: dict[str, Any]) -> None:
        """Append a record, which must have ``"step"``."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def truncate_after(self, step: int) -> None:
        """Remove records of later steps, and the final evaluation."""
        self.lines = [
            line
            for line in self.lines
            if line["step"] <= step and line.get("evaluation") != "trained"
        ]
        self._write_all()
        if self._board is not None:
            self.show_in(Path(self._board.logdir))

    def show_in(self, directory: Path) -> None:
        """Write all records for TensorBoard, too, instead of its earlier files."""
        self.close()
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._board = summary_writer()(str(directory), flush_secs=10)
        for line in self.lines:
            self._show(line)

    def close(self) -> None:
        """Close the files of TensorBoard."""
        if self._board is not None:
            self._board.close()

    def _show(self, line: dict[str, Any]) -> None:
        if self._board is None:
            return
        parts = (part for part in ("validation", "comparison") if part in line)
        part = next(parts, "train")
        group = line.get("evaluation", part)
        numbers = line.get("metrics", line.get(part, line))
        for name, value in numbers.items():
            if name not in ("step", "intervals"):
                self._board.add_scalar(f"{group}/{name}", value, line["step"])

    def _write_all(self) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def summary_writer() -> type:
    """The class `tensorboardX.SummaryWriter`.

    Raises:
        ImportError: if tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard requires tensorboardX: pip install tensorboardX"
        ) from error
    return SummaryWriter
