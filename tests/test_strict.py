"""Every public function in 64 bits, where dtypes are easily mixed.

The fixture `strict_promotion` of conftest holds here, too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import public_functions

import tripletjax as tj

DRAW = np.random.default_rng(0)
X, R = (np.float32(DRAW.normal(size=(n, 6))) for n in (24, 30))
Y, RY = np.arange(24) % 6, np.arange(30) % 6
# One class is so large that the losses go another way.
LARGE = np.minimum(np.arange(24), 3)
GALLERY = {"references": R, "reference_labels": RY}
PADDED = {"where": Y > 0, "reference_where": RY > 1, "positions": np.arange(24)}
SAME = Y == 0
# Of so many, what is for CPUs and what is for accelerators differs: both are traced.
MANY = np.float32(np.random.default_rng(1).normal(size=(600, 6))), np.arange(600) // 4


def key():
    return jax.random.key(0)


def remembered():
    return tj.memory.push(tj.memory.create(9, 6), X, Y, where=Y > 1)


def distances(x=X, y=None):
    return tj.euclidean(x, y)


CALLS = {
    "euclidean": lambda: distances(),
    "squared_euclidean": lambda: tj.squared_euclidean(X, R),
    "cosine": lambda: tj.cosine.paired(X, X[::-1]),
    "manhattan": lambda: tj.manhattan(X, R),
    "Metric": lambda: tj.Metric(paired=lambda a, b: jnp.max(jnp.abs(a - b)))(X, R),
    "normalize": lambda: tj.normalize(X),
    "encode_in_chunks": lambda: jax.value_and_grad(
        lambda w: tj.encode_in_chunks(
            lambda w, x, key: jnp.matmul(x, w), w, X, chunk_size=9, key=key()
        ).sum()
    )(X.T),
    "matryoshka_loss": lambda: jax.value_and_grad(
        tj.matryoshka_loss(tj.blockwise.batch_hard_loss, (3, 6), weights=(2.0, 1.0))
    )(X, Y),
    "pair_masks": lambda: tj.pair_masks(Y, RY, **PADDED),
    "ignore_false_negatives": lambda: tj.ignore_false_negatives(
        distances(), Y, margin=0.1, share=0.1
    ),
    "batch_hard_triplets": lambda: tj.batch_hard_triplets(distances(), Y),
    "batch_easy_hard_triplets": lambda: tj.batch_easy_hard_triplets(distances(), Y),
    "batch_semi_hard_triplets": lambda: tj.batch_semi_hard_triplets(distances(), Y),
    "random_semi_hard_triplets": lambda: tj.random_semi_hard_triplets(
        key(), distances(), Y
    ),
    "all_triplets": lambda: tj.all_triplets(Y, size=99),
    "distance_weighted_triplets": lambda: tj.distance_weighted_triplets(
        key(), distances(), Y, dim=6
    ),
    "random_triplets": lambda: tj.random_triplets(key(), Y),
    "triplet_margin_loss": lambda: jax.value_and_grad(
        lambda x: tj.triplet_margin_loss(x[:8], x[8:16], x[16:], swap=True)
    )(X),
    "triplet_loss": lambda: jax.value_and_grad(
        lambda x: tj.triplet_loss(distances(x), tj.batch_hard_triplets(distances(x), Y))
    )(X),
    "selectively_contrastive": lambda: jax.value_and_grad(
        lambda x: tj.batch_hard_loss(
            distances(x), Y, hinge=tj.selectively_contrastive()
        )
    )(X),
    "mean_active": lambda: tj.mean_active(
        tj.batch_all_loss(distances(), Y, reduce_fn=None)
    ),
    "mean_of_anchors": lambda: tj.sigmoid_loss(distances(), Y),
    "mean_active_by_side": lambda: tj.contrastive_loss(distances(), Y),
    "mean_valid_by_side": lambda: tj.mean_valid_by_side(
        tj.contrastive_loss(distances(), Y, reduce_fn=None)
    ),
    "mean_valid": lambda: tj.mean_valid(
        tj.batch_all_loss(distances(), Y, reduce_fn=None)
    ),
    "mine_hard_negatives": lambda: tj.mine_hard_negatives(
        X, Y, k=3, range_max=9, margin=0.1, relative_margin=0.1, **GALLERY
    ),
    "mine_hard_negatives at random": lambda: tj.mine_hard_negatives(
        X, Y, k=3, range_max=9, key=key()
    ),
    "mine_hard_positives": lambda: tj.mine_hard_positives(X, Y, k=3, where=Y > 0),
    "mine_triplets": lambda: tj.mine_triplets(X, Y, k=2, margin=0.1),
    "retrieval.nearest_neighbors": lambda: tj.retrieval.nearest_neighbors(X, R, 3),
    "retrieval.expand_queries": lambda: tj.retrieval.expand_queries(X, R, k=3),
    "retrieval.k_reciprocal_distances": lambda: tj.retrieval.k_reciprocal_distances(
        X, R, k=5, k1=4, k2=2, where=Y > 0, reference_where=RY > 1
    ),
    "retrieval.evaluate": lambda: tj.retrieval.evaluate(X, Y),
    "retrieval.evaluate each": lambda: tj.retrieval.evaluate(
        X, Y, **GALLERY, reference_where=DRAW_MASK
    ),
    "retrieval.mean_of_queries": lambda: tj.retrieval.mean_of_queries(
        tj.retrieval.evaluate(X, Y, reduce_fn=None), Y
    ),
    "retrieval.mean_of_classes": lambda: tj.retrieval.evaluate(
        X, Y, **GALLERY, reduce_fn=tj.retrieval.mean_of_classes
    ),
    "retrieval.recall_at_k": lambda: tj.retrieval.recall_at_k(X, Y),
    "retrieval.few_shot_accuracy": lambda: tj.retrieval.few_shot_accuracy(
        X, Y, R, RY, class_means=True, where=RY > 0, support_where=Y >= 0
    ),
    "verification.evaluate": lambda: tj.verification.evaluate(X, Y, fars=(0.1,)),
    "verification.evaluate_pairs": lambda: tj.verification.evaluate_pairs(
        distances()[0], SAME, fars=(0.5,)
    ),
    "verification.tar_at_far": lambda: tj.verification.tar_at_far(
        distances()[0], SAME, fars=(0.5,)
    ),
    "verification.equal_error_rate": lambda: tj.verification.equal_error_rate(
        distances()[0], SAME
    ),
    "verification.roc": lambda: tj.verification.roc(distances()[0], SAME),
    "verification.k_fold_accuracy": lambda: tj.verification.k_fold_accuracy(
        distances()[0], SAME, folds=3
    ),
    "verification.bootstrap": lambda: tj.verification.bootstrap(
        key(), distances()[0], Y, distances()[1], np.stack([Y, Y + 1], 1), replicates=4
    ),
    "retrieval.nearest_classes": lambda: tj.retrieval.nearest_classes(X, R, RY, k=2),
    "retrieval.evaluate_identification": lambda: tj.retrieval.evaluate_identification(
        X, Y + 3, fpirs=(0.5,), **GALLERY
    ),
    "retrieval.similarity_precision": lambda: tj.retrieval.similarity_precision(
        X, np.arange(24).reshape(8, 3)
    ),
    "retrieval.score_at_top_k": lambda: tj.retrieval.score_at_top_k(
        X, np.arange(24).reshape(8, 3), k=9, groups=Y % 2
    ),
    "relevance_triplets": lambda: tj.relevance_triplets(
        key(), jnp.exp(-distances()), Y, size=9, cap=0.9, gap=0.1
    ),
    "collapse.report": lambda: tj.collapse.report(X),
    "memory.create": lambda: tj.memory.create(9, 6),
    "memory.push": lambda: remembered(),
    "memory.references": lambda: tj.memory.references(remembered(), X, Y),
}
DRAW_MASK = DRAW.random((24, 30)) < 0.7


def gradient(loss, *arguments, **options):
    return jax.value_and_grad(lambda x: loss(x, *arguments, **options))(X)


for name in ("batch_all_loss", "batch_hard_loss", "batch_semi_hard_loss"):
    by_matrix, blockwise = getattr(tj, name), getattr(tj.blockwise, name)
    CALLS[name] = functools.partial(
        gradient, lambda x, f: f(distances(x), Y, reduce_fn=tj.mean_active), by_matrix
    )
    CALLS[f"blockwise.{name}"] = functools.partial(gradient, blockwise, Y)
    CALLS[f"blockwise.{name} large"] = functools.partial(gradient, blockwise, LARGE)
    CALLS[f"blockwise.{name} gallery"] = functools.partial(
        gradient, blockwise, Y, metric=tj.cosine, **GALLERY, **PADDED
    )
    CALLS[f"blockwise.{name} by the metric"] = functools.partial(
        gradient, blockwise, Y, metric=tj.manhattan
    )
    CALLS[f"blockwise.{name} many"] = functools.partial(
        jax.value_and_grad(blockwise), *MANY
    )


PAIR_LOSSES = (
    "smooth_ap_loss",
    "supcon_loss",
    "nt_xent_loss",
    "decoupled_contrastive_loss",
    "nca_loss",
    "multi_similarity_loss",
    "circle_loss",
    "generalized_lifted_structure_loss",
    "contrastive_loss",
    "margin_loss",
    "sigmoid_loss",
    "info_nce_loss",
    "cosface_loss",
    "arcface_loss",
    "proxy_anchor_loss",
)
GENERAL = {
    "log_sum_exp_loss": {
        "logit": lambda d, t: -d / t,
        "cost": lambda pairs, t: pairs.terms(
            jnp.where(pairs.has_negative, pairs.negatives, 0), pairs.has_positive
        ),
        "parameters": 0.1,
    },
    "separable_loss": {
        "positive_cost": lambda d, m: d,
        "negative_cost": lambda d, m: jax.nn.relu(m - d),
        "parameters": 1.0,
    },
}
for name in (*PAIR_LOSSES, *GENERAL):
    by_matrix, blockwise = getattr(tj, name), getattr(tj.blockwise, name)
    options = GENERAL.get(name, {})
    CALLS[name] = functools.partial(
        gradient,
        lambda x, f, options: f(distances(x, R), Y, reference_labels=RY, **options),
        by_matrix,
        options,
    )
    CALLS[f"blockwise.{name}"] = functools.partial(
        gradient, blockwise, Y, **GALLERY, **options
    )
    if name not in PAIR_LOSSES[-4:]:
        CALLS[f"blockwise.{name} of terms"] = functools.partial(
            gradient,
            blockwise,
            Y,
            where=Y > 0,
            reduce_fn=lambda terms: jnp.sum(terms.total),
            **options,
        )


def banded(band):
    return tj.all_triplets(Y, size=99, distances=distances(), band=band())


for name in ("hard_band", "semi_hard_band", "easy_band", "violating_band"):
    CALLS[name] = functools.partial(banded, getattr(tj, name))
for name, options in (
    ("batch_hard_triplets", {}),
    ("batch_semi_hard_triplets", {"size": 99}),
):
    miner = getattr(tj.blockwise, name)
    CALLS[f"blockwise.{name}"] = functools.partial(miner, X, Y, **options)
    CALLS[f"blockwise.{name} large"] = functools.partial(miner, X, LARGE, **options)
    CALLS[f"blockwise.{name} many"] = functools.partial(miner, *MANY, **options)
CALLS["blockwise.triplet_loss"] = lambda: gradient(
    tj.blockwise.triplet_loss, tj.blockwise.batch_hard_triplets(X, Y)
)


@pytest.mark.parametrize("name", CALLS)
def test_traces_in_64_bits(name):
    with jax.enable_x64(True):
        jax.eval_shape(CALLS[name])


@pytest.mark.full
@pytest.mark.parametrize("name", CALLS)
def test_gives_the_same_in_64_bits(name):
    # JAX 0.10 would call a program that the test above has traced with other dtypes.
    jax.clear_caches()
    with jax.enable_x64(True):
        got = jax.tree.leaves(CALLS[name]())
    expected = jax.tree.leaves(CALLS[name]())
    drawn = ("random", "weighted", "bootstrap", "relevance_triplets")
    if any(word in name for word in drawn):
        # Random numbers of 64 bits are others.
        assert [x.shape for x in got] == [x.shape for x in expected]
        return
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


def test_no_public_function_is_left_out():
    called = {name.split()[0] for name in CALLS}
    assert not public_functions().keys() - called
