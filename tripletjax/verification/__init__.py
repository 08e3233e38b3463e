"""Is it any good, in pairs: "are these two the same?", decided by a threshold.

A pair is accepted as the same if its distance is at most a threshold. Of all pairs of
the same item (positives) the share that is accepted is the true accept rate (TAR, in
FaceNet VAL), of all others the false accept rate (FAR); the curve of both over all
thresholds is the ROC.

>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> distances = jnp.array([0.1, 0.3, 0.8, 0.5, 0.9, 1.2])
>>> same = jnp.array([True, True, True, False, False, False])
>>> metrics = tj.verification.evaluate_pairs(distances, same, fars=(1 / 3,))
>>> print(metrics.tar_at_far, f"{metrics.area_under_roc:.4f}")
[1.] 0.8889

What no pair says anything about is NaN: every rate of no positive or of no negative
pair, true accept rates at a FAR finer than one pair of all negatives, and everything if
the distance of a pair is NaN.

Thresholds lie in the middle between two distances, so that ``distance <= threshold``
accepts on the same data what the rates say. Distances of 64 bits in NumPy arrays are
compared in 64 bits, also where jax_enable_x64 is off, and the results are NumPy arrays
of 64 bits.
"""

from tripletjax.verification.curve import Roc, roc
from tripletjax.verification.evaluation import (
    VerificationMetrics,
    equal_error_rate,
    evaluate,
    evaluate_pairs,
    tar_at_far,
)
from tripletjax.verification.folds import KFold, k_fold_accuracy
from tripletjax.verification.resampling import bootstrap

__all__ = [
    "KFold",
    "Roc",
    "VerificationMetrics",
    "bootstrap",
    "equal_error_rate",
    "evaluate",
    "evaluate_pairs",
    "k_fold_accuracy",
    "roc",
    "tar_at_far",
]
