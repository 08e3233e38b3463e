"""Open-set identification: the nearest class of a gallery, or unknown.

With a few images per class in the gallery, this is few-shot classification.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tripletjax as tj
from tripletjax.apps.images import encode_path
from tripletjax.apps.search.index import Index
from tripletjax.learn.data.class_folders import find_classes, without_number
from tripletjax.learn.data.folder_listing import printable

REPORT = "tripletjax identification"
# Distance up to which two images count as copies of each other.
COPY = 1e-6
# Probes that are compared at a time.
BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images of known classes.

    Attributes:
        vectors: embeddings of the images ``[m, d]``.
        labels: integers ``[m]``.
        names: class names, by label.
        paths: paths of the images within the folder.
        means: whether probes are compared with class means instead of every image.
        notes: decisions about the class folders, for the user.
    """

    vectors: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    paths: tuple[str, ...]
    means: bool
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        index: Index,
        *,
        means: bool = False,
        classes_from: str | None = None,
        flat: bool = False,
    ) -> "Gallery":
        """Read the gallery of an index; its folders are the classes.

        Args:
            index: up to date.
            means: whether probes are compared with class means.
            classes_from: which of nested folders are classes, as in `datasets.load`.
            flat: whether images may lie in the folder itself; the file name is then
                the class.

        Raises:
            ValueError: if the folder has no class folders, or no readable image.
        """
        name_of_file = str if flat else None
        listing = find_classes(index.folder, classes_from, name_of_file=name_of_file)
        classes = {
            encode_path(Path(path)): printable(name)
            for path, name in zip(listing.paths, listing.classes)
        }
        paths, x = index.vectors()
        rows = [row for row, path in enumerate(paths) if path in classes]
        if not rows:
            raise ValueError(f"{index.folder} has no readable image.")
        names, labels = np.unique(
            [classes[paths[row]] for row in rows], return_inverse=True
        )
        paths = tuple(paths[row] for row in rows)
        return cls(x[rows], labels, tuple(map(str, names)), paths, means, listing.notes)

    def without(self, path: str) -> "Gallery":
        """The gallery without one of its images."""
        kept = np.array([other != path for other in self.paths])
        return dataclasses.replace(
            self,
            vectors=self.vectors[kept],
            labels=self.labels[kept],
            paths=tuple(np.array(self.paths, object)[kept]),
        )

    def name_of_probe(self, name: str) -> str:
        """The class of a probe file, whose name may end in a number."""
        short = without_number(name)
        return short if name not in self.names and short in self.names else name

    @property
    def references(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors that probes are compared with, and their labels."""
        if not self.means:
            return self.vectors, self.labels
        labels = np.unique(self.labels)
        x = np.stack([self.vectors[self.labels == c].mean(axis=0) for c in labels])
        norms = np.linalg.norm(self.vectors, axis=1)
        if np.allclose(norms, 1, atol=1e-3):
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return x, labels

    def nearest(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest classes of probes ``[n, d]``.

        Returns:
            Distances and labels ``[n, k]``; the label is -1 where there are fewer
            classes.
        """
        references, labels = self.references
        k = min(k, len(references))
        parts = [
            tj.retrieval.nearest_classes(x[i : i + BLOCK], references, labels, k=k)
            for i in range(0, len(x), BLOCK)
        ]
        return (
            np.concatenate([part.distances for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identification of one probe.

    Attributes:
        name: class name, or None for unknown.
        nearest: name of the nearest class.
        distance: distance to the nearest class.
        path: path of the nearest image of this class in the gallery.
        runner_up: name of the second nearest class, or None.
        runner_up_distance: distance to the second nearest class, or None.
        own: path of the probe in the gallery, where it was left out; None if the
            probe is not in the gallery.
    """

    name: str | None
    nearest: str
    distance: float
    path: str
    runner_up: str | None
    runner_up_distance: float | None
    own: str | None = None


def identify(
    gallery: Gallery,
    vectors: np.ndarray,
    *,
    threshold: float,
    own: Sequence[str | None] | None = None,
) -> list[Identity]:
    """Name probes after their nearest class, or call them unknown.

    Args:
        gallery: known classes.
        vectors: embeddings of the probes ``[n, d]``.
        threshold: largest distance of a class that names a probe; infinity names every
            probe.
        own: path of each probe in the gallery, or None. A probe is not compared with
            itself.

    Returns:
        One `Identity` per probe.

    Raises:
        ValueError: if the gallery holds nothing but a probe.
    """
    paths = {*gallery.paths}
    own = [None] * len(vectors) if own is None else own
    own = [path if path in paths else None for path in own]
    identities: dict[int, Identity] = {}
    new = [i for i, path in enumerate(own) if path is None]
    if new:
        nearest = gallery.nearest(vectors[new], 2)
        for i, distances, labels in zip(new, *nearest):
            identities[i] = _identity(gallery, vectors[i], distances, labels, threshold)
    for i, path in enumerate(own):
        if path is None:
            continue
        rest = gallery.without(path)
        if not rest.paths:
            raise ValueError(
                f"gallery must have an image besides the probe, got {path} alone."
            )
        (distances,), (labels,) = rest.nearest(vectors[i : i + 1], 2)
        identity = _identity(rest, vectors[i], distances, labels, threshold)
        identities[i] = dataclasses.replace(identity, own=path)
    return [identities[i] for i in range(len(vectors))]


def _identity(
    gallery: Gallery,
    x: np.ndarray,
    distances: np.ndarray,
    labels: np.ndarray,
    threshold: float,
) -> Identity:
    """The identity of a probe, by its two nearest classes."""
    members = np.flatnonzero(gallery.labels == labels[0])
    member_distances = np.linalg.norm(gallery.vectors[members] - x, axis=1)
    has_second = len(labels) > 1 and labels[1] >= 0
    return Identity(
        gallery.names[labels[0]] if distances[0] <= threshold else None,
        gallery.names[labels[0]],
        float(distances[0]),
        gallery.paths[members[np.argmin(member_distances)]],
        gallery.names[labels[1]] if has_second else None,
        float(distances[1]) if has_second else None,
    )
