"""Collapse report: the spread and the effective rank of embeddings.

A triplet loss that stays at its margin usually means that all embeddings have collapsed
to one point. In partial collapse, they vary in far fewer directions than they have
dimensions.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax._pairwise.batch import single_batch
from tripletjax._pairwise.block_sizes import by_platform
from tripletjax._pairwise.tiles import Tiles
from tripletjax.distances import Metric, as_vectors, euclidean


class CollapseReport(NamedTuple):
    """Spread of embeddings.

    After collapse, `mean_distance` and `distance_std` are near 0 and `effective_rank`
    is 1.

    Attributes:
        mean_distance: the mean distance of all pairs.
        distance_std: the standard deviation of the distances of all pairs.
        effective_rank: the effective number of directions, 1 to d.
        mean_norm: the mean Euclidean norm of the embeddings.
        norm_std: the standard deviation of the norms.
    """

    mean_distance: Array
    distance_std: Array
    effective_rank: Array
    mean_norm: Array
    norm_std: Array


@jitted(callables=("metric",))
def report(
    embeddings: ArrayLike,
    *,
    metric: Metric = euclidean,
    where: ArrayLike | None = None,
) -> CollapseReport:
    r"""Compute the mean distance, its spread, and the effective rank of embeddings.

    With $\sigma_i$ the singular values of the centred embeddings, the effective rank
    is

    $$\exp\Bigl(-\sum_i p_i \log p_i\Bigr), \qquad
      p_i = \frac{\sigma_i}{\sum_j \sigma_j}$$

    and 1 if all are 0. Distances are over the n (n - 1) / 2 pairs.

    Memory: O(n d + d^2), and a block of distances.

    Args:
        embeddings: vectors ``[n, d]``.
        metric: the `Metric` of the distances.
        where: bool ``[n]``, False for padding.

    Returns:
        `CollapseReport`. Distances and rank are NaN for fewer than two embeddings, and
        the norms without any.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    References:
        Roy, Vetterli. The Effective Rank: A Measure of Effective Dimensionality. 2007.
        EUSIPCO

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> report = tj.collapse.report(jnp.array([[0.0, 3.0], [4.0, 0.0]]))
    >>> print(report.mean_distance, report.effective_rank, report.mean_norm)
    5.0 1.0 3.5
    """
    count = jnp.shape(embeddings)[-2] if jnp.ndim(embeddings) > 1 else 1
    batch = single_batch(metric, embeddings, jnp.arange(count), where=where)
    where = batch.pairs.where

    def visit(state: tuple[Array, ...], distances: Array, pair: Array) -> tuple:
        # Scalars: the number of pairs so far, their mean, and their summed squared
        # deviations from it, updated by the parallel algorithm of Chan et al.
        count, mean, deviations = state
        new = jnp.sum(pair, dtype=distances.dtype)
        new_mean = jnp.sum(jnp.where(pair, distances, 0)) / jnp.maximum(new, 1)
        squares = jnp.where(pair, jnp.square(distances - new_mean), 0)
        both = jnp.maximum(count + new, 1)
        apart = new_mean - mean
        return (
            count + new,
            mean + apart * new / both,
            deviations + jnp.sum(squares) + apart**2 * count * new / both,
        )

    zero = jnp.zeros((), batch.anchors.dtype)
    pairs, mean, deviations = by_platform(
        lambda sizes: Tiles.of(metric, batch, sizes).distances(
            visit, (zero, zero, zero)
        ),
        batch.size,
    )
    x = as_vectors(("embeddings", embeddings), rank=2)[0]
    real = jnp.ones(len(x), bool) if where is None else where
    count = jnp.sum(real)
    x = jnp.where(real[:, None], x, 0)
    norms = jnp.linalg.norm(x, axis=-1)
    centred = jnp.where(real[:, None], x - jnp.sum(x, axis=0) / count, 0)
    has_pairs = pairs > 0
    return CollapseReport(
        jnp.where(has_pairs, mean, jnp.nan),
        jnp.where(has_pairs, jnp.sqrt(deviations / pairs), jnp.nan),
        jnp.where(has_pairs, _effective_rank(centred), jnp.nan),
        jnp.mean(norms, where=real),
        jnp.std(norms, where=real),
    )


def _effective_rank(x: Array) -> Array:
    values = jnp.linalg.svd(x, compute_uv=False, full_matrices=False)
    # Smaller singular values are rounding errors.
    least = max(x.shape) * jnp.finfo(x.dtype).eps * values[0]
    shares = jnp.where(values > least, values, 0)
    shares = shares / jnp.where(values[0] > 0, jnp.sum(shares), 1)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.exp(-jnp.sum(shares * logs))
