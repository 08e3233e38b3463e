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
- `tripletjax.pair_losses`: losses of two other shapes, log-sum-exp and separable.
  `tripletjax.softmax_losses` and `tripletjax.separable_losses` name them.
- `tripletjax.smooth_ap`: average precision with smooth ranks.
- `tripletjax.blockwise`: losses and miners straight from embeddings, without a matrix.
- `tripletjax.gradient_caching`: large batches through an encoder, in chunks.
- `tripletjax.hard_examples`: hard examples of a whole data set, without a matrix.
- `tripletjax.matryoshka`: a loss at several prefixes of the vectors.
- `tripletjax.memory`: references from earlier batches.
- `tripletjax.retrieval`: neighbours and ranking metrics.
- `tripletjax.verification`: verification metrics: ROC, TAR@FAR, equal error rate.
- `tripletjax.collapse`: spread and effective rank, which detect collapse.
- `tripletjax.learn`: training an embedding (needs the extra ``train``).
"""

import importlib.metadata

from tripletjax import (
    blockwise,
    collapse,
    distances,
    gradient_caching,
    hard_examples,
    losses,
    matryoshka,
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
from tripletjax.gradient_caching import encode_in_chunks
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
from tripletjax.matryoshka import matryoshka_loss
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
from tripletjax.pair_losses import (
    AnchorPairs,
    PairTerms,
    log_sum_exp_loss,
    mean_active_by_side,
    mean_of_anchors,
    mean_valid_by_side,
    separable_loss,
)
from tripletjax.pairs import PairMasks, ignore_false_negatives, pair_masks
from tripletjax.relevance import relevance_triplets
from tripletjax.separable_losses import contrastive_loss, margin_loss, sigmoid_loss
from tripletjax.smooth_ap import smooth_ap_loss
from tripletjax.softmax_losses import (
    arcface_loss,
    circle_loss,
    cosface_loss,
    decoupled_contrastive_loss,
    generalized_lifted_structure_loss,
    info_nce_loss,
    multi_similarity_loss,
    nca_loss,
    nt_xent_loss,
    proxy_anchor_loss,
    supcon_loss,
)

__version__ = importlib.metadata.version("tripletjax")

__all__ = [
    "AnchorPairs",
    "Band",
    "CountedTriplets",
    "Exclusions",
    "HardExamples",
    "HardTriplets",
    "Metric",
    "PairMasks",
    "PairTerms",
    "SumReduction",
    "TripletCost",
    "TripletTerms",
    "Triplets",
    "all_triplets",
    "arcface_loss",
    "batch_all_loss",
    "batch_easy_hard_triplets",
    "batch_hard_loss",
    "batch_hard_triplets",
    "batch_semi_hard_loss",
    "batch_semi_hard_triplets",
    "blockwise",
    "circle_loss",
    "collapse",
    "contrastive_loss",
    "cosface_loss",
    "cosine",
    "decoupled_contrastive_loss",
    "distance_weighted_triplets",
    "distances",
    "easy_band",
    "encode_in_chunks",
    "euclidean",
    "generalized_lifted_structure_loss",
    "gradient_caching",
    "hard_band",
    "hard_examples",
    "ignore_false_negatives",
    "info_nce_loss",
    "log_sum_exp_loss",
    "losses",
    "manhattan",
    "margin_loss",
    "matryoshka",
    "matryoshka_loss",
    "mean_active",
    "mean_active_by_side",
    "mean_of_anchors",
    "mean_valid",
    "mean_valid_by_side",
    "memory",
    "mine_hard_negatives",
    "mine_hard_positives",
    "mine_triplets",
    "mining",
    "multi_similarity_loss",
    "nca_loss",
    "normalize",
    "nt_xent_loss",
    "pair_masks",
    "pairs",
    "proxy_anchor_loss",
    "random_semi_hard_triplets",
    "random_triplets",
    "relevance_triplets",
    "retrieval",
    "selectively_contrastive",
    "semi_hard_band",
    "separable_loss",
    "sigmoid_loss",
    "smooth_ap_loss",
    "squared_euclidean",
    "supcon_loss",
    "triplet_loss",
    "triplet_margin_loss",
    "verification",
    "violating_band",
]
