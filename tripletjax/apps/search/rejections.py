"""Files of an indexed folder that are not usable images.

An update reads them again only if they change, or if other decoders are installed.
"""

import dataclasses
import json
from pathlib import Path

import PIL

from tripletjax.learn.data.image_files import formats
from tripletjax.learn.files import write_json


@dataclasses.dataclass
class Rejections:
    """Rejected files by their paths.

    Attributes:
        file: the JSON file that keeps them. Missing or damaged, it counts as empty.
        reader: the embedder and the decoders, which decide whether a file is usable.
        files: the stamp and the reason of each path.
    """

    file: Path
    reader: str
    files: dict[str, tuple[str, str]]

    @classmethod
    def read(cls, file: Path, embedder: str) -> "Rejections":
        """Read the rejections of an earlier update with the same reader."""
        reader = f"{embedder}, Pillow {PIL.__version__}, {' '.join(formats())}"
        files = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["reader"] == reader:
                pairs = kept["files"].items()
                files = {path: (stamp, reason) for path, (stamp, reason) in pairs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Without the rejections, an update reads the files again.
            pass
        return cls(file, reader, files)

    def reason(self, path: str, stamp: str) -> str | None:
        """The reason for rejecting a file with this stamp, or None."""
        known, reason = self.files.get(path, (None, None))
        return reason if known == stamp else None

    def replace(self, files: dict[str, tuple[str, str]]) -> None:
        """Replace all rejections, and write them if they differ."""
        if files != self.files:
            self.files = files
            write_json(self.file, {"reader": self.reader, "files": files})
