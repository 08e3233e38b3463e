"""The network of a run, built from its record and filled."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tripletjax.learn.distributed.placement import ONE_DEVICE, Placement
from tripletjax.learn.files import digest_of_file
from tripletjax.learn.networks import backbones, heads
from tripletjax.learn.networks.embedding_networks import MODELS, Standardized
from tripletjax.learn.networks.weights import Loaded
from tripletjax.learn.networks.weights_files import read_arrays
from tripletjax.learn.runs.plan import BackbonePlan
from tripletjax.learn.runs.record import FILE, RunRecord
from tripletjax.learn.training.checkpoints import Checkpoints


def load_model(
    run_dir: str | Path, on: Placement = ONE_DEVICE
) -> tuple[Standardized, RunRecord]:
    """Load the kept model of a run, on one device, and the record of the run.

    Args:
        run_dir: a run directory.
        on: placement of the processes that load the model together.

    Raises:
        FileNotFoundError: if there is no trained model.
        ValueError: if the record is of another version.
    """
    run_dir = Path(run_dir).resolve()
    for part in (FILE, "best"):
        if not (run_dir / part).exists():
            raise FileNotFoundError(f"no trained model in {run_dir}: no {part}.")
    record = RunRecord.read(run_dir)
    # Shapes are enough: the checkpoint has the parameters.
    model = nnx.eval_shape(lambda: build_model(record))
    part = heads.trained_part(model, record.plan.backbone_training)
    if record.plan.frozen:
        fill_backbone(model, record, run_dir)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on.sharding),
        nnx.state(part),
    )
    best = Checkpoints(run_dir / "best", writable=False)
    restored = best.restore(like)
    best.close()
    if restored is None:
        raise FileNotFoundError(f"no trained model in {run_dir}: best is empty.")
    nnx.update(part, on.here(restored[1]))
    model.eval()
    return model, record


def fill_backbone(model: Standardized, record: RunRecord, run_dir: Path) -> Loaded:
    """Load the weights that a run began with, from its own copy.

    Raises:
        ValueError: if the copy is damaged.
    """
    plan, file = record.plan.backbone, run_dir / BACKBONE
    if plan is None or plan.digest is None:
        raise ValueError(f"the run in {run_dir} began with no backbone.")
    if digest_of_file(file) != plan.digest:
        raise ValueError(f"{file} is damaged: it is not what the run began with.")
    backbone = backbones.Backbone(plan.family, plan.options)
    arrays = read_arrays(file)
    return backbone.fill(heads.backbone_of(model), arrays, title=str(file))


# The run's copy of the weights that it began with.
BACKBONE = "backbone.safetensors"
# Fields of a plan that determine the embedding.
NETWORK = (
    *("box", "size", "model", "head", "channels", "stride", "dim", "mirror"),
    *("bfloat16", "backbone"),
)


def build_model(record: RunRecord) -> Standardized:
    """Build the untrained model of a run."""
    plan, shape = record.plan, record.images.shape
    if plan.backbone is not None:
        return _on_backbone(record, plan.backbone)
    view = plan.view_of(shape)
    height, width = shape[:2] if view is None else (view.height, view.width)
    options: dict[str, dict[str, Any]] = {
        "resnet": {"stride": plan.stride},
        "photo": {"size": (height, width), "head": plan.head},
    }
    model = MODELS[plan.model](
        plan.dim,
        channels=plan.channels,
        in_channels=shape[-1],
        dtype=jnp.bfloat16 if plan.bfloat16 else None,
        rngs=nnx.Rngs(plan.seed),
        **options.get(plan.model, {}),
    )
    return Standardized(
        model, record.images.mean, record.images.std, mirror=plan.mirror
    )


def _on_backbone(record: RunRecord, plan: BackbonePlan) -> Standardized:
    rngs = nnx.Rngs(record.plan.seed)
    options = {"learn_statistics": True} if plan.digest is None else {}
    dtype = jnp.bfloat16 if record.plan.bfloat16 else None
    family = backbones.Backbone(plan.family, plan.options)
    backbone: Any = family.build(dtype=dtype, rngs=rngs, **options)
    mirror = record.plan.mirror
    head = heads.Head(
        backbone.features, record.plan.dim, hidden=plan.hidden, mirror=mirror, rngs=rngs
    )
    if plan.training != "all":
        heads.freeze(backbone, plan.training)
    model = heads.BackboneEmbedder(backbone, head)
    return Standardized(model, record.images.mean, record.images.std, mirror=mirror)
