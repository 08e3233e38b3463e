"""The plan of a run, for tests of its parts."""

from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.image_shape import WHOLE
from tripletjax.learn.runs.plan import ClassBatchPlan, Plan


def class_batches(**changes):
    values = {
        "loss": "all",
        "temperature": None,
        "scale": None,
        "learn_loss": False,
        "batch_all_fraction": 0.5,
        "classes": 4,
        "per_class": 2,
        "class_sampling": "uniform",
        "relevance": "classes",
        "rotation_classes": 1,
    }
    return ClassBatchPlan(**values | changes)


def make_plan(**changes):
    values = {
        "batches": class_batches(),
        "box": WHOLE,
        "size": 16,
        "model": "cnn",
        "backbone": None,
        "head": "mean",
        "channels": (8, 16),
        "stride": 1,
        "dim": 8,
        "mirror": False,
        "bfloat16": False,
        "augment": Augment(),
        "margin": 0.2,
        "steps": 60,
        "seed": 0,
        "learning_rate": 0.05,
        "weight_decay": 0.0,
        "ema_decay": 0.9,
        "embed_chunk_size": 64,
        "log_every": 100,
        "validate_every": 100,
        "checkpoint_every": 100,
    }
    return Plan(**values | changes)
