"""A whole training run: from a request to a run directory.

A run directory holds

- ``config.json``: the request, and every choice that was made (`RunRecord`);
- ``backbone.safetensors``: a copy of the weights that the run began with, if any;
- ``rounds.json``: groups of classes of each round, if requested (`rounds`);
- ``metrics.jsonl``: records of metrics, validations and evaluations;
- ``checkpoints/``: the last two states, to go on from;
- ``best/``: the model that the rule of `selection` keeps, at each of the last two
  validations;
- ``checkpoints.digests.json``, ``best.digests.json``: digests of their files;
- ``summary.json``: the evaluations, the number of steps, the step of the kept model,
  the numbers of parameters and images, and of skipped files, of a finished run;
- ``training.png``: loss and share of active triplets over the steps;
- ``neighbors.png``: held-out images and their nearest neighbours; or
- ``triplets.png``: held-out triplets, in the order of distance;
- ``tensorboard/``: the metrics for TensorBoard, if requested.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from tripletjax.learn import plots
from tripletjax.learn.data.image_array import ImageArray, StoredImages
from tripletjax.learn.distributed.placement import Placement
from tripletjax.learn.files import write_json
from tripletjax.learn.networks import heads
from tripletjax.learn.networks.embedding import as_floats, embed_images
from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.networks.weights import Frozen
from tripletjax.learn.runs import (
    comparisons,
    fitting,
    preparation,
    record,
    rounds,
    tasks,
)
from tripletjax.learn.runs.config import Config
from tripletjax.learn.runs.model import build_model, fill_backbone, load_model
from tripletjax.learn.runs.plan import Plan
from tripletjax.learn.runs.record import RunRecord
from tripletjax.learn.training import loop
from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.feature_cache import FeatureCache, views_of
from tripletjax.learn.training.interrupts import Interrupts
from tripletjax.learn.training.metrics_log import MetricsLog, summary_writer
from tripletjax.learn.training.selection import candidate_of

# Images whose features give a head its statistics where the backbone is trained, and
# the least number of each class.
HEAD_SAMPLE, EACH = 2048, 16
# Name of the comparison with raw pixels, and the most bytes of images that have it.
RAW_PIXELS, MOST_RAW = "raw pixels", 2**28
# Name of the evaluation of a head before training.
CLOSED_FORM = "closed form"


class _Log(MetricsLog):
    """The records of a run, as it begins, goes on and ends."""

    def __init__(self, out: Path, tensorboard: bool):
        super().__init__(out / "metrics.jsonl")
        if tensorboard:
            self.show_in(out / "tensorboard")

    def evaluations(self) -> dict[str, Any]:
        """Evaluations from before training, by name."""
        return {
            line["evaluation"]: line["metrics"]
            for line in self.lines
            if line.get("evaluation", "trained") != "trained" and line["step"] == 0
        }

    @property
    def kept_steps(self) -> list[int]:
        """The step of the kept model, after each validation."""
        return [line["kept_step"] for line in self.lines if "kept_step" in line]

    def comparison(self, steps: int) -> dict[str, Any] | None:
        """The comparison of a head trained in these steps with its closed form."""
        lines = [line["comparison"] for line in self.lines if "comparison" in line]
        return next((line for line in lines if line["steps"] == steps), None)

    def add_evaluation(self, step: int, name: str, metrics: dict[str, float]) -> None:
        """Add the record of an evaluation."""
        self.add({"step": step, "evaluation": name, "metrics": metrics})

    def begin_again(self, plan: Plan, *, progress: bool) -> None:
        """Remove records from before the first checkpoint."""
        reached = max((line["step"] for line in self.lines), default=0)
        if reached > plan.checkpoint_every:
            raise ValueError(
                f"the run in {self.path.parent} reached step {reached}, but has no "
                "checkpoint to go on from. Restore its checkpoint (damaged ones lie "
                "beside checkpoints/), or begin in another directory."
            )
        if reached and progress:
            print(f"- no checkpoint yet at step {reached}: it begins again", flush=True)
        self.truncate_after(0)

    def add_record(self, line: dict[str, Any]) -> None:
        """Add a record of `learn.fit`."""
        if "resumed" not in line:
            self.add(line)
            return
        self.truncate_after(line["step"])
        for damage in line["damaged"]:
            print(f"{damage}; going on from step {line['step']}.", flush=True)


def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train an embedding and write its run directory.

    Args:
        config: the request.
        out: the run directory; it must be empty or not exist, unless `resume`.
        resume: whether to go on with the run in `out`, if there is one. A run with
            more steps than before is lengthened.
        tensorboard: whether to write records for TensorBoard; needs tensorboardX.
        mesh: devices to train on, as in `learn.fit`; a run goes on with any. Several
            processes (`processes.joined`) all call this function, read the data, and
            share the run directory. The first one writes there; of checkpoints each
            process writes a part.
        progress: whether to show progress bars.

    Returns:
        The evaluations by name, ``{"raw pixels": ..., "untrained": ..., "trained":
        ...}``, each as from `evaluate` of the task. Raw pixels are left out if the
        images exceed 256 MiB, or do not fit in memory.

    Raises:
        RunExistsError: if `out` is not an empty directory, without `resume`.
        ValueError: if the dataset does not exist or has too few classes, or if the
            run in `out` has another configuration.
        FloatingPointError: if the loss becomes infinite or NaN.
        KeyboardInterrupt: on an interrupt; `resume` then goes on.
        OSError: if a file cannot be written.
        ImportError: if `tensorboard` is requested and tensorboardX is not installed.
    """
    if tensorboard:
        summary_writer()
    on = Placement(mesh)
    progress = progress and on.first
    out = on.of_first(lambda path=out: Path(path).resolve())
    config = preparation.normalize(config)
    old, finished = on.of_first(lambda: preparation.find_run(out, config, resume))
    moved = on.of_first(lambda: old is not None and preparation.is_moved(old, config))
    if finished is not None and not moved:
        return finished
    start = preparation.start_of(config, old)
    current, task = preparation.make_plan(config, old, start, out, on, progress)
    # Options of batches that contradict each other fail before a file is written.
    batches = task.batches(current.plan, on)
    on.of_first(lambda: preparation.write(current, old, start, out))
    if finished is not None:
        return finished
    if not (out / record.FILE).exists():
        raise FileNotFoundError(
            f"{out} is not the run directory of the first process: all processes must "
            "have it, on a file system that they share."
        )
    if progress:
        _announce(current, task, on, out)
    one = _Run(
        current, task, batches, on, out, tensorboard=tensorboard, progress=progress
    )
    one.begin()
    one.train()
    return one.finish()


class _Run:
    """A run whose directory and plan exist.

    Attributes:
        task: the data, or their features if the backbone is frozen.
        batches: of the task.
        model: the whole model.
        embeddings: from images to vectors before training, by name.
        before: evaluations of these, in the first process.
        log: the records, in the first process; None in the others.
    """

    before: dict[str, Any] | None = None

    def __init__(
        self,
        current: RunRecord,
        task: tasks.Task,
        batches: loop.Batches,
        on: Placement,
        out: Path,
        *,
        tensorboard: bool,
        progress: bool,
    ):
        self.plan, self.on, self.out = current.plan, on, out
        self.progress = progress
        self.model = build_model(current)
        if self.plan.pretrained:
            fill_backbone(self.model, current, out)
        self.task, self.batches = task, batches
        if self.plan.frozen:
            self.task = on.in_turn(
                lambda: _on_features(task, self.model, self.plan, progress=progress)
            )
            self.batches = self.task.batches(self.plan, on)
        self.embeddings = _embeddings_before(self.task, self.model, self.plan)
        if self.plan.closed_form:
            # The head is fitted when a run has no evaluation of it yet.
            self.embeddings[CLOSED_FORM] = lambda images: embed_images(
                self.fitted_head, images
            )
        self.log: Any = _Log(out, tensorboard) if on.first else None
        self.checkpoints = Checkpoints(out / "checkpoints")
        self.kept_model = Checkpoints(out / "best")

    def begin(self) -> None:
        """Evaluate what there is before training, and make ready for the first step."""
        begins = not self.checkpoints.steps
        self.before = self.on.of_first(self._evaluate_before)
        self.on.of_first(lambda: begins and self._prepare_first_step())

    def _evaluate_before(self) -> dict[str, Any]:
        evaluations = self.log.evaluations()
        for name, embed in self.embeddings.items():
            if name not in evaluations:
                evaluations[name] = self.task.evaluate(embed)
                self.log.add_evaluation(0, name, evaluations[name])
        return evaluations

    def _prepare_first_step(self) -> None:
        if self.plan.pretrained:
            whole: Any = self.model.model
            nnx.update(whole.head, nnx.state(self.fitted_head))
        self.log.begin_again(self.plan, progress=self.progress)
        if rounds.rounds_of(self.plan):
            rounds.begin_rounds(self.out)

    def train(self) -> None:
        """Train the model to the last step, or keep the closed form of its head."""
        if self.on.of_first(self._keeps_closed_form):
            self._keep_closed_form()
            return
        plan = self.plan
        with Interrupts() as interrupts:
            for step in rounds.first_steps(plan.steps, rounds.rounds_of(plan)):
                # Groups of the rounds before a later checkpoint are in the file.
                if max(self.checkpoints.steps, default=0) <= step:
                    self._train_to(step, interrupts)
                    self.on.of_first(functools.partial(self._mine_round, step))
            self._train_to(plan.steps, interrupts)

    def _train_to(self, step: int, interrupts: Interrupts) -> None:
        """Train the model to a step, and save its state there."""
        plan, task = self.plan, self.task
        for line in fitting.fit(
            self.trained_part,
            task,
            self._batches_of_rounds(),
            plan,
            self.on,
            steps=step,
            validate=task.validate,
            validate_every=plan.validate_every,
            validation_classes=task.validation_classes,
            checkpoints=self.checkpoints,
            checkpoint_every=plan.checkpoint_every,
            kept_model=self.kept_model,
            interrupts=interrupts,
            progress=self.progress,
        ):
            if self.log is not None:
                self.log.add_record(line)

    def _batches_of_rounds(self) -> loop.Batches:
        """Batches with the groups of the rounds so far."""
        task, plan = self.task, self.plan
        if not isinstance(task, tasks.LabelTask) or not rounds.rounds_of(plan):
            return self.batches
        mined = self.on.of_first(lambda: rounds.read_rounds(self.out))
        return task.batches(plan, self.on, mined)

    def _mine_round(self, step: int) -> None:
        """Mine the training images for the batches from a step on."""
        assert isinstance(self.task, tasks.LabelTask)
        embed = functools.partial(embed_images, self.trained_part)
        new = self.task.mine_round(self.plan, embed, step)
        rounds.write_round(self.out, new)
        if self.progress:
            print(
                f"- step {step}: {len({*new.groups}):,} groups of classes; "
                f"{100 * new.nearer:.1f} % of the training images have a negative "
                "nearer than the nearest positive",
                flush=True,
            )

    def _keeps_closed_form(self) -> bool:
        """Whether the closed form is requested, or training shows no gain over it.

        A training that has begun goes on.
        """
        if not self.plan.closed_form or self.checkpoints.steps:
            return False
        if not self.plan.steps:
            return True
        comparison = self.log.comparison(self.plan.steps)
        if comparison is None:
            comparison = comparisons.compare(
                self.task, self.plan, self.trained_part, progress=self.progress
            )
            self.log.add({"step": 0, "comparison": comparison})
        if self.progress:
            note = comparisons.note_of(comparison, self.task.unit)
            print(f"- {note}", flush=True)
        return not comparison["trained_is_kept"]

    def _keep_closed_form(self) -> None:
        head = self.trained_part
        self.kept_model.save(
            0, self.on.everywhere(candidate_of(head, 0, np.zeros(0)).model)
        )
        # A run that was killed after this record has it already.
        if self.log is not None and not self.log.kept_steps:
            metrics, _ = self.task.validate(head)
            self.log.add({"step": 0, "validation": metrics, "kept_step": 0})

    @functools.cached_property
    def fitted_head(self) -> heads.Head:
        """The head before training, fitted to features of the training images."""
        whole: Any = self.model.model
        head = nnx.clone(whole.head)
        if self.plan.frozen:
            comparisons.fit_to_features(head, self.task)
            return head
        rows, labels = self.task.labelled_rows
        sample = sample_of_classes(labels, HEAD_SAMPLE)
        images, rows = np.unique(rows[sample], return_inverse=True)
        network = heads.features_of(self.model)
        features = embed_images(network, self.task.images.part(images))
        head.fit(np.asarray(features)[rows], labels[sample])
        return head

    @property
    def trained_part(self) -> Any:
        """The part of the model that is trained and saved."""
        return heads.trained_part(self.model, self.plan.backbone_training)

    def finish(self) -> dict[str, Any]:
        """Evaluate the kept model, draw, and write the summary."""
        self.model, _ = load_model(self.out, self.on)
        evaluations = self.on.of_first(self._finish)
        for opened in (self.checkpoints, self.kept_model):
            opened.close()
        return evaluations

    def _finish(self) -> dict[str, Any]:
        plan, log = self.plan, self.log
        embed = functools.partial(embed_images, self.trained_part)
        evaluations = (self.before or {}) | {"trained": self.task.evaluate(embed)}
        log.truncate_after(plan.steps)
        # The closed form is of no step: a lengthened run begins with it.
        trains = bool(self.checkpoints.steps)
        log.add_evaluation(
            plan.steps if trains else 0, "trained", evaluations["trained"]
        )
        if trains:
            plots.training(log.lines, self.out / "training.png")
        raw = {name: e for name, e in self.embeddings.items() if name == RAW_PIXELS}
        self.task.draw(raw | {"trained": embed}, self.out)
        parameters = jax.tree.leaves(nnx.state(self.model, nnx.Any(nnx.Param, Frozen)))
        skipped, entries = (
            {name: n for name, n in counts.items() if n}
            for counts in (
                self.task.dataset.skip_counts,
                self.task.dataset.entry_counts,
            )
        )
        summary = {
            "steps": plan.steps,
            "kept_step": log.kept_steps[-1],
            "comparison": log.comparison(plan.steps),
            "evaluations": evaluations,
            "parameters": sum(x.size for x in parameters),
            "counts": self.task.counts | {"skipped": sum(skipped.values())},
            "skipped": skipped,
            "skipped_entries": entries,
        }
        write_json(self.out / record.SUMMARY, summary)
        log.close()
        return evaluations


def _announce(current: RunRecord, task: tasks.Task, on: Placement, out: Path) -> None:
    """Print the data, the run directory, and the notes on choices."""
    counts = (f"{n:,} {part.replace('_', ' ')}" for part, n in task.counts.items())
    print(f"{task.description} ({', '.join(counts)}); run directory {out}", flush=True)
    notes = [*current.notes]
    if on.mesh is not None:
        of = f" of {on.processes} processes" if on.processes > 1 else ""
        notes.append(f"every batch is split over {on.count} devices{of}")
    for note in notes:
        print(f"- {note}", flush=True)


def _on_features(
    task: tasks.Task, model: Standardized, plan: Plan, *, progress: bool
) -> tasks.Task:
    """The task with features of the backbone instead of images."""
    backbone = plan.backbone
    if backbone is None:
        raise ValueError("plan must have a backbone, got none.")
    key = json.dumps([backbone.digest, plan.bfloat16, model.mean, model.std])
    cache = FeatureCache(heads.features_of(model), key)
    training_views = views_of(plan.mirror, plan.augment, backbone.views)
    fixed_views = training_views[: 1 + plan.mirror]

    def features(images: ImageArray, what: str) -> ImageArray:
        views = training_views if what == "train" else fixed_views
        return cache.of(images.pixels, views, what=f"{what} images", progress=progress)

    on_features = task.on_features(features)
    if progress:
        print(f"- features are cached in {cache.directory}", flush=True)
    return on_features


def _embeddings_before(
    task: tasks.Task, model: Standardized, plan: Plan
) -> dict[str, tasks.Embed]:
    """Embeddings to compare with: raw pixels, and the model before training."""
    embeddings: dict[str, tasks.Embed] = {}
    pixels = task.images.pixels
    if not isinstance(pixels, StoredImages) and math.prod(pixels.shape) <= MOST_RAW:
        embeddings[RAW_PIXELS] = _flat
    if not plan.pretrained:
        # In evaluation mode, so that the same program evaluates the trained model.
        model.eval()
        return embeddings | {"untrained": functools.partial(embed_images, model)}
    features: nnx.Module = heads.MeanDirection(1 + plan.mirror)
    if not plan.frozen:
        raw = heads.Features(heads.backbone_of(model))
        features = Standardized(raw, model.mean, model.std, mirror=plan.mirror)
        features.eval()
    return embeddings | {"pretrained": functools.partial(embed_images, features)}


def sample_of_classes(labels: np.ndarray, most: int) -> np.ndarray:
    """Positions of at most `most` labels, several of each class in the sample."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.random.default_rng(0).permutation(len(counts))
    order = np.argsort(rank[classes], kind="stable")
    sizes = counts[classes[order]]
    starts = np.flatnonzero(np.diff(rank[classes[order]], prepend=-1))
    position = np.arange(len(order)) - np.repeat(starts, sizes[starts])
    return order[position < max(EACH, most // len(counts))][:most]


def _flat(images: ImageArray) -> Array:
    return as_floats(images.pixels[:]).reshape(len(images), -1)
