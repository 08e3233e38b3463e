"""Who is it, if anybody known: the nearest class of a gallery, or unknown.

With a gallery of a few images per class it is few-shot classification.
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
# Who is nearer than this to an image of the gallery is the same image.
COPY = 1e-6
# Probes are compared so many at a time.
BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images of known classes.

    Attributes:
        vectors: ``[m, d]``.
        labels: integers ``[m]``.
        names: what each label stands for.
        paths: of the images within the folder.
        means: whether probes are compared with class means, and not with every image.
        notes: what was decided.
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
        """The images of an index that is up to date, by their folders.

        Args:
            index: of the images.
            means: whether probes are compared with class means.
            classes_from: which of nested folders are classes, as in `datasets.load`.
            flat: whether images may lie in the folder itself, each a class by its name.

        Raises:
            ValueError: if there are none in folders of classes.
        """
        name_of_file = str if flat else None
        found = find_classes(index.folder, classes_from, name_of_file=name_of_file)
        classes = {
            encode_path(Path(path)): printable(name)
            for path, name in zip(found.paths, found.classes)
        }
        paths, x = index.vectors()
        rows = [row for row, path in enumerate(paths) if path in classes]
        if not rows:
            raise ValueError(f"{index.folder} has no images that can be read.")
        names, labels = np.unique(
            [classes[paths[row]] for row in rows], return_inverse=True
        )
        paths = tuple(paths[row] for row in rows)
        return cls(x[rows], labels, tuple(map(str, names)), paths, means, found.notes)

    def without(self, path: str) -> "Gallery":
        """The same without an image, and its class if it has no other."""
        kept = np.array([one != path for one in self.paths])
        return dataclasses.replace(
            self,
            vectors=self.vectors[kept],
            labels=self.labels[kept],
            paths=tuple(np.array(self.paths, object)[kept]),
        )

    def name_of_probe(self, name: str) -> str:
        """The class of a probe by the name of its file, with or without a number."""
        short = without_number(name)
        return short if name not in self.names and short in self.names else name

    @property
    def references(self) -> tuple[np.ndarray, np.ndarray]:
        """The vectors that probes are compared with, and their labels."""
        if not self.means:
            return self.vectors, self.labels
        labels = np.unique(self.labels)
        x = np.stack([self.vectors[self.labels == one].mean(axis=0) for one in labels])
        lengths = np.linalg.norm(self.vectors, axis=1)
        if np.allclose(lengths, 1, atol=1e-3):
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return x, labels

    def nearest(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and labels of the k nearest classes ``[n, k]``, -1 for none."""
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
    """Who a probe is taken for.

    Attributes:
        name: of the class, or None for unknown.
        nearest: the name of the nearest class.
        distance: to it.
        path: of its image in the gallery that is nearest to the probe.
        runner_up: the name of the next class, if there is one.
        runner_up_distance: to it.
        own: the probe's own path in the gallery, from which it is left out, or None.
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
    """Names probes, or calls them unknown.

    Args:
        gallery: who is known.
        vectors: of the probes ``[n, d]``.
        threshold: at most how far a class is to give its name; infinity always gives
            one.
        own: for each probe its own path in the gallery if it lies there, so that it is
            not taken for itself.

    Raises:
        ValueError: if a probe is all that there is in the gallery.
    """
    paths = {*gallery.paths}
    own = [None] * len(vectors) if own is None else own
    own = [path if path in paths else None for path in own]
    found: dict[int, Identity] = {}
    others = [i for i, path in enumerate(own) if path is None]
    if others:
        near = gallery.nearest(vectors[others], 2)
        for i, distances, labels in zip(others, *near):
            found[i] = _identity(gallery, vectors[i], distances, labels, threshold)
    for i, path in enumerate(own):
        if path is None:
            continue
        known = gallery.without(path)
        if not known.paths:
            raise ValueError("the gallery holds the probe alone.")
        (distances,), (labels,) = known.nearest(vectors[i : i + 1], 2)
        identity = _identity(known, vectors[i], distances, labels, threshold)
        found[i] = dataclasses.replace(identity, own=path)
    return [found[i] for i in range(len(vectors))]


def _identity(
    gallery: Gallery,
    x: np.ndarray,
    distances: np.ndarray,
    labels: np.ndarray,
    threshold: float,
) -> Identity:
    """Who a probe is, by its two nearest classes."""
    of_class = np.flatnonzero(gallery.labels == labels[0])
    apart = np.linalg.norm(gallery.vectors[of_class] - x, axis=1)
    second = len(labels) > 1 and labels[1] >= 0
    return Identity(
        gallery.names[labels[0]] if distances[0] <= threshold else None,
        gallery.names[labels[0]],
        float(distances[0]),
        gallery.paths[of_class[np.argmin(apart)]],
        gallery.names[labels[1]] if second else None,
        float(distances[1]) if second else None,
    )
