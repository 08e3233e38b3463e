"""Training of a model on a task, with the options of a plan."""

import functools
from collections.abc import Iterator
from typing import Any

import optax
from flax import nnx

from tripletjax.learn.distributed.placement import ONE_DEVICE, Placement
from tripletjax.learn.runs import tasks
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan
from tripletjax.learn.training import loop, optimizer
from tripletjax.learn.training.feature_cache import AnyView


def fit(
    model: nnx.Module,
    task: tasks.Task,
    batches: loop.Batches,
    plan: Plan,
    on: Placement = ONE_DEVICE,
    *,
    steps: int | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Train a model in place, as `learn.fit` with the options of a plan.

    Its first `steps` alone, if given, with the schedule of all of them.
    """
    return loop.fit(
        model,
        _optimizer(
            plan.learning_rate,
            plan.weight_decay,
            plan.steps,
            slow_backbone=plan.pretrained and not plan.frozen,
        ),
        batches,
        steps=plan.steps if steps is None else steps,
        loss=task.loss(plan, on),
        mesh=on.mesh,
        augment=AnyView() if plan.frozen else plan.augment,
        seed=plan.seed,
        ema_decay=plan.ema_decay,
        **_memory_options(plan),
        embed_chunk_size=plan.embed_chunk_size,
        log_every=plan.log_every,
        **options,
    )


@functools.lru_cache
def _optimizer(
    learning_rate: float, weight_decay: float, steps: int, *, slow_backbone: bool
) -> optax.GradientTransformation:
    """AdamW of a schedule; of equal arguments one object, whose step compiles once."""
    schedule = optimizer.learning_rates(learning_rate, steps)
    if slow_backbone:
        return optimizer.slow_backbone(schedule, weight_decay)
    return optax.adamw(schedule, weight_decay=weight_decay)


def _memory_options(plan: Plan) -> dict[str, Any]:
    """Options of `learn.fit` for a memory, if the plan has one."""
    batches = plan.batches
    if not isinstance(batches, ClassBatchPlan) or not batches.memory:
        return {}
    return {
        "memory": batches.memory,
        "memory_warmup_steps": int(batches.memory_warmup * plan.steps),
        "memory_momentum": batches.memory_momentum,
    }
