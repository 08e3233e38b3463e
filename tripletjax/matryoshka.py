"""Matryoshka losses: embeddings whose prefixes are embeddings as well."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import as_integer
from tripletjax.distances import normalize as normalize_vectors


def matryoshka_loss(
    loss: Callable[..., Array],
    dims: Sequence[int],
    *,
    weights: Sequence[ArrayLike] | Array | None = None,
    normalize: bool = True,
) -> Callable[..., Array]:
    r"""A loss at several prefixes of the vectors, which makes each prefix an embedding.

    $$\sum_k w_k \, \ell\bigl(x_{1:d_k} / \lVert x_{1:d_k} \rVert\bigr)$$

    After training, the first dimensions alone are a smaller embedding, as for a first
    search. References, such as class vectors, have the same prefixes.

    Memory: that of the loss, once for each prefix.

    Args:
        loss: a loss of embeddings such as `tripletjax.blockwise.supcon_loss`, which
            returns one array.
        dims: lengths of the prefixes, usually with all dimensions as the last.
        weights: $w_k$, which may have gradients; 1 each if not given.
        normalize: whether each prefix is scaled to unit norm. Without it, losses with
            the cosine distance stay the same.

    Returns:
        A function with the arguments of the loss.

    Raises:
        TypeError: if dims are no integers, or the loss is not callable or returns more
            than one array.
        ValueError: if dims are not from 1 to the dimensions of the embeddings, or
            weights have another number.

    Requirements:
        The batch of the loss, which must return one array.

    Settings:
        Kusupati et al. 2022 and their code: lengths of 8, 16 and so on to 2,048, with
        weights of 1.

    Relations:
        With the whole length alone, for vectors of unit norm, it equals the loss.
        sentence-transformers' ``MatryoshkaLoss`` is near.

    References:
        Kusupati et al. Matryoshka Representation Learning. 2022. arXiv:2205.13147

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x = jax.random.normal(jax.random.key(0), (12, 8))
    >>> labels = jnp.arange(12) % 3
    >>> loss = tj.matryoshka_loss(tj.blockwise.supcon_loss, (2, 4, 8))
    >>> value, gradient = jax.value_and_grad(loss)(x, labels, temperature=0.5)
    >>> print(f"{value:.4f}", gradient.shape)
    7.5111 (12, 8)
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {loss!r}.")
    if not isinstance(dims, Iterable):
        raise TypeError(f"dims must be a sequence of integers, got {dims!r}.")
    lengths = [as_integer("dims", dim) for dim in dims]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"dims must be at least 1, got {lengths}.")
    if weights is None:
        weights = [1.0] * len(lengths)
    if not np.iterable(weights) or any(map(jnp.ndim, weights)):
        raise ValueError(f"weights must be a sequence of numbers, got {weights!r}.")
    factors = [*weights]
    if len(factors) != len(lengths):
        raise ValueError(
            f"weights must be one for each of {len(lengths)} dims, got {len(factors)}."
        )

    def prefix(name: str, x: ArrayLike, dim: int) -> Array:
        x = jnp.asarray(x)
        if dim > x.shape[-1]:
            raise ValueError(
                f"dims must be at most the {x.shape[-1]} dimensions of {name}, got "
                f"{dim}."
            )
        return normalize_vectors(x[..., :dim]) if normalize else x[..., :dim]

    def of_prefixes(
        embeddings: ArrayLike, *args: Any, references: Any = None, **options: Any
    ) -> Array:
        values = []
        for dim in lengths:
            pairs = dict(options)
            if references is not None:
                pairs["references"] = prefix("references", references, dim)
            value = loss(prefix("embeddings", embeddings, dim), *args, **pairs)
            if not isinstance(value, Array):
                raise TypeError(f"loss must return one array, got {type(value)}.")
            values.append(value)
        return functools.reduce(jnp.add, map(jnp.multiply, factors, values))

    return of_prefixes
