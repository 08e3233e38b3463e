"""The same losses in several libraries, each timed alone in a process of its own.

`measure` is what the benchmarks call; run as a program, this file is that process.
"""

import ctypes
import functools
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MARGIN = 0.2
LOSSES = ("hard", "semi-hard", "all")
# Losses of pairs, of cosine distances with their defaults.
PAIR_LOSSES = ("supcon", "nt_xent", "multi_similarity", "contrastive", "sigmoid")
# Losses of two sides: two views of each item, and embeddings with their class vectors.
# Both sides have gradients.
TWO_SIDES = ("clip", "arcface")
# How long memory is watched, and how long and often time is taken at most.
PEAK_SECONDS, REPEAT_SECONDS, MOST_REPEATS = 0.3, 3.0, 101
# Cases that take this number of seconds are not repeated often.
LONG = 2.0


class Case(NamedTuple):
    """A batch: unit vectors in classes of one size, or references of such.

    Attributes:
        loss: one of `LOSSES`, `PAIR_LOSSES` or `TWO_SIDES`.
        n: how many embeddings.
        classes: how many classes they are in.
        references: how many references, or 0 if the embeddings are their own.
        dim: their dimension.
    """

    loss: str
    n: int
    classes: int
    references: int = 0
    dim: int = 128

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Embeddings, labels, references and their labels, if any."""
        out = []
        for seed, size in enumerate((self.n, self.references)):
            if size:
                x = np.random.default_rng(seed).normal(size=(size, self.dim))
                x /= np.linalg.norm(x, axis=1, keepdims=True)
                out += [x.astype(np.float32), np.arange(size) % self.classes]
        return tuple(out)


def measure(
    library: str, case: Case, *, limit: float, with_product: bool = True
) -> dict:
    """Times loss and gradient in a new process.

    Args:
        library: one of `LIBRARIES`.
        case: what to compute.
        limit: seconds after which it is stopped.
        with_product: whether to time the bare product, too.

    Returns:
        ``seconds``, the median of several calls, ``first``: seconds of the first
        call, with compilation, ``bytes`` of memory that a later call needs at its peak,
        the ``value``; and if wanted the ``product`` in seconds, in turn with the loss,
        and their ``ratio``. Or ``failed``: why there are none.
    """
    message = json.dumps([library, case, with_product])
    try:
        done = subprocess.run(
            [sys.executable, __file__, message],
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0 or "alloc" in done.stderr or "memory" in done.stderr.lower():
        return {"failed": "out of memory"}
    if "not supported" in done.stderr:
        return {"failed": "not supported"}
    raise RuntimeError(f"{library}, {case}:\n{done.stderr}")


def main(message: str) -> None:
    library, case, with_product = json.loads(message)
    case = Case(*case)
    arrays = case.arrays()
    loss, product = LIBRARIES[library](case, *arrays)
    within_memory()
    start = time.perf_counter()
    value = loss()
    first = time.perf_counter() - start
    with Peak() as peak:
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < PEAK_SECONDS:
            loss()
            count += 1
        each = (time.perf_counter() - start) / count
    if with_product:
        product()
    least = 3 if each < LONG else int(with_product)
    losses, products = [each], []
    for _ in range(min(max(least, int(REPEAT_SECONDS / each)), MOST_REPEATS)):
        losses.append(seconds(loss))
        if with_product:
            if each > LONG:
                # So that what the loss left behind is not in its time.
                product()
            products.append(seconds(product))
    out = {"seconds": statistics.median(losses), "first": first, "bytes": peak.bytes}
    if with_product:
        out["product"] = statistics.median(products)
        out["ratio"] = out["seconds"] / out["product"]
    print(json.dumps(out | {"value": value}))


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Peak:
    """How much resident memory grows while in this context, looked at all the time."""

    def __enter__(self) -> "Peak":
        # What was freed before must not count as there already.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start = self.most = resident("VmRSS")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.0005):
            self.most = max(self.most, resident("VmRSS"))

    @property
    def bytes(self) -> int:
        return self.most - self.start


def resident(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024


def within_memory() -> None:
    """Allocations that the machine has no room for fail, before it has to stop us."""
    with open("/proc/meminfo") as file:
        free = next(line for line in file if line.startswith("MemAvailable"))
    room = resident("VmSize") + int(free.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (room, room))


def installed() -> list[str]:
    """The libraries that are there."""
    package = {name: name.split(".")[0].replace("-", "_") for name in LIBRARIES}
    package["n x n x n"] = "jax"
    return [name for name in LIBRARIES if importlib.util.find_spec(package[name])]


def machine() -> dict[str, str]:
    """What the figures were made on."""
    import jax

    with open("/proc/cpuinfo") as file:
        names = [x.split(":")[1].strip() for x in file if x.startswith("model name")]
    kind = f"{len(names)} x {names[0]}" if names else platform.machine()
    device = jax.devices()[0]
    if device.platform != "cpu":
        kind = device.device_kind
    return {
        "machine": kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


# Each makes, from the arrays of a case, a function that computes loss and gradient and
# returns the loss, and one that computes the product of all embeddings.

Timed = tuple[Callable[[], float], Callable[[], Any]]


def with_jax(case: Case, function: Callable, x: Any, y: Any) -> Timed:
    """The function takes x, or a tuple of x and y if both have gradients."""
    import jax
    import jax.numpy as jnp

    argument = (x, y) if case.loss in TWO_SIDES else x
    loss = jax.jit(jax.value_and_grad(function))
    product = jax.jit(lambda x, y: jnp.matmul(x, y.T, precision="highest"))
    return (
        lambda: float(jax.block_until_ready(loss(argument))[0]),
        lambda: product(x, y).block_until_ready(),
    )


def ours(case: Case, x: Any, labels: Any, *references: Any, blockwise: bool) -> Timed:
    import jax.numpy as jnp

    import tripletjax as tj

    x, labels, *references = map(jnp.asarray, (x, labels, *references))
    module = tj.blockwise if blockwise else tj
    named = {
        "hard": module.batch_hard_loss,
        "semi-hard": module.batch_semi_hard_loss,
        "all": module.batch_all_loss,
    }
    options, metric, y = {"margin": MARGIN}, tj.euclidean, x
    if case.loss in PAIR_LOSSES:
        named[case.loss] = getattr(module, f"{case.loss}_loss")
        options, metric = {}, tj.cosine
    if case.loss in TWO_SIDES:
        named |= {"clip": module.info_nce_loss, "arcface": module.arcface_loss}
        options, metric = {}, tj.cosine
        if case.loss == "clip":
            options["symmetric"] = True
    loss = named[case.loss]
    if references:
        y, options["reference_labels"] = references

    def function(argument: Any) -> Any:
        x, others = argument if case.loss in TWO_SIDES else (argument, y)
        if not references:
            others = None
        if blockwise:
            return loss(x, labels, metric=metric, references=others, **options)
        return loss(metric(x, others), labels, **options)

    return with_jax(case, function, x, y)


def cubed(case: Case, x: Any, labels: Any, *references: Any) -> Timed:
    """All triplets as an array n x n x n, as in most tutorials."""
    import jax.numpy as jnp

    import tripletjax as tj

    if references or case.loss not in LOSSES:
        raise NotImplementedError("not supported")
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    alike = labels[:, None] == labels
    positive = alike & ~jnp.eye(len(x), dtype=bool)

    def function(x: Any) -> Any:
        d = tj.euclidean(x)
        if case.loss == "hard":
            farthest = jnp.max(jnp.where(positive, d, 0), axis=1)
            nearest = jnp.min(jnp.where(alike, jnp.inf, d), axis=1)
            return jnp.mean(jnp.maximum(farthest - nearest + MARGIN, 0))
        pairs = positive[:, :, None] & ~alike[:, None, :]
        if case.loss == "all":
            costs = jnp.maximum(d[:, :, None] - d[:, None, :] + MARGIN, 0)
            costs = jnp.where(pairs, costs, 0)
            return jnp.sum(costs) / jnp.sum(costs > 0)
        beyond = pairs & (d[:, None, :] > d[:, :, None])
        nearest = jnp.min(jnp.where(beyond, d[:, None, :], jnp.inf), axis=2)
        farthest = jnp.max(jnp.where(alike, 0, d), axis=1, keepdims=True)
        chosen = jnp.where(jnp.any(beyond, axis=2), nearest, farthest)
        costs = jnp.where(positive, jnp.maximum(d - chosen + MARGIN, 0), 0)
        return jnp.sum(costs) / jnp.sum(positive)

    return with_jax(case, function, x, x)


def representax(case: Case, x: Any, labels: Any, *references: Any) -> Timed:
    import jax.numpy as jnp
    from representax.tasks.triplet import losses

    if references or case.loss not in LOSSES:
        raise NotImplementedError("not supported")
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    terms = {
        "hard": losses.batch_hard_triplet_loss_terms,
        "semi-hard": losses.batch_semi_hard_triplet_loss_terms,
        "all": losses.batch_all_triplet_loss_terms,
    }[case.loss]
    return with_jax(case, lambda x: terms(x, labels, margin=MARGIN).loss, x, x)


def of_optax(case: Case, x: Any, labels: Any, *references: Any) -> Timed:
    import jax.numpy as jnp
    import optax

    if references or case.loss != "nt_xent":
        raise NotImplementedError("not supported")
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    function = lambda x: optax.losses.ntxent(x, labels, temperature=0.1)  # noqa: E731
    return with_jax(case, function, x, x)


def with_torch(function: Callable, x: Any, y: Any, *, both: bool = False) -> Timed:
    """The function takes x, or x and y if both have gradients."""
    import torch

    x = torch.tensor(x, requires_grad=True)
    y = torch.tensor(y, requires_grad=both)

    def loss() -> float:
        x.grad = y.grad = None
        value = function(x, y) if both else function(x)
        value.backward()
        return value.item()

    def product() -> None:
        with torch.no_grad():
            torch.matmul(x, y.T)

    return loss, product


def sentence_transformers(case: Case, x: Any, labels: Any, *references: Any) -> Timed:
    import torch
    from sentence_transformers.sentence_transformer import losses

    if case.loss == "clip":
        ranking = losses.MultipleNegativesRankingLoss(
            torch.nn.Identity(),
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        return with_torch(
            lambda x, y: ranking.compute_loss_from_embeddings([x, y], None),
            x,
            references[0],
            both=True,
        )
    if references or case.loss not in LOSSES:
        raise NotImplementedError("not supported")
    kind, method = {
        "hard": (losses.BatchHardTripletLoss, "batch_hard_triplet_loss"),
        "semi-hard": (losses.BatchSemiHardTripletLoss, "batch_semi_hard_triplet_loss"),
        "all": (losses.BatchAllTripletLoss, "batch_all_triplet_loss"),
    }[case.loss]
    loss = getattr(kind(torch.nn.Identity(), margin=MARGIN), method)
    labels = torch.tensor(labels)
    return with_torch(lambda x: loss(labels, x), x, x)


def pytorch_metric_learning(case: Case, x: Any, labels: Any, *references: Any) -> Timed:
    """Its semi-hard negatives are all within the margin, not each pair's nearest."""
    import torch
    from pytorch_metric_learning import distances, losses, miners, reducers

    labels = torch.tensor(labels)
    if case.loss == "arcface":
        margin = float(np.degrees(0.5))
        classes = losses.ArcFaceLoss(case.references, case.dim, margin=margin)

        def of_classes(x: Any, y: Any) -> Any:
            classes._parameters.pop("W", None)
            classes.W = y.T
            return classes(x, labels)

        return with_torch(of_classes, x, references[0], both=True)
    if case.loss not in LOSSES:
        if references:
            raise NotImplementedError("not supported")
        named = {
            "supcon": losses.SupConLoss,
            "nt_xent": functools.partial(losses.NTXentLoss, temperature=0.1),
            "multi_similarity": losses.MultiSimilarityLoss,
            "contrastive": functools.partial(
                losses.ContrastiveLoss,
                pos_margin=1,
                neg_margin=0,
                distance=distances.CosineSimilarity(),
            ),
        }
        if case.loss not in named:
            raise NotImplementedError("not supported")
        of_pairs = named[case.loss]()
        return with_torch(lambda x: of_pairs(x, labels), x, x)
    distance = distances.LpDistance(normalize_embeddings=False)
    loss = losses.TripletMarginLoss(
        margin=MARGIN,
        distance=distance,
        reducer=None if case.loss == "all" else reducers.MeanReducer(),
    )
    miner = {
        "all": lambda *_: None,
        "hard": miners.BatchHardMiner(distance=distance),
        "semi-hard": miners.TripletMarginMiner(
            margin=MARGIN, type_of_triplets="semihard", distance=distance
        ),
    }[case.loss]
    others = tuple(map(torch.tensor, references))

    def function(x: Any) -> Any:
        return loss(x, labels, miner(x, labels, *others), *others)

    return with_torch(function, x, references[0] if references else x)


LIBRARIES: dict[str, Callable[..., Timed]] = {
    "tripletjax.blockwise": functools.partial(ours, blockwise=True),
    "tripletjax": functools.partial(ours, blockwise=False),
    "representax": representax,
    "sentence-transformers": sentence_transformers,
    "pytorch-metric-learning": pytorch_metric_learning,
    "optax": of_optax,
    "n x n x n": cubed,
}

if __name__ == "__main__":
    main(sys.argv[1])
