"""A threshold of one's own: chosen at a stated false accept rate, and kept with it.

It is chosen on images of classes that the run was not trained on, and says what share
of different pairs it lets through. With it come the chance that a pair is the same,
by logistic regression on distances, and the vectors that it was chosen on: of them
identification asks how many would be taken for somebody of a gallery.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from tripletjax.apps.verification.pair_distances import PairDistances
from tripletjax.learn.files import free_path, replaced, write_json

FOLDER, FILE, VECTORS = "calibration", "calibration.json", "vectors.npz"
FORMAT = 1
# On so many false accepts a rate has to rest.
NEEDED = 10
# So many vectors are kept at most.
KEPT = 5000


class TooFewPairsError(ValueError):
    """There are too few pairs to show a false accept rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold, and what it was chosen on.

    Attributes:
        embedder: the key of the embedding.
        data: the folder that it was chosen on.
        images: how many.
        classes: of how many classes.
        same: how many pairs of the same class.
        different: how many others.
        far: the false accept rate that it was chosen at.
        threshold: at most which distances are accepted.
        tar: the true accept rate there.
        slope: of the logistic regression.
        intercept: likewise.
        vectors: of the images, or of some of them, ``[k, d]``.
        names: the classes of these.
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
        """The chance that pairs are the same, where as many are as are not."""
        score = self.intercept + self.slope * np.asarray(distance, np.float64)
        return 1 / (1 + np.exp(-score))

    def summary(self) -> dict[str, Any]:
        """All but the vectors, for JSON."""
        values = {field.name: getattr(self, field.name) for field in FIELDS}
        return {
            name: values[name] for name in values if name not in ("vectors", "names")
        }

    def write(self, run_dir: str | Path) -> Path | None:
        """Keeps it beside a run.

        Returns:
            Where an earlier one has been moved to, if there is one.
        """
        wanted = Path(run_dir) / FOLDER
        earlier = None
        with replaced(wanted) as part:
            write_json(part / FILE, {"format": FORMAT, **self.summary()})
            with (part / VECTORS).open("wb") as file:
                np.savez(file, vectors=self.vectors, names=self.names)
            if wanted.exists():
                earlier = free_path(wanted.with_name(f"{FOLDER}-before"))
                wanted.rename(earlier)
        return earlier

    @classmethod
    def read(cls, run_dir: str | Path, key: str) -> "Calibration":
        """The one that is kept beside a run.

        Args:
            run_dir: where it is kept.
            key: of the embedding that it is to be used with.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is of another embedding, or cannot be read.
        """
        folder = Path(run_dir) / FOLDER
        again = (
            f"Choose one on images that it was not trained on: tripletjax verify --run "
            f"{run_dir} --data FOLDER"
        )
        if not (folder / FILE).exists():
            raise FileNotFoundError(f"no threshold was chosen for {run_dir}. {again}")
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("it is of another version")
            with np.load(folder / VECTORS) as arrays:
                values |= {name: arrays[name] for name in ("vectors", "names")}
            found = cls(**values)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{folder} cannot be read: {error}. {again}") from error
        if found.embedder != key:
            raise ValueError(
                f"the threshold in {folder} is of another state of the run, or another "
                f"embedding. {again}"
            )
        return found


FIELDS = dataclasses.fields(Calibration)


def check_enough(different: int, far: float) -> None:
    """Raises `TooFewPairsError` if so many pairs cannot show a false accept rate."""
    if not 0 < far < 1:
        raise ValueError(f"far must be a share between 0 and 1, got {far}.")
    if different * far < NEEDED - 1e-6:
        needed = -(-NEEDED // far)
        raise TooFewPairsError(
            f"a false accept rate of {far:g} is not shown by {different:,} pairs of "
            f"different classes: {needed:,.0f} are needed, for {NEEDED} false accepts; "
            f"{needed / different if different else np.inf:.1f} times as many"
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
    """A threshold at a false accept rate, with a chance for every distance.

    Args:
        pairs: distances of pairs of classes that were not trained on.
        embedder: the key of the embedding.
        data: what the pairs are of.
        far: the false accept rate, a share.
        threshold: the distance at that rate, as `tripletjax.verification` measures it.
        tar: the true accept rate there, likewise.
        vectors: of the images ``[n, d]``.
        names: of their classes ``[n]``.

    Raises:
        TooFewPairsError: if there are too few pairs to show the rate.
        ValueError: if all pairs are the same, or `far` is no share.
    """
    check_enough(pairs.all_different, far)
    if not len(pairs.same):
        raise ValueError(f"{data} has no two images of one class.")
    distances, same = pairs.listed
    # As if there were as many same pairs as different ones.
    fitted = LogisticRegression(class_weight="balanced").fit(
        distances.astype(np.float64)[:, None], same
    )
    some = np.random.default_rng(0).permutation(len(vectors))[:KEPT]
    return Calibration(
        embedder=embedder,
        data=data,
        images=len(vectors),
        classes=len(np.unique(names)),
        same=pairs.all_same,
        different=pairs.all_different,
        far=far,
        # Below all distances, if none is to be accepted.
        threshold=max(threshold, -1.0),
        tar=tar,
        slope=float(fitted.coef_[0, 0]),
        intercept=float(fitted.intercept_[0]),
        vectors=vectors[np.sort(some)],
        names=np.asarray(names)[np.sort(some)],
    )
