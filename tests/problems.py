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
# Few shapes and sets of options, so that few programs are compiled; `where` makes all
# the other sizes.
PLAIN = ((1, 1), (7, 7))
FULL = ((5, 5), (3, 7))


@st.composite
def problems(draw):
    """Distances, labels and pair options, as keyword arguments of a loss."""
    n, m = draw(st.sampled_from(PLAIN + FULL))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(1, 4))
    distances = random.integers(0, draw(st.sampled_from((1, 4, 40))) + 1, (n, m)) / GRID
    labels = random.integers(0, classes, n).astype(np.int32)
    options = {"where": random.random(n) < draw(st.sampled_from((0.7, 1.0)))}
    if (n, m) in FULL:
        options["reference_labels"] = random.integers(0, classes, m).astype(np.int32)
        options["positions"] = random.integers(-1, m + 1, n).astype(np.int32)
        options["reference_where"] = random.random(m) < 0.8
    return distances.astype(np.float32), labels, options


def unless_slow(values, quick):
    """Values of a parameter, of which all but some wait for the slow lane."""
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]


def unless_full(values, kept):
    """Values of a parameter, all but some of which only the full lane runs."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.full)
        for value in values
    ]


def by_lane(cases, *, quick=(), slow=()):
    """Cases of several parameters, each in the quick, the slow or the full lane."""

    def marks_of(case):
        if case in quick:
            return ()
        return pytest.mark.slow if case in slow else pytest.mark.full

    return [pytest.param(*case, marks=marks_of(case)) for case in cases]


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
    "mined: semi-hard": (
        mined(tj.batch_semi_hard_triplets),
        *LOSSES["semi-hard"][1:],
    ),
    "mined: all": (mined(every), oracles.batch_all_triplets_of, oracles.mean_valid),
    "mined: easy positive, semi-hard negative": (
        mined(tj.batch_easy_hard_triplets),
        easy_semi_hard_of,
        oracles.mean_valid,
    ),
}


BUILT_IN = [name for name in LOSSES if not name.startswith("mined: ")]
# Of those of miners, the ones that no built-in loss is made of.
DISTINCT = [*BUILT_IN, "mined: all", "mined: easy positive, semi-hard negative"]
# Of these, what quick tests are of: the others are compiled of the same parts.
QUICK = [name for name in DISTINCT if name in BUILT_IN[:3] or "easy" in name]
# Losses with hinges: what a triplet costs does not depend on how it was found, so that
# those of miners need one.
WITH_HINGES = [
    pytest.param(name, hinge, marks=[] if quick else [pytest.mark.slow])
    for name in LOSSES
    for hinge in HINGES
    if name in BUILT_IN or hinge == "hinge"
    for quick in [name in QUICK and (hinge == "hinge" or name == "batch all")]
]


def public_names(module):
    """What a module lists, or what is its own and has no underscore."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
    ]


def batch(n=12, dim=5, classes=3, seed=0):
    """Unit-norm embeddings with labels, every class present more than once."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return jnp.asarray(x), jnp.asarray(np.arange(n) % classes, jnp.int32)
