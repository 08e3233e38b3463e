"""Which images make a batch: P classes with K images each.

Triplets need a positive and a negative of each anchor, and a batch drawn at random has
few positives. A batch here is a pure function of (seed, step), so that a run can be
resumed anywhere.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ClassBatches:
    """Batches of indices, `classes` x `per_class`, grouped by class.

    ``batches[step]`` is int64 ``[classes * per_class]``. Classes come in a new random
    order in each pass over them, so that all are seen equally often; what is left of a
    pass after its last whole batch waits for the next pass. Images are drawn without
    replacement within a batch, except from a class that has fewer than `per_class`,
    which repeats images.

    Args:
        labels: the label of each image ``[n]``.
        classes: P, the number of classes in a batch, at least 2.
        per_class: K, the number of images of each, at least 2.
        seed: what the batches are drawn with.

    Raises:
        ValueError: if there are fewer than `classes` classes, or an option is too
            small.

    >>> import numpy as np
    >>> from tripletjax.learn.sampling import ClassBatches
    >>> labels = np.arange(100) % 10
    >>> batches = ClassBatches(labels, classes=3, per_class=4, seed=0)
    >>> print(labels[batches[7]])
    [6 6 6 6 8 8 8 8 1 1 1 1]
    """

    labels: np.ndarray
    classes: int
    per_class: int
    seed: int = 0
    members: tuple[np.ndarray, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        values, counts = np.unique(self.labels, return_counts=True)
        for name in ("classes", "per_class"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name} must be at least 2, got {getattr(self, name)}: without it "
                    "no batch has a triplet."
                )
        if len(values) < self.classes:
            raise ValueError(
                f"classes is {self.classes} but the labels have only {len(values)}."
            )
        order = np.argsort(self.labels, kind="stable")
        members = tuple(np.split(order, np.cumsum(counts)[:-1]))
        object.__setattr__(self, "members", members)

    def __getitem__(self, step: int) -> np.ndarray:
        batches = len(self.members) // self.classes
        a_pass, batch = divmod(step, batches)
        order = np.random.default_rng((self.seed, 0, a_pass))
        chosen = order.permutation(len(self.members))
        chosen = chosen[batch * self.classes : (batch + 1) * self.classes]
        draw = np.random.default_rng((self.seed, 1, step))
        return np.concatenate(
            [
                draw.choice(
                    self.members[c],
                    self.per_class,
                    replace=len(self.members[c]) < self.per_class,
                )
                for c in chosen
            ]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatches:
    """Batches of images with labels, P classes of K images each.

    ``batches[step]`` is a pure function of the step: images ``[P * K, height, width,
    channels]`` and integer labels ``[P * K]``.

    Args:
        images: ``[n, height, width, channels]``.
        labels: the label of each ``[n]``.
        classes: P.
        per_class: K.
        seed: what the batches are drawn with.
        turns: of every class, how many turned and mirrored copies are classes of their
            own: 1 for none, 2 for half turns, 4 for quarter turns, 8 for these with
            their mirror images; the last two for square images alone.

    Raises:
        ValueError: as `ClassBatches`, and if `turns` does not fit.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    per_class: int
    seed: int = 0
    turns: int = 1
    places: ClassBatches = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        height, width = self.images.shape[1:3]
        if self.turns not in (1, 2, 4, 8) or (self.turns > 2 and height != width):
            raise ValueError(
                "turns must be 1, 2, 4 or 8, and at most 2 for images that are not "
                f"square; got {self.turns} for {height} x {width} pixels."
            )
        _, labels = np.unique(self.labels, return_inverse=True)
        kinds = labels.max() + 1
        labels = np.concatenate([labels + kinds * turn for turn in range(self.turns)])
        places = ClassBatches(labels, self.classes, self.per_class, self.seed)
        object.__setattr__(self, "places", places)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.places[step]
        turn, place = np.divmod(chosen, len(self.labels))
        images = self.images[place]
        quarters = 2 * turn if self.turns == 2 else turn % 4
        for each in range(1, 4):
            rows = quarters == each
            if rows.any():
                images[rows] = np.rot90(images[rows], each, axes=(1, 2))
        images[turn >= 4] = images[turn >= 4][:, :, ::-1]
        return images, self.places.labels[chosen].astype(np.int32)
