"""Losses of labelled batches that runs can have, in one table.

The command lists them in its help, which works without the extra ``train``: this module
imports the core alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

import tripletjax as tj

# Default margin of training, in Euclidean distance between unit vectors.
# `benchmarks/margins.py` compares margins.
MARGIN = 0.2
# Metrics of a batch: the share of triplets or pairs with a cost above 0, and the share
# of anchors whose nearest reference is a positive.
ACTIVE, RECALL = "active", "recall_at_1"


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """A loss of labelled batches that runs can have.

    Attributes:
        function: of `tripletjax.blockwise`.
        mean: the reduction of its terms.
        numbers: options of a run that the loss has, with their defaults.
        metric: of distances; None for the default of the function.
        learned: parameters that a run can learn, with their initial values.
        class_vectors: whether references are learned vectors, one for each class.
        mines_triplets: whether it is a loss of mined triplets.
        share: the name of the ratio of active to valid terms.
    """

    function: Callable[..., Any]
    mean: tj.SumReduction
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metric: tj.Metric | None = None
    learned: Mapping[str, float] = dataclasses.field(default_factory=dict)
    class_vectors: bool = False
    mines_triplets: bool = False
    share: str = RECALL


def _contrastive_loss(x: Array, labels: Array, *, margin: float, **options: Any) -> Any:
    return tj.blockwise.contrastive_loss(x, labels, negative_margin=margin, **options)


_MARGIN, _TEMPERATURE = {"margin": MARGIN}, {"temperature": 0.1}
_triplets = functools.partial(
    BatchLoss, numbers=_MARGIN, mines_triplets=True, share=ACTIVE
)
_softmax = functools.partial(
    BatchLoss, mean=tj.mean_valid, numbers=_TEMPERATURE, learned=_TEMPERATURE
)
_euclidean = functools.partial(BatchLoss, metric=tj.euclidean, share=ACTIVE)
_classes = functools.partial(BatchLoss, class_vectors=True)

LOSSES: dict[str, BatchLoss] = {
    "semi-hard": _triplets(tj.blockwise.batch_semi_hard_loss, tj.mean_valid),
    "hard": _triplets(tj.blockwise.batch_hard_loss, tj.mean_valid),
    "all": _triplets(tj.blockwise.batch_all_loss, tj.mean_active),
    "supcon": _softmax(tj.blockwise.supcon_loss),
    "nt-xent": _softmax(tj.blockwise.nt_xent_loss),
    "decoupled-contrastive": _softmax(tj.blockwise.decoupled_contrastive_loss),
    "nca": _softmax(tj.blockwise.nca_loss),
    "smooth-ap": BatchLoss(
        tj.blockwise.smooth_ap_loss, tj.mean_valid, {"temperature": 0.01}
    ),
    "multi-similarity": BatchLoss(
        tj.blockwise.multi_similarity_loss, tj.mean_valid_by_side
    ),
    "circle": BatchLoss(
        tj.blockwise.circle_loss, tj.mean_valid, {"margin": 0.4, "scale": 80.0}
    ),
    "lifted-structure": BatchLoss(
        tj.blockwise.generalized_lifted_structure_loss,
        tj.mean_valid,
        {"margin": 1.0},
        metric=tj.euclidean,
    ),
    "contrastive": _euclidean(
        _contrastive_loss, tj.mean_active_by_side, {"margin": 1.0}
    ),
    "margin": _euclidean(
        tj.blockwise.margin_loss, tj.mean_active, {"margin": 0.2}, learned={"beta": 1.2}
    ),
    "sigmoid": BatchLoss(
        tj.blockwise.sigmoid_loss,
        tj.mean_of_anchors,
        {"scale": 10.0},
        learned={"scale": 10.0, "bias": -10.0},
        share=ACTIVE,
    ),
    "cosface": _classes(
        tj.blockwise.cosface_loss, tj.mean_valid, {"margin": 0.35, "scale": 64.0}
    ),
    "arcface": _classes(
        tj.blockwise.arcface_loss, tj.mean_valid, {"margin": 0.5, "scale": 64.0}
    ),
    "proxy-anchor": _classes(
        tj.blockwise.proxy_anchor_loss,
        tj.mean_valid_by_side,
        {"margin": 0.1, "scale": 32.0},
    ),
}


def find_loss(name: str) -> BatchLoss:
    """The loss of a name.

    Raises:
        ValueError: if there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}.")
    return LOSSES[name]
