"""The protocol of Labeled Faces in the Wild: its file of pairs.

References:
    Huang, Ramesh, Berg, Learned-Miller. Labeled Faces in the Wild: A Database for
    Studying Face Recognition in Unconstrained Environments. 2007.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tripletjax.learn.data.text_files import read_lines


class PairsFile(NamedTuple):
    """The pairs of a verification protocol.

    Attributes:
        first: paths of the first images, relative to the folder of all images.
        second: paths of the second images.
        same: bool ``[n]``, whether both show the same person.
        fold: integers ``[n]``, from 0.
    """

    first: list[str]
    second: list[str]
    same: np.ndarray
    fold: np.ndarray


def read_pairs(path: str | Path, *, suffix: str = ".jpg") -> PairsFile:
    """Read a ``pairs.txt`` of Labeled Faces in the Wild.

    Its first line has the number of folds and the number n of pairs of each kind in a
    fold (or n alone, for one fold). Every fold has n lines ``name i j`` for two images
    of a person, and n lines ``name i other j``, between spaces, or tabs if names have
    spaces. The i-th image of a person is ``name/name_0001.jpg`` for i = 1.

    Args:
        path: the file.
        suffix: of the images.

    Returns:
        `PairsFile`.

    Raises:
        ValueError: if the file is no text in UTF-8, or does not follow the format;
            names the line.
    """
    lines = read_lines(path)
    while lines and not lines[-1].strip():
        lines.pop()

    def wrong(line: int, what: str) -> ValueError:
        return ValueError(f"{path}, line {line}: {what}")

    try:
        *folds, n = map(int, lines[0].split())
        (folds,) = folds or (1,)
    except (IndexError, ValueError):
        raise wrong(1, "expected the numbers of folds and of pairs.") from None
    if len(lines) != 1 + 2 * n * folds:
        raise wrong(
            1,
            f"expected {folds} folds of {n} + {n} pairs, {2 * n * folds} lines, got "
            f"{len(lines) - 1}.",
        )

    def image(name: str, number: str) -> str:
        return f"{name}/{name}_{int(number):04d}{suffix}"

    first, second, same, fold = [], [], [], []
    for k, line in enumerate(lines[1:]):
        alike = k // n % 2 == 0
        try:
            # Between tabs, names may have spaces, also at their ends.
            line = line.strip("\t") if "\t" in line.strip() else line.strip()
            parts = line.split("\t" if "\t" in line else None)
            if alike:
                name, i, j = parts
                other = name
            else:
                name, i, other, j = parts
            first.append(image(name, i))
            second.append(image(other, j))
        except ValueError:
            form = "name i j" if alike else "name i other j"
            raise wrong(k + 2, f"expected {form!r}, got {line!r}.") from None
        same.append(alike)
        fold.append(k // (2 * n))
    return PairsFile(first, second, np.array(same), np.array(fold))
