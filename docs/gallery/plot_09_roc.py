"""
ROC, and where to put the threshold
===================================

Same or different is a question about pairs. The ROC shows every threshold: how many
pairs of the same digit are accepted, and how many of different ones are with them. A
threshold is chosen at a false accept rate on some writers, and holds, or not, for
others.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import tripletjax as tj

pixels, digits = load_digits(return_X_y=True)
half = len(digits) // 2  # The second half was written by other people.
directions = LinearDiscriminantAnalysis().fit(pixels[:half], digits[:half])
views = {"pixels": pixels[half:], "LDA": directions.transform(pixels[half:])}
labels = jnp.asarray(digits[half:])
views = {
    name: jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    for name, x in views.items()
}

# %%
# `verification.evaluate` goes over all pairs without keeping their distances;
# `verification.roc` takes distances of pairs that are given.

figure, axes = plt.subplots(layout="constrained")
upper = np.triu_indices(len(labels), 1)
same = labels[upper[0]] == labels[upper[1]]
for name, x in views.items():
    metrics = tj.verification.evaluate(x, labels, fars=(0.1, 0.01))
    curve = tj.verification.roc(tj.euclidean(x)[upper], same)
    axes.plot(
        curve.false_accept_rate,
        curve.true_accept_rate,
        label=f"{name}: equal error rate {100 * metrics.equal_error_rate:.1f} %",
    )
axes.set_xscale("log")
axes.set_xlim(1e-4, 1)
axes.set_xlabel("false accept rate")
axes.set_ylabel("true accept rate")
axes.set_title("Pairs of digits of unseen writers")
axes.legend()
plt.show()

# %%
# A threshold chosen on one half of them, for 1 % false accepts, and what it gives on
# the other.

x = views["LDA"]
middle = len(x) // 2
rows = {}
for name, part in (("chosen on", slice(0, middle)), ("held out", slice(middle, None))):
    upper = np.triu_indices(len(x[part]), 1)
    one = labels[part]
    rows[name] = tj.euclidean(x[part])[upper], one[upper[0]] == one[upper[1]]
curve = tj.verification.roc(*rows["chosen on"])
threshold = curve.thresholds[jnp.sum(curve.false_accept_rate <= 0.01) - 1]
for name, (distances, same) in rows.items():
    accepted = distances <= threshold
    print(
        f"{name}: {100 * accepted[same].mean():.1f} % of same pairs, "
        f"{100 * accepted[~same].mean():.2f} % of different ones"
    )

# %%
# `tripletjax verify` does this for a run, and says between what bounds the rates of
# other people lie: pairs of the same people are not independent.
