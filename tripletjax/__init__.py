"""Exact triplet losses and in-batch triplet mining for JAX.

Compute distances, then a loss. Every function is pure and jitted, and composes with
JAX's transformations:

>>> import jax
>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> embeddings = jax.random.normal(jax.random.key(0), (8, 16))
>>> labels = jnp.array([0, 0, 1, 1, 2, 2, 3, 3])
>>> def loss(embeddings):
...     return tj.batch_all_loss(tj.euclidean(embeddings), labels, margin=0.2)
>>> value, gradient = jax.value_and_grad(loss)(embeddings)
>>> print(gradient.shape)
(8, 16)

- `tripletjax.distances`: metrics, as matrices and pair by pair.
- `tripletjax.pairs`: masks of positives and negatives from labels.
- `tripletjax.mining`: triplet miners, from a distance matrix to indices.
- `tripletjax.losses`: triplet losses and their reductions.
- `tripletjax.blockwise`: losses and miners straight from embeddings, without a matrix.
- `tripletjax.hard_examples`: hard examples of a whole data set, without a matrix.
- `tripletjax.memory`: references from earlier batches.
- `tripletjax.retrieval`: neighbours and ranking metrics.
- `tripletjax.verification`: verification metrics: ROC, TAR@FAR, equal error rate.
- `tripletjax.collapse`: spread and effective rank, which detect collapse.
- `tripletjax.learn`: training an embedding (needs the extra ``tripletjax[train]``).
"""

import importlib.metadata

from tripletjax import (
    blockwise,
    collapse,
    distances,
    hard_examples,
    losses,
    memory,
    mining,
    pairs,
    retrieval,
    verification,
)
from tripletjax.distances import (
    Metric,
    cosine,
    euclidean,
    manhattan,
    normalize,
    squared_euclidean,
)
from tripletjax.hard_examples import (
    Exclusions,
    HardExamples,
    HardTriplets,
    mine_hard_negatives,
    mine_hard_positives,
    mine_triplets,
)
from tripletjax.losses import (
    SumReduction,
    TripletCost,
    TripletTerms,
    batch_all_loss,
    batch_hard_loss,
    batch_semi_hard_loss,
    mean_active,
    mean_valid,
    selectively_contrastive,
    triplet_loss,
    triplet_margin_loss,
)
from tripletjax.mining import (
    Band,
    CountedTriplets,
    Triplets,
    all_triplets,
    batch_easy_hard_triplets,
    batch_hard_triplets,
    batch_semi_hard_triplets,
    distance_weighted_triplets,
    easy_band,
    hard_band,
    random_semi_hard_triplets,
    random_triplets,
    semi_hard_band,
    violating_band,
)
from tripletjax.pairs import PairMasks, pair_masks
from tripletjax.relevance import relevance_triplets

__version__ = importlib.metadata.version("tripletjax")

__all__ = [
    "Band",
    "CountedTriplets",
    "Exclusions",
    "HardExamples",
    "HardTriplets",
    "Metric",
    "PairMasks",
    "SumReduction",
    "TripletCost",
    "TripletTerms",
    "Triplets",
    "all_triplets",
    "batch_all_loss",
    "batch_easy_hard_triplets",
    "batch_hard_loss",
    "batch_hard_triplets",
    "batch_semi_hard_loss",
    "batch_semi_hard_triplets",
    "blockwise",
    "collapse",
    "cosine",
    "distance_weighted_triplets",
    "distances",
    "easy_band",
    "euclidean",
    "hard_band",
    "hard_examples",
    "losses",
    "manhattan",
    "mean_active",
    "mean_valid",
    "memory",
    "mine_hard_negatives",
    "mine_hard_positives",
    "mine_triplets",
    "mining",
    "normalize",
    "pair_masks",
    "pairs",
    "random_semi_hard_triplets",
    "random_triplets",
    "relevance_triplets",
    "retrieval",
    "selectively_contrastive",
    "semi_hard_band",
    "squared_euclidean",
    "triplet_loss",
    "triplet_margin_loss",
    "verification",
    "violating_band",
]
