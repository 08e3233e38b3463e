r"""Verification metrics: same or different, decided by a threshold on the distance.

A pair is accepted as the same if its distance is at most the threshold t. Distances of
pairs of the same item (positives) are d_p, those of different items (negatives) are
d_n. The true accept rate (TAR, in FaceNet VAL), the false accept rate (FAR)
and the false reject rate (FRR) are

.. math::

    TAR(t) = P(d_p \le t), \quad FAR(t) = P(d_n \le t), \quad FRR(t) = 1 - TAR(t)

The curve of TAR over FAR for all thresholds is the receiver operating characteristic
(ROC).

>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> distances = jnp.array([0.1, 0.3, 0.8, 0.5, 0.9, 1.2])
>>> same = jnp.array([True, True, True, False, False, False])
>>> metrics = tj.verification.evaluate_pairs(distances, same, fars=(1 / 3,))
>>> print(metrics.tar_at_far, f"{metrics.area_under_roc:.4f}")
[1.] 0.8889

Undefined values are NaN. They are every rate without a positive or without a negative
pair, and the TAR at a FAR below one pair of all negatives. If a distance is NaN, every
value is NaN.

Thresholds lie in the middle between two distances, so that ``distance <= threshold``
accepts the pairs that the rates count. NumPy arrays of 64 bits are compared in 64 bits,
also if jax_enable_x64 is off; the results are NumPy arrays of 64 bits then.
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
