"""Calibration: a threshold at a chosen false accept rate, saved with its embedder.

The threshold is chosen on images of unseen classes. A logistic regression on distances
gives the probability that a pair is of the same class. The vectors of the images are
saved, too: identification counts how many of them a gallery would name.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from tripletjax.apps.verification.pair_distances import PairDistances
from tripletjax.learn.counts import counted
from tripletjax.learn.files import free_path, replaced, write_json

FOLDER, FILE, VECTORS = "calibration", "calibration.json", "vectors.npz"
FORMAT = 1
# False accepts that a rate needs, to be measured.
NEEDED = 10
# The largest number of vectors that are saved.
KEPT = 5000


class TooFewPairsError(ValueError):
    """Too few pairs to measure a false accept rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold, and the images that it was chosen on.

    Attributes:
        embedder: key of the embedding.
        data: the folder of the images.
        images: number of images.
        classes: number of classes.
        same: number of pairs of the same class.
        different: number of pairs of different classes.
        far: false accept rate of the threshold.
        threshold: largest distance that is accepted.
        tar: true accept rate of the threshold.
        slope: of the logistic regression.
        intercept: of the logistic regression.
        vectors: of the images, or of a random sample, ``[k, d]``.
        names: classes of these vectors ``[k]``.
    """

    embedder: str
    data: str
    images: int
    classes: int
    same: int
    different: int
    far: float
    threshold: float
    tar: float
    slope: float
    intercept: float
    vectors: np.ndarray
    names: np.ndarray

    def probability(self, distance: Any) -> np.ndarray:
        """Probability that pairs are of the same class, at equal priors."""
        score = self.intercept + self.slope * np.asarray(distance, np.float64)
        return 1 / (1 + np.exp(-score))

    def summary(self) -> dict[str, Any]:
        """All but the vectors, for JSON."""
        arrays = "vectors", "names"
        return {name: x for name, x in vars(self).items() if name not in arrays}

    def write(self, directory: str | Path) -> Path | None:
        """Save the calibration in the directory of a run or another embedder.

        Returns:
            The folder that an earlier calibration was moved to, if there was one.
        """
        wanted = Path(directory) / FOLDER
        earlier = None
        try:
            with replaced(wanted) as part:
                write_json(part / FILE, {"format": FORMAT, **self.summary()})
                with (part / VECTORS).open("wb") as file:
                    np.savez(file, vectors=self.vectors, names=self.names)
                if wanted.exists():
                    earlier = free_path(wanted.with_name(f"{FOLDER}-before"))
                    wanted.rename(earlier)
        except BaseException:
            if earlier is not None and earlier.exists() and not wanted.exists():
                earlier.rename(wanted)
            raise
        return earlier

    @classmethod
    def read(cls, directory: str | Path, key: str) -> "Calibration":
        """Read the calibration in the directory of a run or another embedder.

        Args:
            directory: the directory.
            key: of the embedding that will use it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is of another embedding, or cannot be read.
        """
        folder = Path(directory) / FOLDER
        again = (
            "Choose one on images of unseen classes: tripletjax verify --data FOLDER, "
            "with the same --run or --embedder."
        )
        if not (folder / FILE).exists():
            raise FileNotFoundError(f"no threshold was chosen in {directory}. {again}")
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("it is of another version")
            with np.load(folder / VECTORS) as arrays:
                values |= {name: arrays[name] for name in ("vectors", "names")}
            calibration = cls(**values)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{folder} cannot be read: {error}. {again}") from error
        if calibration.embedder != key:
            raise ValueError(
                f"the threshold in {folder} is of another state of the run, or another "
                f"embedder. {again}"
            )
        return calibration


def check_enough(different: int, far: float) -> None:
    """Raise `TooFewPairsError` if the pairs cannot measure a false accept rate."""
    if not 0 < far < 1:
        raise ValueError(f"far must be a share between 0 and 1, got {far}.")
    if different * far < NEEDED - 1e-6:
        needed = -(-NEEDED // far)
        raise TooFewPairsError(
            f"a false accept rate of {far:g} cannot be measured by "
            f"{counted(different, 'pair')} of different classes: {needed:,.0f} are "
            f"needed, for {NEEDED} false accepts"
        )


def calibrate(
    pairs: PairDistances,
    *,
    embedder: str,
    data: str,
    far: float,
    threshold: float,
    tar: float,
    vectors: np.ndarray,
    names: np.ndarray,
) -> Calibration:
    """Make a calibration: a threshold, and a probability for every distance.

    Args:
        pairs: distances of pairs of unseen classes.
        embedder: key of the embedding.
        data: name of the images.
        far: false accept rate, between 0 and 1.
        threshold: at this rate, as `tripletjax.verification` measures it.
        tar: true accept rate of the threshold.
        vectors: of the images ``[n, d]``.
        names: of their classes ``[n]``.

    Raises:
        TooFewPairsError: if there are too few pairs to measure the rate.
        ValueError: if no pair is of the same class, or `far` is not between 0 and 1.
    """
    check_enough(pairs.all_different, far)
    if not len(pairs.same):
        raise ValueError(f"{data} has no two images of one class.")
    distances, same = pairs.listed
    # Equal priors.
    regression = LogisticRegression(class_weight="balanced").fit(
        distances.astype(np.float64)[:, None], same
    )
    sample = np.random.default_rng(0).permutation(len(vectors))[:KEPT]
    return Calibration(
        embedder=embedder,
        data=data,
        images=len(vectors),
        classes=len(np.unique(names)),
        same=pairs.all_same,
        different=pairs.all_different,
        far=far,
        # Below all distances, if no pair is accepted.
        threshold=max(threshold, -1.0),
        tar=tar,
        slope=float(regression.coef_[0, 0]),
        intercept=float(regression.intercept_[0]),
        vectors=vectors[np.sort(sample)],
        names=np.asarray(names)[np.sort(sample)],
    )
