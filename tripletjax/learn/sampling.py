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
