"""Files of a folder that may hold images, and every entry that is left out."""

import dataclasses
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from tripletjax.learn.data.image_files import image_suffixes

# Names of files and folders that operating systems and programs create.
NOT_IMAGES = {"thumbs.db", "desktop.ini", "icon\r"}
NOT_FOLDERS = {"@eadir", "__macosx"}
# A directory with these files is a training run.
RUN_FILES = {"config.json", "metrics.jsonl"}
# The largest number of names in a line.
NAMED = 5
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclasses.dataclass(frozen=True)
class FolderListing:
    """Files of a folder that may hold images.

    Attributes:
        files: regular files, in the order of their paths.
        skipped: entries that are left out, relative to the folder, with the reason.
        unreadable: skipped entries that may hold images.
        away: folders whose files may come back, relative to the folder, with the
            reason: the folder is unreadable, empty or a broken link.
        runs: directories of training runs, relative to the folder.
        hidden: folders with images whose names are hidden or a system's, relative to
            the folder.
    """

    files: list[Path]
    skipped: list[tuple[Path, str]]
    unreadable: list[Path]
    away: dict[Path, str]
    runs: list[Path]
    hidden: list[Path]

    @property
    def notes(self) -> list[str]:
        """Lines about folders that are left out by their content or their names."""
        notes = []
        if self.runs:
            runs = format_names(self.runs)
            notes.append(f"directories of training runs are left out: {runs}")
        if self.hidden:
            notes.append(
                "folders with images are left out because their names are hidden or a "
                f"system's: {format_names(self.hidden)}; rename those that are classes"
            )
        return notes

    def may_hold(self, path: Path) -> bool:
        """Whether a relative path lies in a part of the folder that is unreadable."""
        return any(path.is_relative_to(one) for one in self.unreadable)

    def folder_away(self, path: Path) -> Path | None:
        """The outermost folder above a relative path whose files may come back."""
        above = reversed(path.parents)
        return next((folder for folder in above if folder in self.away), None)


def find_files(folder: Path) -> FolderListing:
    """List the regular files in a folder and its sub-folders.

    Hidden files and those of systems are left out. Links are followed last. A link to a
    folder or file that is listed already adds nothing.

    Raises:
        OSError: if the folder itself cannot be read.
    """
    walk = _Walk(Path(folder))
    walk.list_directory(walk.root, os.path.realpath(folder))
    walk.follow_links()
    hidden = [path for path in walk.hidden if _holds_images(walk.root / path)]
    return FolderListing(
        sorted(walk.files),
        sorted(walk.skipped),
        walk.unreadable,
        walk.away,
        sorted(walk.runs),
        sorted(hidden),
    )


class _Walk:
    """A walk through a folder: directories first, then links."""

    def __init__(self, root: Path):
        self.root = root
        self.files: list[Path] = []
        self.skipped: list[tuple[Path, str]] = []
        self.unreadable: list[Path] = []
        self.away: dict[Path, str] = {}
        self.runs: list[Path] = []
        self.hidden: list[Path] = []
        self.links: list[Path] = []
        # The listed path of each directory, by its real path.
        self.seen: dict[str, Path] = {}

    def list_directory(self, top: Path, real_top: str) -> None:
        """List a directory and its sub-directories, and collect their links."""
        pending = [(top, real_top)]
        while pending:
            directory, real = pending.pop()
            if real in self.seen:
                self._skip(directory, f"{self._listed(real)} is the same folder")
                continue
            try:
                with os.scandir(directory) as opened:
                    entries = list(opened)
            except OSError as error:
                if directory == self.root:
                    raise
                self._skip_unreadable(directory, error)
                continue
            if not entries and directory != self.root:
                self.away[directory.relative_to(self.root)] = "is empty"
            if {entry.name for entry in entries} >= RUN_FILES:
                self.runs.append(directory.relative_to(self.root))
                continue
            self.seen[real] = directory
            for entry in entries:
                path = directory / entry.name
                try:
                    if not _is_listed(entry.name):
                        if entry.is_dir():
                            self.hidden.append(path.relative_to(self.root))
                    elif entry.is_symlink():
                        self.links.append(path)
                    elif entry.is_dir():
                        pending.append((path, os.path.join(real, entry.name)))
                    elif entry.is_file():
                        self.files.append(path)
                    else:
                        self._skip_special(path, entry.stat().st_mode)
                except OSError as error:
                    self._skip_unreadable(path, error)

    def follow_links(self) -> None:
        """List the targets of links, unless they are listed already."""
        to_files = []
        while self.links:
            links, self.links = sorted(self.links), []
            for link in links:
                try:
                    real = os.path.realpath(link, strict=True)
                    mode = os.stat(real).st_mode
                except PermissionError as error:
                    self._skip_unreadable(link, error)
                    continue
                except OSError:
                    self._skip(link, f"a broken link to {os.readlink(link)}")
                    self.away[link.relative_to(self.root)] = "is a broken link"
                    continue
                if stat.S_ISREG(mode):
                    to_files.append((link, real))
                elif not stat.S_ISDIR(mode):
                    self._skip_special(link, mode)
                elif real in self.seen:
                    self._skip(link, f"a link to {self._listed(real)}")
                elif Path(os.path.realpath(self.root)).is_relative_to(real):
                    self._skip(link, "a link to a folder that holds this one")
                else:
                    self.list_directory(link, real)
        for link, real in to_files:
            directory, name = os.path.split(real)
            if directory in self.seen and _is_listed(name):
                listed = (self.seen[directory] / name).relative_to(self.root)
                self._skip(link, f"a link to {listed}")
            else:
                self.files.append(link)

    def _listed(self, real: str) -> Path | str:
        """A directory that is listed, relative to the folder."""
        path = self.seen[real].relative_to(self.root)
        return path if path.parts else "the folder itself"

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append((path.relative_to(self.root), reason))

    def _skip_special(self, path: Path, mode: int) -> None:
        self._skip(path, f"{SPECIAL.get(stat.S_IFMT(mode), 'special')}, not a file")

    def _skip_unreadable(self, path: Path, error: OSError) -> None:
        reason = f"cannot be read ({error.strerror or error})"
        self._skip(path, f"it {reason}")
        self.unreadable.append(path.relative_to(self.root))
        self.away[path.relative_to(self.root)] = reason


def _is_listed(name: str) -> bool:
    """Whether the name of an entry is neither hidden nor a system's."""
    return not name.startswith(".") and name.lower() not in NOT_IMAGES | NOT_FOLDERS


def _holds_images(folder: Path) -> bool:
    """Whether a folder holds files with the suffix of an image."""
    suffixes = image_suffixes()
    return any(
        os.path.splitext(name)[1].lower() in suffixes
        for _, _, files in os.walk(folder)
        for name in files
    )


def format_names(names: Sequence[str | Path]) -> str:
    """Format the first names as a line, with the number of the others."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return printable(", ".join(map(str, names[:NAMED])) + more)


def printable(name: str) -> str:
    """Text for a name that may not be UTF-8."""
    return os.fsencode(name).decode(errors="replace")
