"""The optimizer of a run."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

# Learning rate of pretrained parameters, as a share of the head's.
RATE = 0.1


def slow_backbone(
    learning_rate: Callable[[Any], Any], weight_decay: float
) -> optax.GradientTransformation:
    """AdamW, with a tenth of the learning rate for the backbone."""

    def parts(params: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "backbone" if "backbone" in str(path[:2]) else "head",
            params,
        )

    def slow(step: Any) -> Any:
        return RATE * learning_rate(step)

    return optax.multi_transform(
        {
            "head": optax.adamw(learning_rate, weight_decay=weight_decay),
            "backbone": optax.adamw(slow, weight_decay=weight_decay),
        },
        parts,
    )
