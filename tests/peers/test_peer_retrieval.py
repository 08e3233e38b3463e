"""Retrieval metrics of pytorch-metric-learning's AccuracyCalculator."""

import numpy as np
import pytest

from tripletjax import retrieval

torch = pytest.importorskip("torch")
pytest.importorskip("faiss")
accuracy_calculator = pytest.importorskip(
    "pytorch_metric_learning.utils.accuracy_calculator"
)

NAMES = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "mean_average_precision_at_r": "map_at_r",
    "mean_average_precision": "mean_average_precision",
    "mean_reciprocal_rank": "mean_reciprocal_rank",
}


def check(x, labels, references=None, reference_labels=None, averages=False):
    other = len(x) - 1 if references is None else len(references)
    theirs = accuracy_calculator.AccuracyCalculator(
        include=tuple(NAMES), k=other, device=torch.device("cpu"), avg_of_avgs=averages
    )
    arrays = (x, labels) if references is None else (x, labels, references)
    extra = () if references is None else (reference_labels,)
    expected = theirs.get_accuracy(*map(torch.tensor, (*arrays, *extra)))
    got = retrieval.evaluate(
        x,
        labels,
        references=references,
        reference_labels=reference_labels,
        reduce_fn=retrieval.mean_of_classes if averages else retrieval.mean_of_queries,
    )
    for name, ours in NAMES.items():
        np.testing.assert_allclose(
            getattr(got, ours), expected[name], rtol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_self_retrieval(seed, averages):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 9, 120)
    x = np.float32(random.normal(size=(120, 8)) + labels[:, None] % 4)
    check(x, labels, averages=averages)


@pytest.mark.parametrize("averages", [False, True])
def test_gallery(averages):
    random = np.random.default_rng(0)
    # One label of the queries is not in the gallery.
    labels, reference_labels = random.integers(0, 9, 50), random.integers(1, 9, 90)
    x = np.float32(random.normal(size=(50, 8)) + labels[:, None] % 4)
    y = np.float32(random.normal(size=(90, 8)) + reference_labels[:, None] % 4)
    check(x, labels, y, reference_labels, averages)


def test_large_labels():
    """There they are float32, and these four are not distinct."""
    x, labels = np.eye(4, dtype=np.float32), 2**24 + np.arange(4)
    assert retrieval.evaluate(x, labels).queries == 0
