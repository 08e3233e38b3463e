"""Random problems for the tests, and the losses that every contract is checked on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import strategies as st

import tripletjax as tj

# Distances and margins on a coarse grid: sums are exact and ties are frequent.
GRID = 8
# Two shapes and sets of options, so that few programs are compiled. `where` makes all
# the other sizes.
PLAIN, FULL = (7, 7), (5, 7)


@st.composite
def problems(draw):
    """Distances, labels and pair options, as keyword arguments of a loss."""
    n, m = draw(st.sampled_from((PLAIN, FULL)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(1, 4))
    distances = random.integers(0, draw(st.sampled_from((1, 4, 40))) + 1, (n, m)) / GRID
    labels = random.integers(0, classes, n).astype(np.int32)
    options = {"where": random.random(n) < draw(st.sampled_from((0.2, 0.7, 1.0)))}
    if (n, m) == FULL:
        options["reference_labels"] = random.integers(0, classes, m).astype(np.int32)
        options["positions"] = random.integers(-1, m + 1, n).astype(np.int32)
        options["reference_where"] = random.random(m) < 0.8
    return distances.astype(np.float32), labels, options


def unless_slow(values, quick, *, slow=None):
    """Values of a parameter: `quick` ones have no mark, all others are `slow`.

    With a list of `slow` ones, the rest is left to the full lane.
    """
    return [
        pytest.param(value, marks=_marks(value in quick, slow is None or value in slow))
        for value in values
    ]


def unless_full(values, kept):
    """Values of a parameter, all but some of which only the full lane runs."""
    return [
        pytest.param(value, marks=() if value in kept else pytest.mark.full)
        for value in values
    ]


def in_lanes(names, cases, *, quick=(), slow=None):
    """Parametrize a test with cases of the quick, the slow and the full lane.

    `quick` and `slow` are lists of cases, or functions of a case. Without `slow`, no
    case is left to the full lane.
    """

    def chosen(choice, case):
        return choice(*case) if callable(choice) else case in choice

    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *case,
                marks=_marks(chosen(quick, case), slow is None or chosen(slow, case)),
            )
            for case in cases
        ],
    )


def _marks(quick, slow):
    if quick:
        return ()
    return pytest.mark.slow if slow else pytest.mark.full


margins = st.integers(0, 2 * GRID).map(lambda k: k / GRID)

HINGES = {
    "hinge": (jax.nn.relu, oracles.hinge),
    "soft margin": (jax.nn.softplus, oracles.soft),
    "selectively contrastive": (
        tj.selectively_contrastive(),
        oracles.selectively_contrastive,
    ),
}

# name -> (loss, oracle of its triplets, oracle of its default reduction)
LOSSES = {
    "batch all": (
        tj.batch_all_loss,
        oracles.batch_all_triplets_of,
        oracles.mean_active,
    ),
    "batch hard": (
        tj.batch_hard_loss,
        oracles.batch_hard_triplets_of,
        oracles.mean_valid,
    ),
    "semi-hard": (
        tj.batch_semi_hard_loss,
        oracles.semi_hard_triplets_of,
        oracles.mean_valid,
    ),
    "semi-hard without fallback": (
        functools.partial(tj.batch_semi_hard_loss, fallback=False),
        functools.partial(oracles.semi_hard_triplets_of, fallback=False),
        oracles.mean_valid,
    ),
}


def mined(miner):
    """A loss made of a miner and `triplet_loss`."""
    cost = ("margin", "hinge", "reduce_fn")

    def loss(distances, labels, **options):
        costs = {k: options.pop(k) for k in cost if k in options}
        return tj.triplet_loss(distances, miner(distances, labels, **options), **costs)

    return loss


def every(distances, labels, **options):
    size = max(1, int(np.prod(np.shape(distances)[-2:])) * np.shape(distances)[-1])
    return tj.all_triplets(labels, size=size, distances=distances, **options)


def easy_semi_hard_of(d, positive, negative):
    chosen = oracles.easy_hard(d, positive, negative, "easy", "semi-hard")
    return [t for t in chosen if t]


LOSSES |= {
    "mined: batch hard": (mined(tj.batch_hard_triplets), *LOSSES["batch hard"][1:]),
    "mined: semi-hard": (mined(tj.batch_semi_hard_triplets), *LOSSES["semi-hard"][1:]),
    "mined: all": (mined(every), oracles.batch_all_triplets_of, oracles.mean_valid),
    "mined: easy positive, semi-hard negative": (
        mined(tj.batch_easy_hard_triplets),
        easy_semi_hard_of,
        oracles.mean_valid,
    ),
}


BUILT_IN = [name for name in LOSSES if not name.startswith("mined: ")]
# Losses that differ in more than their name: each miner has a loss made of it.
DISTINCT = [*BUILT_IN, "mined: all", "mined: easy positive, semi-hard negative"]
# The quick tests take losses that share few parts.
QUICK = [name for name in DISTINCT if name in BUILT_IN[:3] or "easy" in name]
# A hinge does not depend on the miner: losses of miners need one.
WITH_HINGES = [
    (name, hinge)
    for name in LOSSES
    for hinge in HINGES
    if name in BUILT_IN or hinge == "hinge"
]


def quick_hinge(name, hinge):
    """The quick tests take every loss, and every hinge of one loss."""
    return name in QUICK and (hinge == "hinge" or name == "batch all")


BLOCKWISE = {
    "batch all": tj.blockwise.batch_all_loss,
    "batch hard": tj.blockwise.batch_hard_loss,
    "semi-hard": tj.blockwise.batch_semi_hard_loss,
    "semi-hard without fallback": functools.partial(
        tj.blockwise.batch_semi_hard_loss, fallback=False
    ),
}
METRICS = {
    "euclidean": tj.euclidean,
    "squared_euclidean": tj.squared_euclidean,
    "cosine": tj.cosine,
    "manhattan": tj.manhattan,
    # The floor gives duplicates a finite gradient.
    "custom": tj.Metric(
        paired=lambda a, b: jnp.sqrt(jnp.maximum(jnp.sum((a - b) ** 2), 1e-12))
    ),
}


def of_matrix(loss):
    """A loss of a matrix, as one of embeddings."""

    def form(x, labels, *, metric=tj.euclidean, references=None, **options):
        return loss(metric(x, references), labels, **options)

    return form


# name -> a loss of embeddings: from their distance matrix, or without it.
FORMS = {name: of_matrix(LOSSES[name][0]) for name in LOSSES} | {
    f"blockwise: {name}": loss for name, loss in BLOCKWISE.items()
}


def mined_from_embeddings(miner):
    """A loss made of a miner and `blockwise.triplet_loss`."""

    def loss(x, labels, *, metric=tj.euclidean, references=None, **options):
        costs = {
            name: options.pop(name)
            for name in ("margin", "hinge", "reduce_fn")
            if name in options
        }
        triplets = miner(metric(x, references), labels, **options)
        return tj.blockwise.triplet_loss(
            x, triplets, references=references, metric=metric, **costs
        )

    return loss


FORMS |= {
    "embeddings: batch hard": mined_from_embeddings(tj.batch_hard_triplets),
    "embeddings: semi-hard": mined_from_embeddings(tj.batch_semi_hard_triplets),
}
# Class sizes that blockwise losses treat in different ways.
LABELS = {
    "few": np.arange(40) // 4,
    "uneven": np.repeat(np.arange(7), [1, 2, 2, 5, 6, 10, 14]),
    "many": np.arange(40) % 2,
    "one large": np.where(np.arange(40) < 30, 0, np.arange(40)),
}


@functools.cache
def program(form, hinge="hinge", metric="euclidean"):
    """Value and gradients by embeddings and margin, as one jitted function.

    Labels, `where` and embeddings make all the cases of one shape and dtype, so that
    the compiler runs once for all of them.
    """

    @jax.jit
    def run(x, labels, where, margin):
        def value(x, margin):
            options = {"metric": METRICS[metric], "hinge": HINGES[hinge][0]}
            # 16 divides none of the sizes.
            if form.startswith("blockwise"):
                options["block_size"] = 16
            return FORMS[form](x, labels, where=where, margin=margin, **options)

        return jax.value_and_grad(value, (0, 1))(x, margin)

    return run


def run(form, x, labels, where=None, margin=0.3, **options):
    """Value, and gradients by embeddings and margin, from the shared program."""
    where = np.ones(len(labels), bool) if where is None else where
    labels = np.asarray(labels, np.int32)
    return program(form, **options)(x, labels, where, np.float32(margin))


def oracle_of(form, x, labels, where=None, margin=0.3, *, hinge="hinge"):
    """Value of a loss by loops, with its default reduction and Euclidean distance."""
    loss = form.removeprefix("blockwise: ").removeprefix("embeddings: ")
    _, triplets_of, reduced = LOSSES[loss]
    d = oracles.matrix(oracles.euclidean, np.asarray(x, float))
    triplets = triplets_of(d, *oracles.pair_masks(labels, where=where))
    return reduced(oracles.loss_of(d, triplets, HINGES[hinge][1], margin)[0])


def vectors(n=40, d=6, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(n, d)), jnp.float32)


def public_names(module):
    """What a module lists, or what is its own and has no underscore."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
    ]


def public_functions():
    """Functions and metrics of the core, by names such as ``memory.push``."""
    modules = {"": tj} | {
        f"{name}.": getattr(tj, name)
        for name in ("blockwise", "memory", "retrieval", "verification", "collapse")
    }
    types = {"Metric", "selectively_contrastive"}
    return {
        prefix + name: getattr(module, name)
        for prefix, module in modules.items()
        for name in public_names(module)
        if callable(getattr(module, name)) and (name[0].islower() or name in types)
    }


def batch(n=12, dim=5, classes=3, seed=0):
    """Unit-norm embeddings with labels, every class present more than once."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return jnp.asarray(x), jnp.asarray(np.arange(n) % classes, jnp.int32)
