"""sentence-transformers: the losses in the batch, from embeddings."""

import jax
import numpy as np
import pytest
from peer_tools import (
    DEGENERATE,
    LABELS,
    assert_nothing,
    assert_same,
    embeddings,
    on_matrix,
    theirs,
)

import tripletjax as tj

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import (  # noqa: E402
    losses as st_losses,
)

every_labels = pytest.mark.parametrize("name", LABELS)
every_seed = pytest.mark.parametrize("seed", range(3))


def of(kind, method, labels, **options):
    loss = kind(torch.nn.Identity(), **options)
    labels = torch.tensor(labels)
    return lambda x: getattr(loss, method)(labels, x)


@pytest.mark.parametrize("margin", [0.5, 5.0])
@every_seed
@every_labels
def test_batch_all(name, seed, margin):
    labels = LABELS[name]
    assert_same(
        on_matrix(tj.batch_all_loss, labels, margin=margin),
        of(
            st_losses.BatchAllTripletLoss,
            "batch_all_triplet_loss",
            labels,
            margin=margin,
        ),
        embeddings(seed),
    )


@pytest.mark.parametrize("margin", [0.5, 5.0])
@every_seed
@every_labels
def test_semi_hard(name, seed, margin):
    labels = LABELS[name]
    assert_same(
        on_matrix(tj.batch_semi_hard_loss, labels, margin=margin),
        of(
            st_losses.BatchSemiHardTripletLoss,
            "batch_semi_hard_triplet_loss",
            labels,
            margin=margin,
        ),
        embeddings(seed),
    )


@every_seed
@pytest.mark.parametrize("name", ["p x k", "two classes"])
def test_batch_hard(name, seed):
    labels = LABELS[name]
    assert_same(
        on_matrix(tj.batch_hard_loss, labels, margin=5.0),
        of(st_losses.BatchHardTripletLoss, "batch_hard_triplet_loss", labels),
        embeddings(seed),
    )
    assert_same(
        on_matrix(tj.batch_hard_loss, labels, margin=0.0, hinge=jax.nn.softplus),
        of(
            st_losses.BatchHardSoftMarginTripletLoss,
            "batch_hard_triplet_soft_margin_loss",
            labels,
        ),
        embeddings(seed),
    )


def test_batch_hard_counts_anchors_without_a_positive():
    """They average over them, at distance 0; here they have no triplet."""
    labels = LABELS["uneven"]
    x = embeddings(0)
    total = on_matrix(
        tj.batch_hard_loss, labels, margin=5.0, reduce_fn=lambda t: t.total.sum()
    )(x)
    assert on_matrix(tj.batch_hard_loss, labels, reduce_fn=None)(x).valid.sum() == 15
    value, _ = theirs(
        of(st_losses.BatchHardTripletLoss, "batch_hard_triplet_loss", labels), x
    )
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    extra = max(5.0 - d[0][1:].min(), 0)  # anchor 0 is alone in its class
    np.testing.assert_allclose(value, (total + extra) / 16, rtol=1e-5)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize(
    "loss", [tj.batch_all_loss, tj.batch_hard_loss, tj.batch_semi_hard_loss]
)
def test_no_triplet(loss, name):
    """Of one class their semi-hard loss is not 0, of distinct ones their batch-hard."""
    assert_nothing(on_matrix(loss, DEGENERATE[name], margin=5.0), embeddings(0))


def test_what_they_make_of_no_triplet():
    x = embeddings(0)
    one_class, distinct = DEGENERATE["one class"], DEGENERATE["all distinct"]
    semi_hard = of(
        st_losses.BatchSemiHardTripletLoss, "batch_semi_hard_triplet_loss", one_class
    )
    hard = of(st_losses.BatchHardTripletLoss, "batch_hard_triplet_loss", distinct)
    for loss in (semi_hard, hard):
        value, gradient = theirs(loss, x)
        assert value > 0
        assert (gradient != 0).any()


def columns(x, count):
    """Anchors, positives and further documents, of one array."""
    return [x[12 * i : 12 * (i + 1)] for i in range(count)]


def in_batch_negatives(count, **options):
    """InfoNCE of anchors and documents; those after the positives are negatives."""
    labels = np.arange(12)
    references = np.arange(12 * (count - 1))

    def loss(x):
        d = tj.cosine(x[:12], x[12:])
        return tj.info_nce_loss(d, labels, reference_labels=references, **options)

    return loss


@pytest.mark.parametrize("count", [2, 3, 4])
@every_seed
def test_multiple_negatives_ranking(count, seed):
    """Columns after the second are hard negatives, of all anchors."""
    other = st_losses.MultipleNegativesRankingLoss(torch.nn.Identity())
    assert_same(
        in_batch_negatives(count),
        lambda x: other.compute_loss_from_embeddings(columns(x, count), None),
        embeddings(seed, n=12 * count),
    )


@every_seed
def test_symmetric_multiple_negatives_ranking(seed):
    other = st_losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    assert_same(
        in_batch_negatives(2, symmetric=True),
        lambda x: other.compute_loss_from_embeddings(columns(x, 2), None),
        embeddings(seed, n=24),
    )


@every_seed
def test_cached_multiple_negatives_ranking(seed):
    model = torch.nn.Sequential(torch.nn.Identity())
    other = st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)

    def theirs(x):
        parts = [list(torch.split(column, 5)) for column in columns(x, 3)]
        return other.calculate_loss(parts)

    assert_same(in_batch_negatives(3), theirs, embeddings(seed, n=36))
