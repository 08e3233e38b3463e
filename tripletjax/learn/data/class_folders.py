"""Folders of images, one per class: files and their classes."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tripletjax.learn.counts import counted
from tripletjax.learn.data.folder_listing import FolderListing, find_files, printable
from tripletjax.learn.data.image_files import is_image

# Sub-folders of these names hold images of one class by date or session.
BY_DATE = re.compile(
    r"(19|20)\d\d([-_. ]?\d\d?){0,2}|(session|set|seq|sequence|day|month|visit|shoot|"
    r"batch|video|clip|cam|camera|scan|trip)[-_. ]?\d*",
    re.IGNORECASE,
)
# Folders that divide the images of the same classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# The number of an image in its name, as in ``ann_0002`` and ``ann (2)``.
NUMBER = re.compile(r"[-_. ]+\(?\d+\)?$")


@dataclasses.dataclass(frozen=True)
class ClassFolders:
    """Files in folders of one class each.

    Attributes:
        files: in the order of their paths.
        paths: of the files, relative to the data folder.
        classes: the class name of each file.
        loose: files outside the folders of classes.
        root: the folder that holds the classes: the data folder, or one within it.
        notes: lines about the folders that are classes.
        left_out: lines about folders that are left out by their content or names.
        skipped: lines about other entries that are left out.
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
        """Some of the files, with all lines."""
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
    """Find the files in a folder of classes, whatever they hold.

    Args:
        folder: the data folder.
        classes_from: as in `datasets.load`.
        name_of_file: the class of a file, from its name without the suffix, if all
            images lie in the folder itself. Without it, such a folder is an error.

    Raises:
        ValueError: if no folder holds files, or images lie beside the folders.
    """
    folder = folder.resolve()
    listing = find_files(folder)
    images = [f for f in listing.files if f.parent == folder and is_image(f)]
    if images:
        return _of_one_folder(folder, listing, images, name_of_file)
    root = _root_of(folder, listing.files)
    files = [f for f in listing.files if f.is_relative_to(root) and f.parent != root]
    if not files:
        raise ValueError(
            "; ".join([f"{folder} has no images in folders", *listing.notes])
        )
    loose = [file for file in listing.files if file not in {*files}]
    paths = [str(file.relative_to(folder)) for file in files]
    classes = [os.path.dirname(file.relative_to(root)) for file in files]
    within = _check_parts(root, classes)
    notes = []
    if root != folder:
        outer = printable(str(root.relative_to(folder)))
        notes.append(f"{outer} is the only folder: classes are those within it")
    if any(within):
        level, why = _level(files, classes)
        if classes_from is not None:
            level, why = classes_from, "it was requested"
        if level == "top":
            classes = [name.partition(os.sep)[0] for name in classes]
        notes.append(
            f"{'folders in the data folder' if level == 'top' else 'folders of images'}"
            f" are classes (classes from {level}): {why}"
        )
    left_out, skipped = tuple(listing.notes), _skipped_lines(listing)
    return ClassFolders(
        files, paths, classes, loose, root, tuple(notes), left_out, skipped
    )


def _of_one_folder(
    folder: Path,
    listing: FolderListing,
    images: list[Path],
    name_of_file: Callable[[str], str] | None,
) -> ClassFolders:
    """Images that lie in the data folder itself, by the classes in their names."""
    if windows := [file.name for file in images if "\\" in file.name]:
        raise ValueError(
            f"{folder} must hold one folder per class, but names hold backslashes, "
            f"such as {printable(windows[0])}: an archive was made on Windows. "
            "Unpack it with a program that makes folders of them, such as 7-Zip."
        )
    below = (file for file in listing.files if file.parent != folder)
    if name_of_file is None or any(map(is_image, below)):
        raise ValueError(
            f"{folder} must hold one folder per class, but "
            f"{counted(len(images), 'image lies', 'images lie')} in it directly, such "
            f"as {printable(images[0].name)}."
        )
    return ClassFolders(
        images,
        [file.name for file in images],
        [name_of_file(file.stem) for file in images],
        [file for file in listing.files if file not in {*images}],
        folder,
        ("images lie in one folder: their names are classes",),
        tuple(listing.notes),
        _skipped_lines(listing),
    )


def _skipped_lines(listing: FolderListing) -> tuple[str, ...]:
    return tuple(f"{printable(str(path))}: {why}" for path, why in listing.skipped)


def _check_parts(root: Path, classes: Sequence[str]) -> list[str]:
    """The names of classes within the first level, which must not be train and test."""
    parts = sorted({name.partition(os.sep)[0] for name in classes})
    within = [name.partition(os.sep)[2] for name in sorted(set(classes))]
    shared = all(within) and len(set(within)) < len(within)
    if shared and all(part.lower() in PARTS for part in parts):
        raise ValueError(
            f"{root} holds {' and '.join(parts)}, whose folders of the same name "
            "would be different classes. Give one of them, or merge them."
        )
    return within


def _root_of(folder: Path, files: Sequence[Path]) -> Path:
    """The folder that holds the classes, within outer folders of an archive.

    A folder of images is a class, and so is a folder of dates or sessions.
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
    """The level of nested folders that are classes, and the reason."""
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
    """A file's name without the number at its end."""
    return NUMBER.sub("", name) or name
