"""Rounds of training: batches of classes that the model confuses.

A run with rounds stops at equal intervals. It embeds its training images, mines the
hardest negatives of each image over all of them, and groups the classes of these pairs.
Classes of a group come into a batch together from there on. ``rounds.json`` in the run
directory has the groups of each round, so that every batch stays a pure function of the
step.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

import tripletjax as tj
from tripletjax.learn.data.sampling import TOGETHER
from tripletjax.learn.files import write_json
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan
from tripletjax.learn.training.loop import Batches

FILE = "rounds.json"
# The hardest negatives of each image that count for the groups.
HARDEST = 5


@dataclasses.dataclass(frozen=True)
class Round:
    """The groups of a round.

    Attributes:
        step: the first step of the round.
        groups: the group of each class, in the order of labels.
        nearer: share of images with a negative nearer than the nearest positive.
    """

    step: int
    groups: tuple[int, ...]
    nearer: float


@dataclasses.dataclass(frozen=True)
class RoundBatches:
    """Batches of several rounds.

    Attributes:
        rounds: the first step of each round, from 0, and its batches.
    """

    rounds: Sequence[tuple[int, Batches]]

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        batches = [batches for first, batches in self.rounds if first <= step][-1]
        return batches[step]


def rounds_of(plan: Plan) -> int:
    """The number of rounds of a plan that begin with mining."""
    return plan.batches.rounds if isinstance(plan.batches, ClassBatchPlan) else 0


def first_steps(steps: int, rounds: int) -> list[int]:
    """The first steps of rounds in a run, without step 0.

    >>> first_steps(100, 3)
    [25, 50, 75]
    """
    firsts = {steps * (number + 1) // (rounds + 1) for number in range(rounds)}
    return sorted(firsts - {0, steps})


def read_rounds(out: Path) -> list[Round]:
    """Read the rounds of a run directory, in order.

    Raises:
        FileNotFoundError: if there is no file; every run with rounds begins with one.
        ValueError: if the file is damaged.
    """
    file = out / FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist, but the run goes on with its groups of classes. "
            "Restore the file, or begin in another directory."
        )
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [
            Round(**entry | {"groups": tuple(entry["groups"])}) for entry in entries
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged: {error!r}. Restore the file, or begin in another "
            "directory."
        ) from error


def begin_rounds(out: Path) -> None:
    """Write the file of a run directory without a round."""
    write_json(out / FILE, [])


def write_round(out: Path, new: Round) -> None:
    """Add a round to the file of a run directory, after those of earlier steps."""
    earlier = [one for one in read_rounds(out) if one.step < new.step]
    write_json(out / FILE, [dataclasses.asdict(one) for one in (*earlier, new)])


def mine_round(x: ArrayLike, labels: np.ndarray, step: int) -> Round:
    """Group the classes of the hardest negatives of all images.

    Args:
        x: unit vectors ``[n, d]``.
        labels: integers ``[n]``.
        step: the first step of the round.
    """
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    labels = labels.astype(np.int32)
    k = min(HARDEST, len(labels) - int(counts.max()))
    mined = tj.mine_hard_negatives(x, labels, k=k)
    nearer = tj.mine_hard_negatives(x, labels, k=1, margin=0.0).excluded.margin
    rows, columns = np.nonzero(np.asarray(mined.valid))
    pairs = labels[rows], labels[np.asarray(mined.indices)[rows, columns]]
    groups = group_classes(np.stack(pairs, axis=1), len(counts))
    return Round(step, tuple(groups), float(np.mean(np.asarray(nearer) > 0)))


def group_classes(pairs: np.ndarray, count: int, most: int = TOGETHER) -> list[int]:
    """Group the classes of hard pairs, those of the most pairs first.

    Args:
        pairs: classes of the two images of each pair, ``[p, 2]``.
        count: number of classes.
        most: the largest number of classes in a group.

    Returns:
        The group of each class.

    >>> group_classes(np.array([[0, 3], [3, 0], [1, 3], [2, 1]]), 5, most=2)
    [0, 1, 1, 0, 2]
    """
    unordered = np.sort(pairs, axis=1)
    classes, numbers = np.unique(unordered, axis=0, return_counts=True)
    group_of = {index: [index] for index in range(count)}
    for first, second in classes[np.argsort(-numbers, kind="stable")].tolist():
        one, other = group_of[first], group_of[second]
        if one is not other and len(one) + len(other) <= most:
            one += other
            group_of |= dict.fromkeys(other, one)
    firsts = sorted({min(group) for group in group_of.values()})
    number_of = {first: number for number, first in enumerate(firsts)}
    return [number_of[min(group_of[index])] for index in range(count)]
