"""The temporary memory of every public function, compiled for 16,384 items.

Nothing runs: the programs are compiled from shapes. A limit covers temporary memory
alone, without arguments and results. Losses and metrics have their gradient with them.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from problems import public_functions, unless_slow

import tripletjax as tj
from tripletjax import blockwise, collapse, memory, retrieval, verification

N, D = 16_384, 16
MIB = 2**20
# One number of 32 bits for each pair of items: 1 GiB.
MATRIX = 4 * N * N


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
X, Y = shape(N, D), shape(N, dtype=jnp.int32)
VALUES, FLAGS = shape(N), shape(N, dtype=bool)
DISTANCES = shape(N, N)
MASKS = tj.PairMasks(*[shape(N, N, dtype=bool)] * 2)
TRIPLETS = tj.Triplets(Y, Y, Y, FLAGS)
TERMS = tj.TripletTerms(VALUES, VALUES, VALUES)
MEMORY = jax.eval_shape(lambda: memory.create(N, D))
PER_QUERY = retrieval.RetrievalMetrics(*[VALUES] * 6, FLAGS)
LISTED, PEOPLE = (shape(N, k, dtype=jnp.int32) for k in (3, 2))


class Program(NamedTuple):
    """A function to compile, and the most bytes of temporary memory that it may use."""

    limit: int
    function: Callable
    arguments: tuple


def of_metric(limit: int, metric: tj.Metric) -> Program:
    """A distance matrix, and the gradient that comes back through it."""

    def both(x, by_distances):
        distances, pull_back = jax.vjp(metric, x)
        return distances, pull_back(by_distances)

    return Program(limit, both, (X, DISTANCES))


def of_loss(limit: int, loss: Callable, *arguments: Any, **options: Any) -> Program:
    return Program(limit, jax.value_and_grad(partial(loss, **options)), arguments)


def of(limit: int, function: Callable, *arguments: Any, **options: Any) -> Program:
    return Program(limit, partial(function, **options), arguments)


def of_pairs(name: str, most: int = 32 * MIB, **options: Any) -> dict[str, Program]:
    """Both forms of a loss of pairs; the form without a matrix uses at most `most`."""
    matrix, embeddings = getattr(tj, name), getattr(blockwise, name)
    if name not in TWO_SIDES:
        return {
            name: of_loss(6 * MATRIX, matrix, DISTANCES, Y, **options),
            f"blockwise.{name}": of_loss(most, embeddings, X, Y, **options),
        }

    def by_matrix(distances, y, labels):
        return matrix(distances, y, reference_labels=labels, **options)

    def by_blocks(x, y, references, labels):
        pairs = {"references": references, "reference_labels": labels}
        return embeddings(x, y, **pairs, **options)

    return {
        name: of_loss(6 * MATRIX, by_matrix, DISTANCES, Y, Y),
        f"blockwise.{name}": of_loss(most, by_blocks, X, Y, X, Y),
    }


def pairs_terms(pairs, _):
    total = jnp.where(pairs.has_positive & pairs.has_negative, pairs.negatives, 0)
    return pairs.terms(total, pairs.has_positive)


TWO_SIDES = {"info_nce_loss", "cosface_loss", "arcface_loss", "proxy_anchor_loss"}
PAIR_LOSSES = (
    "supcon_loss",
    "nt_xent_loss",
    "decoupled_contrastive_loss",
    "nca_loss",
    "info_nce_loss",
    "multi_similarity_loss",
    "circle_loss",
    "generalized_lifted_structure_loss",
    "cosface_loss",
    "arcface_loss",
    "proxy_anchor_loss",
    "contrastive_loss",
    "margin_loss",
    "sigmoid_loss",
)
PAIR_PROGRAMS = {}
for loss in PAIR_LOSSES:
    PAIR_PROGRAMS |= of_pairs(loss)
# Panels of large classes have ranks and their gradients beside the distances.
PAIR_PROGRAMS |= of_pairs("smooth_ap_loss", most=40 * MIB)
PAIR_PROGRAMS |= of_pairs(
    "log_sum_exp_loss", logit=lambda d, _: -d, cost=pairs_terms
) | of_pairs(
    "separable_loss",
    positive_cost=lambda d, _: d,
    negative_cost=lambda d, _: jnp.exp(-d),
)


def encoded(params, x):
    """An encoder with activations of 16 MiB for each of its six layers, in chunks."""

    def encoder(params, x):
        for layer in params:
            x = jnp.tanh(jnp.tile(x, 16) @ layer)
        return x

    return tj.encode_in_chunks(encoder, params, x, chunk_size=256).sum()


PAIR_TERMS = tj.PairTerms(TERMS, TERMS, VALUES)
PROGRAMS = PAIR_PROGRAMS | {
    "mean_of_anchors": of(MIB, tj.mean_of_anchors, PAIR_TERMS),
    "mean_active_by_side": of(MIB, tj.mean_active_by_side, PAIR_TERMS),
    "mean_valid_by_side": of(MIB, tj.mean_valid_by_side, PAIR_TERMS),
    "euclidean": of_metric(2 * MATRIX + 8 * MIB, tj.euclidean),
    "squared_euclidean": of_metric(2 * MATRIX + 8 * MIB, tj.squared_euclidean),
    "cosine": of_metric(2 * MATRIX + 8 * MIB, tj.cosine),
    "manhattan": of_metric(MATRIX // 2, tj.manhattan),
    "Metric": of_metric(
        MATRIX // 2, tj.Metric(paired=lambda a, b: jnp.sum((a - b) ** 4))
    ),
    "encode_in_chunks": of_loss(4 * MIB, encoded, [shape(16 * D, D)] * 6, X),
    "normalize": of_loss(4 * MIB, lambda x: tj.normalize(x).sum(), X),
    "pair_masks": of(MIB, tj.pair_masks, Y),
    "ignore_false_negatives": of(
        MATRIX + MIB, tj.ignore_false_negatives, DISTANCES, Y, margin=0.1, share=0.1
    ),
    "batch_hard_triplets": of(MATRIX, tj.batch_hard_triplets, DISTANCES, Y),
    "batch_easy_hard_triplets": of(MATRIX, tj.batch_easy_hard_triplets, DISTANCES, Y),
    "batch_semi_hard_triplets": of(
        8 * MATRIX, tj.batch_semi_hard_triplets, DISTANCES, Y
    ),
    "random_semi_hard_triplets": of(
        14 * MATRIX + MIB, tj.random_semi_hard_triplets, KEY, DISTANCES, Y
    ),
    "all_triplets": of(4 * MATRIX, tj.all_triplets, Y, size=N),
    "all_triplets by distance": Program(
        10 * MATRIX,
        lambda d, y: tj.all_triplets(y, size=N, distances=d, band=tj.hard_band()),
        (DISTANCES, Y),
    ),
    "distance_weighted_triplets": of(
        7 * MATRIX, tj.distance_weighted_triplets, KEY, DISTANCES, Y, dim=D
    ),
    "random_triplets": of(12 * MIB, tj.random_triplets, KEY, Y, per_anchor=16),
    "random_triplets of masks": of(12 * MIB, tj.random_triplets, KEY, MASKS),
    "relevance_triplets": of(
        32 * MIB, tj.relevance_triplets, KEY, DISTANCES, Y, size=N
    ),
    "triplet_margin_loss": of_loss(2 * MIB, tj.triplet_margin_loss, X, X, X),
    "selectively_contrastive": of_loss(
        2 * MIB, tj.triplet_margin_loss, X, X, X, hinge=tj.selectively_contrastive()
    ),
    "triplet_loss": of_loss(2 * MIB, tj.triplet_loss, DISTANCES, TRIPLETS),
    "mean_active": of(MIB, tj.mean_active, TERMS),
    "mean_valid": of(MIB, tj.mean_valid, TERMS),
    "batch_all_loss": of_loss(2 * MATRIX, tj.batch_all_loss, DISTANCES, Y),
    "batch_hard_loss": of_loss(MATRIX, tj.batch_hard_loss, DISTANCES, Y),
    "batch_semi_hard_loss": of_loss(8 * MATRIX, tj.batch_semi_hard_loss, DISTANCES, Y),
    "blockwise.batch_all_loss": of_loss(24 * MIB, blockwise.batch_all_loss, X, Y),
    "blockwise.triplet_loss": of_loss(16 * MIB, blockwise.triplet_loss, X, TRIPLETS),
    "blockwise.batch_hard_loss": of_loss(16 * MIB, blockwise.batch_hard_loss, X, Y),
    "blockwise.batch_semi_hard_loss": of_loss(
        24 * MIB, blockwise.batch_semi_hard_loss, X, Y
    ),
    "blockwise.batch_hard_triplets": of(8 * MIB, blockwise.batch_hard_triplets, X, Y),
    "blockwise.batch_semi_hard_triplets": of(
        32 * MIB, blockwise.batch_semi_hard_triplets, X, Y, size=N
    ),
    "mine_hard_negatives": of(
        128 * MIB, tj.mine_hard_negatives, X, Y, k=5, margin=0.1, relative_margin=0.1
    ),
    "mine_hard_positives": of(96 * MIB, tj.mine_hard_positives, X, Y, k=5),
    "mine_triplets": of(128 * MIB, tj.mine_triplets, X, Y, k=5),
    "retrieval.expand_queries": of(72 * MIB, retrieval.expand_queries, X, X, k=5),
    "retrieval.k_reciprocal_distances": of(
        256 * MIB, retrieval.k_reciprocal_distances, X, k=20
    ),
    "memory.create": of(MIB, memory.create, size=N, dim=D),
    "memory.push": of(MIB, memory.push, MEMORY, X, Y),
    "memory.references": of(MIB, memory.references, MEMORY, X, Y),
    "retrieval.nearest_neighbors": of(72 * MIB, retrieval.nearest_neighbors, X, X, k=5),
    "retrieval.evaluate": of(128 * MIB, retrieval.evaluate, X, Y),
    "retrieval.recall_at_k": of(32 * MIB, retrieval.recall_at_k, X, Y),
    "retrieval.mean_of_queries": of(2 * MIB, retrieval.mean_of_queries, PER_QUERY, Y),
    "retrieval.mean_of_classes": of(2 * MIB, retrieval.mean_of_classes, PER_QUERY, Y),
    "retrieval.few_shot_accuracy": of(
        72 * MIB, retrieval.few_shot_accuracy, X, Y, X, Y
    ),
    "retrieval.few_shot_accuracy of class means": of(
        72 * MIB, retrieval.few_shot_accuracy, X, Y, X, Y, class_means=True
    ),
    "retrieval.nearest_classes": of(72 * MIB, retrieval.nearest_classes, X, X, Y, k=5),
    "retrieval.evaluate_identification": Program(
        72 * MIB,
        lambda x, y, references, labels: retrieval.evaluate_identification(
            x, y, references=references, reference_labels=labels
        ),
        (X, Y, X, Y),
    ),
    "retrieval.similarity_precision": of(
        4 * MIB, retrieval.similarity_precision, X, LISTED
    ),
    "retrieval.score_at_top_k": of(4 * MIB, retrieval.score_at_top_k, X, LISTED),
    "verification.evaluate": of(16 * MIB, verification.evaluate, X, Y, size=N),
    "verification.evaluate_pairs": of(
        2 * MIB, verification.evaluate_pairs, VALUES, FLAGS
    ),
    "verification.tar_at_far": of(2 * MIB, verification.tar_at_far, VALUES, FLAGS),
    "verification.equal_error_rate": of(
        2 * MIB, verification.equal_error_rate, VALUES, FLAGS
    ),
    "verification.roc": of(2 * MIB, verification.roc, VALUES, FLAGS),
    "verification.k_fold_accuracy": of(
        2 * MIB, verification.k_fold_accuracy, VALUES, FLAGS
    ),
    "verification.bootstrap": of(
        4 * MIB, verification.bootstrap, KEY, VALUES, Y, VALUES, PEOPLE, size=N
    ),
    "collapse.report": of(8 * MIB, collapse.report, X),
}
# These only make a few numbers or another function.
NO_ARRAYS = {
    "hard_band",
    "semi_hard_band",
    "easy_band",
    "violating_band",
    "matryoshka_loss",
}
# These take more than two seconds to compile.
SLOW = {
    *(name for name in PAIR_PROGRAMS if name.startswith("blockwise.")),
    "blockwise.batch_all_loss",
    "blockwise.batch_hard_loss",
    "blockwise.batch_semi_hard_loss",
    "retrieval.evaluate",
    "verification.evaluate",
}


@pytest.mark.parametrize("name", unless_slow(PROGRAMS, PROGRAMS.keys() - SLOW))
def test_temporary_memory(name):
    limit, function, arguments = PROGRAMS[name]
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= limit


def large_batches() -> dict[str, Program]:
    """A loss of each shape, two sides and class vectors, for 65,536 embeddings.

    Cosine distances need 32 MiB for the unit vectors.
    """
    n, d, scalar = 65_536, 128, shape()
    x, y = shape(n, d), shape(n, dtype=jnp.int32)
    vectors, classes = shape(4096, d), shape(4096, dtype=jnp.int32)

    def supcon(x, temperature, y):
        return blockwise.supcon_loss(x, y, temperature=temperature)

    def sigmoid(x, scale, y):
        return blockwise.sigmoid_loss(x, y, scale=scale)

    def arcface(x, scale, y, vectors, classes):
        sides = {"references": vectors, "reference_labels": classes}
        return blockwise.arcface_loss(x, y, scale=scale, **sides)

    def both_sides(x, temperature, y, other):
        sides = {"references": other, "reference_labels": y, "symmetric": True}
        return blockwise.info_nce_loss(x, y, temperature=temperature, **sides)

    def program(limit, loss, *more, by=(0, 1)):
        return Program(limit, jax.value_and_grad(loss, by), (x, scalar, y, *more))

    return {
        "log-sum-exp": program(64 * MIB, supcon),
        "separable": program(64 * MIB, sigmoid),
        "class vectors": program(64 * MIB, arcface, vectors, classes, by=(0, 1, 3)),
        # Twice as many embeddings.
        "both sides": program(128 * MIB, both_sides, x, by=(0, 1, 3)),
    }


@pytest.mark.parametrize("name", unless_slow(large_batches(), [], slow=["log-sum-exp"]))
def test_temporary_memory_of_large_batches(name):
    limit, function, arguments = large_batches()[name]
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= limit


def test_no_public_function_is_left_out():
    compiled = {name.split()[0] for name in PROGRAMS}
    assert public_functions().keys() == compiled | NO_ARRAYS


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, function in public_functions().items()
        # `Metric` says it for all metrics.
        if name not in NO_ARRAYS and not isinstance(function, tj.Metric)
    ],
)
def test_the_docstring_gives_the_memory(name):
    text = inspect.getdoc(public_functions()[name])
    paragraphs = text.split("\n\n")
    (place,) = [i for i, part in enumerate(paragraphs) if part.startswith("Memory: ")]
    # In front of the arguments, where there are any.
    following = [part.split()[0] for part in paragraphs[place + 1 :]]
    assert following[:1] == ["Args:"] or "Args:" not in text
