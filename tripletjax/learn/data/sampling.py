"""P x K sampling: batches of P classes with K images each.

Every anchor of a triplet needs a positive and a negative, and a uniform random batch
has few positives. A batch here is a pure function of (seed, step), so that a run can
resume at any step. This module imports NumPy alone and needs no extra.
"""

import dataclasses

import numpy as np

from tripletjax.learn.choices import CLASS_SAMPLING
from tripletjax.learn.data.image_array import ImageSource, KeptFeatures

# The number of classes of one group that come into a batch together.
TOGETHER = 4


@dataclasses.dataclass(frozen=True, eq=False)
class ClassBatches:
    """Batches of indices, `classes` x `per_class`, grouped by class.

    ``batches[step]`` is int64 ``[classes * per_class]``, the indices of images. Images
    are drawn without replacement within a batch. A class with fewer than `per_class`
    images repeats some.

    Args:
        labels: integers ``[n]``, the class of each image.
        classes: P, the number of classes in a batch, at least 2.
        per_class: K, the number of images of each class, at least 2.
        seed: the seed of all batches.
        class_sampling: ``"uniform"``: every pass over the classes has a new random
            order, so that batches have all classes equally often. Classes after the
            last whole batch of a pass are left out until the next pass.
            ``"frequency"``: the classes of each batch are drawn without replacement,
            in proportion to their number of images.
        shard: the index of this process and the number of processes, usually
            ``(jax.process_index(), jax.process_count())``. Each process gets its part
            of the same batch, in order.
        groups: integers ``[number of classes]``, the group of each class in the order
            of labels. Up to four classes of a group come into a batch together. Only
            with ``class_sampling="uniform"``.

    Raises:
        ValueError: if there are fewer than `classes` classes, or an option is too
            small or does not fit.

    >>> import numpy as np
    >>> from tripletjax.learn.data.sampling import ClassBatches
    >>> labels = np.arange(100) % 10
    >>> batches = ClassBatches(labels, classes=3, per_class=4, seed=0)
    >>> print(labels[batches[7]])
    [6 6 6 6 8 8 8 8 1 1 1 1]
    """

    labels: np.ndarray
    classes: int
    per_class: int
    seed: int = 0
    class_sampling: str = "uniform"
    shard: tuple[int, int] = (0, 1)
    groups: np.ndarray | None = None
    members: tuple[np.ndarray, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _as_labels(self.labels))
        values, counts = np.unique(self.labels, return_counts=True)
        for name in ("classes", "per_class"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name} must be at least 2, got {getattr(self, name)}: without it "
                    "no batch has a triplet."
                )
        if len(values) < self.classes:
            raise ValueError(
                f"classes must be at most {len(values)}, the number of classes of the "
                f"labels, got {self.classes}."
            )
        if self.class_sampling not in CLASS_SAMPLING:
            raise ValueError(
                f"class_sampling must be one of {', '.join(CLASS_SAMPLING)}, got "
                f"{self.class_sampling!r}."
            )
        if self.groups is not None:
            if self.class_sampling != "uniform":
                raise ValueError(
                    "groups are for class_sampling uniform, got "
                    f"{self.class_sampling!r}."
                )
            if np.shape(self.groups) != (len(values),):
                raise ValueError(
                    f"groups must have one entry for each of the {len(values)} "
                    f"classes, got shape {np.shape(self.groups)}."
                )
        _check_shard(self.shard, self.classes * self.per_class)
        order = np.argsort(self.labels, kind="stable")
        members = tuple(np.split(order, np.cumsum(counts)[:-1]))
        object.__setattr__(self, "members", members)

    def __getitem__(self, step: int) -> np.ndarray:
        draw = np.random.default_rng((self.seed, 1, step))
        drawn = [
            draw.choice(
                self.members[c],
                self.per_class,
                replace=len(self.members[c]) < self.per_class,
            )
            for c in self._classes(step)
        ]
        return _sharded(np.concatenate(drawn), self.shard)

    def _mixed(self, draw: np.random.Generator) -> np.ndarray:
        """All classes in a random order, some of a group always together."""
        if self.groups is None:
            return draw.permutation(len(self.members))
        groups, parts = np.asarray(self.groups), []
        for group in np.unique(groups):
            some = draw.permutation(np.flatnonzero(groups == group))
            parts += [some[i : i + TOGETHER] for i in range(0, len(some), TOGETHER)]
        return np.concatenate([parts[i] for i in draw.permutation(len(parts))])

    def _classes(self, step: int) -> np.ndarray:
        if self.class_sampling == "frequency":
            draw = np.random.default_rng((self.seed, 0, step))
            counts = np.array([len(indices) for indices in self.members])
            share = counts / counts.sum()
            return draw.choice(len(counts), self.classes, replace=False, p=share)
        batches = len(self.members) // self.classes
        a_pass, batch = divmod(step, batches)
        chosen = self._mixed(np.random.default_rng((self.seed, 0, a_pass)))
        return chosen[batch * self.classes : (batch + 1) * self.classes]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatches:
    """Batches of images with labels, P classes of K images each.

    ``batches[step]`` is a pure function of the step: images ``[P * K, height, width,
    channels]`` and integer labels ``[P * K]``.

    Args:
        images: ``[n, height, width, channels]``; of a `StoredImages` only those of the
            batch are read, of a `KeptFeatures` these are the features.
        labels: the label of each ``[n]``.
        classes: P.
        per_class: K.
        seed: what the batches are drawn with.
        rotation_classes: number of classes that each class becomes by turned and
            mirrored copies: 1 for none, 2 for half turns, 4 for quarter turns, 8 for
            quarter turns with mirror images. 4 and 8 require square images.
        class_sampling: as in `ClassBatches`.
        shard: as in `ClassBatches`.
        groups: as in `ClassBatches`, of turned copies too, after all others.

    Raises:
        ValueError: as `ClassBatches`, and if `rotation_classes` does not fit.
    """

    images: ImageSource
    labels: np.ndarray
    classes: int
    per_class: int
    seed: int = 0
    rotation_classes: int = 1
    class_sampling: str = "uniform"
    shard: tuple[int, int] = (0, 1)
    groups: np.ndarray | None = None
    class_batches: ClassBatches = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _as_labels(self.labels))
        kept = isinstance(self.images, KeptFeatures)
        of_images = kept or len(self.images.shape) == 4
        if not of_images or len(self.labels) != len(self.images):
            raise ValueError(
                "images must be [n, height, width, channels] and labels [n], got "
                f"{self.images.shape} and {np.shape(self.labels)}."
            )
        if kept and self.rotation_classes > 1:
            raise ValueError(
                "rotation_classes must be 1 where features are learnt from: they "
                f"cannot be turned; got {self.rotation_classes}."
            )
        height, width = self.images.shape[1:3]
        if self.rotation_classes not in (1, 2, 4, 8) or (
            self.rotation_classes > 2 and height != width
        ):
            raise ValueError(
                "rotation_classes must be 1, 2, 4 or 8, and at most 2 for images "
                f"that are not square; got {self.rotation_classes} for {height} x "
                f"{width} pixels."
            )
        _, labels = np.unique(self.labels, return_inverse=True)
        count = labels.max() + 1
        labels = np.concatenate(
            [labels + count * turn for turn in range(self.rotation_classes)]
        )
        class_batches = ClassBatches(
            labels,
            self.classes,
            self.per_class,
            self.seed,
            self.class_sampling,
            self.shard,
            self.groups,
        )
        object.__setattr__(self, "class_batches", class_batches)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.class_batches[step]
        turn, index = np.divmod(chosen, len(self.labels))
        images = np.array(self.images[index])
        quarters = 2 * turn if self.rotation_classes == 2 else turn % 4
        for each in range(1, 4):
            rows = quarters == each
            if rows.any():
                images[rows] = np.rot90(images[rows], each, axes=(1, 2))
        images[turn >= 4] = images[turn >= 4][:, :, ::-1]
        return images, self.class_batches.labels[chosen].astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class TripletBatches:
    """Batches of given triplets: all anchors, then all positives, then all negatives.

    ``batches[step]`` is a pure function of the step: images ``[3 * size, height, width,
    channels]``, and which ones these are, int32 ``[3 * size]``. Triplets come in a new
    random order in each pass over them; what is left of a pass after its last whole
    batch waits for the next pass.

    Args:
        images: ``[n, height, width, channels]``.
        triplets: which images are anchor, positive and negative, ``[t, 3]``.
        size: how many triplets are in a batch.
        seed: what the batches are drawn with.
        shard: this process and how many there are; each gets its part of the triplets.

    Raises:
        ValueError: if there are fewer than `size` triplets, or an option is out of
            range.
    """

    images: ImageSource
    triplets: np.ndarray
    size: int
    seed: int = 0
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        triplets = np.asarray(self.triplets)
        if (
            triplets.ndim != 2
            or triplets.shape[1] != 3
            or triplets.dtype.kind not in "iu"
        ):
            raise ValueError(
                "triplets must be integers [t, 3], got shape "
                f"{triplets.shape} and dtype {triplets.dtype}."
            )
        if triplets.size and not 0 <= triplets.min() <= triplets.max() < len(
            self.images
        ):
            raise ValueError(
                f"triplets must be indices of the {len(self.images)} images, got "
                f"{triplets.min()} to {triplets.max()}."
            )
        object.__setattr__(self, "triplets", triplets)
        if not 1 <= self.size <= len(self.triplets):
            raise ValueError(
                f"size must be 1 to {len(self.triplets)}, the number of triplets, got "
                f"{self.size}."
            )
        _check_shard(self.shard, self.size)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        a_pass, batch = divmod(step, len(self.triplets) // self.size)
        order = np.random.default_rng((self.seed, 0, a_pass))
        chosen = order.permutation(len(self.triplets))
        chosen = chosen[batch * self.size : (batch + 1) * self.size]
        indices = self.triplets[_sharded(chosen, self.shard)].T.ravel()
        return self.images[indices], indices.astype(np.int32)


def _as_labels(labels: np.ndarray) -> np.ndarray:
    """Labels as an array, one integer for each image."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(
            f"labels must be [n], one integer for each image, got shape {labels.shape}."
        )
    if labels.dtype.kind not in "iu":
        raise TypeError(
            f"labels must be integers, got dtype {labels.dtype}. "
            "np.unique(x, return_inverse=True)[1] turns names into integers."
        )
    return labels


def _check_shard(shard: tuple[int, int], size: int) -> None:
    index, count = shard
    if not 0 <= index < count or size % count:
        raise ValueError(
            "shard must be (index, count) with 0 <= index < count, and count must "
            f"divide the batch of {size}; got {shard}."
        )


def _sharded(batch: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
    index, count = shard
    return np.split(batch, count)[index]
