r"""Gradient caching: batches whose embeddings fit into memory, but not the activations.

The loss of a batch needs all embeddings at once. The activations of the encoder need
not exist at once: the encoder embeds one chunk after the other and keeps the embeddings
alone. On the way back it computes the activations of each chunk again. The gradient is
exact, for any loss and any encoder of single items.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tripletjax._api import as_integer
from tripletjax._closures import canonical
from tripletjax._pairwise.mesh import vary_alike


def encode_in_chunks(
    encoder: Callable[..., Any],
    params: Any,
    inputs: Any,
    *,
    chunk_size: int,
    key: Array | None = None,
) -> Any:
    r"""Embed a batch in chunks; gradients compute the activations of each chunk again.

    $$\frac{\partial L}{\partial \theta} = \sum_c \frac{\partial L}{\partial X_c}
      \frac{\partial f_\theta(I_c)}{\partial \theta}, \quad X_c = f_\theta(I_c)$$

    Any function of the embeddings is a loss, and JAX differentiates it: by `params`,
    by arrays that the encoder closes over, and by parameters of the loss itself.
    Two sides with two encoders, or with one, are two calls. The encoder runs forward
    twice for each gradient.

    Memory: O(n) embeddings with their gradients, and the activations of one chunk. If
    `chunk_size` does not divide n, a copy of the inputs as well.

    Args:
        encoder: ``(params, chunk) -> embeddings``, or ``(params, chunk, key)`` if there
            is a `key`. Embeddings are a pytree of arrays with one row per input.
        params: a pytree of arrays.
        inputs: a pytree of arrays ``[n, ...]``. Chunks are consecutive rows.
        chunk_size: rows of a chunk. The last chunk may have fewer.
        key: random key. Each chunk has the key ``jax.random.fold_in(key, chunk)``, and
            the same in the backward pass. Keys of single items are inputs instead:
            ``(x, jax.random.split(key, n))`` gives results for any `chunk_size`.

    Returns:
        The embeddings of all inputs, ``[n, ...]``.

    Raises:
        TypeError: if `encoder` is not callable or `chunk_size` is no integer.
        ValueError: if arrays have different numbers of rows, or `chunk_size` is below
            1.

    References:
        Gao, Zhang, Han, Callan. Scaling Deep Contrastive Learning Batch Size under
        Memory Limited Setup. 2021. arXiv:2101.06983

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> images = jax.random.normal(jax.random.key(0), (10, 5))
    >>> labels = jnp.arange(10) % 3
    >>> def encoder(params, images):
    ...     return jnp.tanh(images @ params)
    >>> @jax.jit
    ... def loss(params, temperature):
    ...     x = tj.encode_in_chunks(encoder, params, images, chunk_size=4)
    ...     return tj.blockwise.supcon_loss(x, labels, temperature=temperature)
    >>> by_params, by_temperature = jax.grad(loss, (0, 1))(jnp.eye(5, 2), 0.1)
    >>> print(by_params.shape, by_temperature.shape)
    (5, 2) ()
    """
    if not callable(encoder):
        raise TypeError(f"encoder must be callable, got {encoder!r}.")
    chunk_size = as_integer("chunk_size", chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    return _encode(canonical(encoder), params, inputs, key, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=("encoder", "chunk_size"))
def _encode(
    encoder: Callable[..., Any],
    params: Any,
    inputs: Any,
    key: Array | None,
    *,
    chunk_size: int,
) -> Any:
    n = _row_count(inputs)

    def encode(params: Any, chunk: Any, index: Array) -> Any:
        keys = () if key is None else (jax.random.fold_in(key, index),)
        out = encoder(params, chunk, *keys)
        rows = _row_count(chunk)
        for leaf in jax.tree.leaves(out):
            if jnp.shape(leaf)[:1] != (rows,):
                raise ValueError(
                    f"encoder must return one row for each of {rows} inputs, got "
                    f"shape {jnp.shape(leaf)}."
                )
        return out

    if n <= chunk_size:
        return encode(params, inputs, jnp.uint32(0))
    # Over a mesh, the gradients of all chunks are summed over the devices once.
    leaves, tree = jax.tree.flatten((params, inputs))
    params, inputs = jax.tree.unflatten(tree, vary_alike(*leaves))
    count, rest = divmod(n, chunk_size)

    def step(_: None, part: tuple[Any, Array]) -> tuple[None, Any]:
        # A loop needs no barrier against common subexpressions.
        again = jax.checkpoint(encode, prevent_cse=False)
        return None, again(params, *part)

    chunks = jax.tree.map(
        lambda x: x[: n - rest].reshape(count, chunk_size, *x.shape[1:]), inputs
    )
    _, out = lax.scan(step, None, (chunks, jnp.arange(count, dtype=jnp.uint32)))
    out = jax.tree.map(lambda x: x.reshape(n - rest, *x.shape[2:]), out)
    if not rest:
        return out
    last = jax.tree.map(lambda x: x[n - rest :], inputs)
    last = jax.checkpoint(encode)(params, last, jnp.uint32(count))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), out, last)


def _row_count(inputs: Any) -> int:
    """The number of rows that all arrays have."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    rows = {shape[:1] for shape in shapes}
    if len(rows) != 1 or () in rows:
        raise ValueError(
            f"inputs must be arrays with one number of rows, got shapes {shapes}."
        )
    ((n,),) = rows
    return n
