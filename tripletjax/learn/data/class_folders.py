"""Folders of images, one per class: which files there are, and of which class."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tripletjax.learn.data.folder_listing import find_files, printable
from tripletjax.learn.data.image_files import is_image

# Sub-folders of these names hold images of one class by date or session.
BY_DATE = re.compile(
    r"(19|20)\d\d([-_. ]?\d\d?){0,2}|(session|set|seq|sequence|day|month|visit|shoot|"
    r"batch|video|clip|cam|camera|scan|trip)[-_. ]?\d*",
    re.IGNORECASE,
)
# Folders that share out the same classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


# The number of an image in its name, as in ``ann_0002`` and ``ann (2)``.
NUMBER = re.compile(r"[-_. ]+\(?\d+\)?$")


@dataclasses.dataclass(frozen=True)
class ClassFolders:
    """Files in folders of one class each.

    Attributes:
        files: in the order of their paths.
        paths: the same, relative to the data folder.
        classes: the name of each file's class.
        loose: files that lie beside the folders of classes, and belong to none.
        root: the folder that holds the classes: the data folder, or one within it.
        notes: which folders are classes, and why.
        left_out: folders that are left out by their content or their names, as lines.
        skipped: other entries that are left out, with the reason, as lines.
    """

    files: list[Path]
    paths: list[str]
    classes: list[str]
    loose: list[Path]
    root: Path
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    skipped: tuple[str, ...]

    def part(self, indices: Sequence[int]) -> "ClassFolders":
        """Some of the files, and what is said of all."""
        files, paths, classes = (
            [values[index] for index in indices]
            for values in (self.files, self.paths, self.classes)
        )
        return dataclasses.replace(self, files=files, paths=paths, classes=classes)


def find_classes(
    folder: Path,
    classes_from: str | None = None,
    *,
    name_of_file: Callable[[str], str] | None = None,
) -> ClassFolders:
    """The files in a folder of classes, whatever they hold.

    Args:
        folder: the data folder.
        classes_from: as in `load`.
        name_of_file: the class of a file, from its name without the suffix, where all
            images lie in the folder itself. If not given, that is an error.

    Raises:
        ValueError: if there are none in folders, or images in none.
    """
    folder = folder.resolve()
    listing = find_files(folder)
    skipped = tuple(f"{printable(str(path))}: {why}" for path, why in listing.skipped)
    left_out = tuple(listing.notes)
    images = [f for f in listing.files if f.parent == folder and is_image(f)]
    root = folder if images else _root_of(folder, listing.files)
    files = [f for f in listing.files if f.is_relative_to(root) and f.parent != root]
    if images:
        if windows := [file.name for file in images if "\\" in file.name]:
            raise ValueError(
                f"{folder} must hold one folder per class, but names hold backslashes, "
                f"such as {printable(windows[0])}: an archive was made on Windows. "
                "Unpack it with a program that makes folders of them, such as 7-Zip."
            )
        if name_of_file is None or any(map(is_image, files)):
            raise ValueError(
                f"{folder} must hold one folder per class, but {len(images)} images "
                f"lie in it directly, such as {printable(images[0].name)}."
            )
        return ClassFolders(
            images,
            [file.name for file in images],
            [name_of_file(file.stem) for file in images],
            [file for file in listing.files if file not in {*images}],
            root,
            ("images lie in one folder: their names are classes",),
            left_out,
            skipped,
        )
    if not files:
        raise ValueError(f"{folder} has no images in folders.")
    loose = [file for file in listing.files if file not in {*files}]
    relative = [str(file.relative_to(folder)) for file in files]
    folders = [os.path.dirname(file.relative_to(root)) for file in files]
    parts = sorted({name.partition(os.sep)[0] for name in folders})
    within = [name.partition(os.sep)[2] for name in sorted(set(folders))]
    shared = all(within) and len(set(within)) < len(within)
    if shared and all(part.lower() in PARTS for part in parts):
        raise ValueError(
            f"{root} holds {' and '.join(parts)}, whose folders of the same name "
            "would be different classes. Give one of them, or merge them."
        )
    notes = []
    if root != folder:
        outer = printable(str(root.relative_to(folder)))
        notes.append(f"{outer} is the only folder: classes are those within it")
    if any(within):
        level, why = _level(files, folders)
        if classes_from is not None:
            level, why = classes_from, "it was asked for"
        if level == "top":
            folders = [name.partition(os.sep)[0] for name in folders]
        notes.append(
            f"{'folders in the data folder' if level == 'top' else 'folders of images'}"
            f" are classes (classes from {level}): {why}"
        )
    return ClassFolders(
        files, relative, folders, loose, root, tuple(notes), left_out, skipped
    )


def _root_of(folder: Path, files: Sequence[Path]) -> Path:
    """The folder that holds the classes: archives often have one folder around all.

    A folder of images is a class, and so is one whose folders are dates or sessions.
    """
    while True:
        below = [file for file in files if file.parent != folder]
        outer = {file.relative_to(folder).parts[0] for file in below}
        if len(outer) != 1:
            return folder
        inner = folder / outer.pop()
        within = {
            file.relative_to(inner).parts[0] for file in below if file.parent != inner
        }
        dated = sum(bool(BY_DATE.fullmatch(name)) for name in within)
        direct = (file for file in below if file.parent == inner)
        if not within or dated > len(within) / 2 or any(map(is_image, direct)):
            return folder
        folder, files = inner, below


def _level(files: Sequence[Path], folders: Sequence[str]) -> tuple[str, str]:
    """Which of nested folders are classes, and why."""
    nested = {name for name in folders if os.sep in name}
    outer = {name.partition(os.sep)[0] for name in nested}
    beside = (file for file, name in zip(files, folders) if name in outer)
    if any(map(is_image, beside)):
        return "top", "some hold images beside sub-folders"
    dated = sum(bool(BY_DATE.fullmatch(name.split(os.sep)[1])) for name in nested)
    if dated > len(nested) / 2:
        return "top", "their sub-folders are named by date or session"
    return "leaf", "their names are no dates or sessions"


def without_number(name: str) -> str:
    """A file's name without the number that ends it, if there is one."""
    return NUMBER.sub("", name) or name
