"""The checkpoint that a run keeps, and intervals of its final numbers.

Images of one class succeed or fail together, so that the classes, not the images, are
the sample of which a standard error is taken.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from scipy.special import stdtrit

from tripletjax.learn.counts import counted
from tripletjax.learn.data.splits import MIN_CLASSES
from tripletjax.learn.networks.embedding import strongly_typed

# The probability that an earlier checkpoint is kept where it is no better than the last
# (benchmarks/checkpoints.py), and that of an interval to hold the mean of all classes.
SIGNIFICANCE, CONFIDENCE = 0.01, 0.95


class Validation(NamedTuple):
    """The result of one validation.

    Attributes:
        metrics: numbers by name, as they are logged.
        by_class: one value per class, larger for better, by which checkpoints are
            compared; of given triplets, one value per anchor.
    """

    metrics: dict[str, float]
    by_class: np.ndarray = np.zeros(0)


class Candidate(NamedTuple):
    """The model of the validation with the highest mean over classes so far.

    Attributes:
        step: the step of the validation.
        model: the state of the model that was validated.
        by_class: its values ``[classes]``.
    """

    step: Array
    model: nnx.State
    by_class: Array


def first_candidate(model: nnx.Module, classes: int) -> Candidate | None:
    """The candidate before the first validation, which takes its place.

    None of fewer than `MIN_CLASSES` classes, where the last model is kept.
    """
    return candidate_of(model, 0, np.zeros(classes)) if classes >= MIN_CLASSES else None


def candidate_of(model: nnx.Module, step: int, by_class: np.ndarray) -> Candidate:
    """A copy of a model, since a training step gives the memory of its state away."""
    return Candidate(
        jnp.array(step, jnp.int32),
        jax.tree.map(jnp.copy, strongly_typed(nnx.state(model))),
        jnp.asarray(by_class, jnp.float32),
    )


def select(
    candidate: Candidate | None, now: Candidate
) -> tuple[Candidate | None, Candidate]:
    """The next candidate, and the model to keep if training ended here.

    Raises:
        ValueError: if the two have different numbers of classes.
    """
    if candidate is None:
        return None, now
    earlier, last = (np.asarray(x.by_class) for x in (candidate, now))
    if earlier.shape != last.shape:
        raise ValueError(
            f"by_class must be [{len(earlier)}], as validation_classes says, got shape "
            f"{last.shape}."
        )
    if int(candidate.step) == 0:
        return now, now
    kept = candidate if exceeds_noise(earlier, last) else now
    # Of equals the later one.
    highest = candidate if earlier.mean() > last.mean() else now
    return highest, kept


def exceeds_noise(
    earlier: np.ndarray,
    last: np.ndarray,
    *,
    min_classes: int = MIN_CLASSES,
    significance: float = SIGNIFICANCE,
) -> bool:
    """Whether an earlier checkpoint is better than the last by more than chance.

    A one-sided paired t-test: the mean over classes of the difference must exceed its
    standard error times the quantile 1 - `significance` of Student's t. With fewer
    than `min_classes` classes the result is False.

    Args:
        earlier: values ``[classes]`` of the earlier checkpoint.
        last: values of the same classes of the last checkpoint.
        min_classes: the least number of classes, at least 2.
        significance: the probability of yes where neither is better.

    >>> last = np.linspace(50, 90, 16)
    >>> spread = np.tile([1, -1], 8)
    >>> exceeds_noise(last + 10 + spread, last)
    True
    >>> exceeds_noise(last + spread + 90 * (last == 50), last)
    False
    """
    difference = np.asarray(earlier, float) - np.asarray(last, float)
    n = len(difference)
    if n < min_classes:
        return False
    error = np.std(difference, ddof=1) / np.sqrt(n)
    return bool(np.mean(difference) > stdtrit(n - 1, 1 - significance) * error)


def note_of(classes: int, unit: str) -> list[str]:
    """The note of a run whose validation has too few classes to choose by."""
    if classes >= MIN_CLASSES:
        return []
    return [
        f"the last checkpoint is kept: validation has {counted(classes, unit)}, and a "
        f"choice needs at least {MIN_CLASSES}"
    ]


def class_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the values ``[n]`` of each class, in the order of the labels."""
    _, rows = np.unique(labels, return_inverse=True)
    return np.bincount(rows, values) / np.bincount(rows)


def interval_over_classes(
    values: np.ndarray, labels: np.ndarray
) -> tuple[float, float] | None:
    """Interval of a mean over items whose classes are drawn at random.

    The mean is a ratio of two sums over classes: its standard error is that of the sums
    of deviations, and its quantiles are those of Student's t.

    Args:
        values: numbers ``[n]`` from 0 to 100, one per item.
        labels: integers ``[n]``, the class of each item.

    Returns:
        The ends of the `CONFIDENCE` interval within 0 to 100; None of one class.

    >>> labels = np.repeat(np.arange(4), 2)
    >>> values = np.array([90.0, 80.0, 70.0, 80.0, 60.0, 70.0, 80.0, 90.0])
    >>> print(*np.round(interval_over_classes(values, labels), 1))
    62.3 92.7
    """
    values = np.asarray(values, float)
    mean = values.mean()
    _, rows = np.unique(labels, return_inverse=True)
    deviations = np.bincount(rows, values - mean)
    n = len(deviations)
    if n < 2:
        return None
    error = np.sqrt(n / (n - 1) * np.sum(deviations**2)) / len(values)
    half = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * error
    return max(0.0, mean - half), min(100.0, mean + half)
