"""Optimizers of a run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from tripletjax.learn.training.steps import Params

# Learning rate of pretrained parameters, as a share of the head's.
RATE = 0.1


@functools.lru_cache
def learning_rates(peak: float, steps: int) -> Callable[[Any], Any]:
    """A linear warm-up to the peak, and a cosine decay to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=min(50, steps // 10),
        decay_steps=steps,
    )


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


@functools.lru_cache
def of_params(
    model: optax.GradientTransformation, loss: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    """The optimizer of `Params`, from those of the model and of the loss."""

    def init(params: Any) -> Any:
        state = model.init(params.model)
        return Params(state, None if loss is None else loss.init(params.loss))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_model, state_of_model = model.update(
            updates.model, state.model, params.model
        )
        if loss is None:
            return Params(of_model), Params(state_of_model)
        of_loss, state_of_loss = loss.update(updates.loss, state.loss, params.loss)
        return Params(of_model, of_loss), Params(state_of_model, state_of_loss)

    return optax.GradientTransformation(init, update)
