"""Files of an indexed folder that are no images that can be used, remembered.

An update does not read them again until they change, or can be read in another way.
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
        file: where they are kept; without it, or if it is damaged, none are known.
        reader: a name of everything that decides whether a file can be used.
        files: the stamp and the reason of each path.
    """

    file: Path
    reader: str
    files: dict[str, tuple[str, str]]

    @classmethod
    def read(cls, file: Path, embedder: str) -> "Rejections":
        """Read what an earlier update with the same embedder and decoders kept."""
        reader = f"{embedder}, Pillow {PIL.__version__}, {' '.join(formats())}"
        files = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["reader"] == reader:
                pairs = kept["files"].items()
                files = {path: (stamp, reason) for path, (stamp, reason) in pairs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # It saves time alone: files are read again.
            pass
        return cls(file, reader, files)

    def reason(self, path: str, stamp: str) -> str | None:
        """Why a file of this stamp was rejected, or None if it is to be read."""
        known, reason = self.files.get(path, (None, None))
        return reason if known == stamp else None

    def replace(self, files: dict[str, tuple[str, str]]) -> None:
        """Keep these files, and no others."""
        if files != self.files:
            self.files = files
            write_json(self.file, {"reader": self.reader, "files": files})
