r"""Cross-batch memory: references from earlier batches, in a ring buffer.

A batch has few hard negatives, while earlier batches have many more embeddings. The
embeddings of a network that learns slowly change little from batch to batch. The ring
buffer holds the last of them, as `references` of the next batch:

>>> import jax
>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> x = jax.random.normal(jax.random.key(0), (8, 16))
>>> labels = jnp.arange(8) % 4
>>> memory = tj.memory.create(32, 16)
>>> for _ in range(3):
...     pairs = tj.memory.references(memory, x, labels)
...     loss = tj.blockwise.batch_hard_loss(x, labels, **pairs)
...     memory = tj.memory.push(memory, x, labels)
>>> print(pairs["references"].shape, memory.valid.sum())
(40, 16) 24

Shapes never change, so a step is compiled only once. `push` copies the memory, unless
the memory is donated: a step jitted with ``donate_argnames``, or
``jax.jit(tj.memory.push, donate_argnums=0)``, writes it in place.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from tripletjax._api import as_integer, jitted
from tripletjax._pairwise.mesh import AxisName, check_split
from tripletjax.distances import as_vectors
from tripletjax.pairs import per_item


class Memory(NamedTuple):
    """Ring buffer of embeddings with their labels.

    Attributes:
        embeddings: floats ``[size, d]``.
        labels: integers ``[size, ...]``.
        valid: bool ``[size]``, True for filled slots.
        position: int32 scalar, the slot that `push` writes next.
    """

    embeddings: Array
    labels: Array
    valid: Array
    position: Array


def create(
    size: int,
    dim: int,
    *,
    dtype: DTypeLike = jnp.float32,
    label_dtype: DTypeLike = int,
    label_shape: tuple[int, ...] = (),
) -> Memory:
    """Create an empty memory.

    Memory: O(size d).

    Args:
        size: the number of embeddings that the memory holds, at least 1.
        dim: the number of dimensions of an embedding, at least 1.
        dtype: floating dtype of the embeddings; bfloat16 takes half the memory of
            float32. Numbers beyond its range, which for float16 ends at 65,504, become
            its largest number.
        label_dtype: integer dtype of the labels; by default int32, or int64 under
            jax_enable_x64.
        label_shape: the shape of one label, such as ``(k,)`` for tags.

    Returns:
        A `Memory` without valid embeddings.

    Raises:
        TypeError: if a size is not an integer, `dtype` not a floating dtype, or
            `label_dtype` not an integer dtype.
        ValueError: if a size is less than 1.

    >>> import tripletjax as tj
    >>> memory = tj.memory.create(1024, 128)
    >>> print(memory.embeddings.shape, memory.valid.any())
    (1024, 128) False
    """
    size, dim = as_integer("size", size), as_integer("dim", dim)
    for name, value in (("size", size), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value, wanted, rule in (
        ("dtype", dtype, jnp.floating, "a floating dtype"),
        ("label_dtype", label_dtype, jnp.integer, "an integer dtype"),
    ):
        if not jnp.issubdtype(jnp.dtype(value), wanted):
            raise TypeError(f"{name} must be {rule}, got {value!r}.")
    return Memory(
        jnp.zeros((size, dim), dtype),
        jnp.zeros((size, *label_shape), label_dtype),
        jnp.zeros(size, bool),
        jnp.zeros((), jnp.int32),
    )


@jitted(keep_dtypes=True)
def push(
    memory: Memory,
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Memory:
    """Write a batch over the oldest embeddings.

    Embedding i of the batch goes to slot ``(position + i) % size``. If the batch is
    larger than the memory, only its last `size` embeddings remain. Gradients do not
    flow into the memory.

    Memory: O(n d), beside the copy.

    Args:
        memory: a `Memory` from `create` or `push`.
        embeddings: vectors ``[n, d]``.
        labels: integers ``[n, ...]``.
        where: bool ``[n]``, False for embeddings to skip, such as padding.

    Returns:
        The next `Memory`.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    References:
        Wang, Zhang, Huang, Scott. Cross-Batch Memory for Embedding Learning. 2020.
        arXiv:1912.06798

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> memory = tj.memory.create(3, 1)
    >>> for start in (1.0, 3.0):
    ...     x = jnp.array([[start], [start + 1]])
    ...     memory = tj.memory.push(memory, x, jnp.array([0, 1]))
    >>> print(memory.embeddings[:, 0], memory.position)
    [4. 2. 3.] 1
    """
    x, labels, where = _checked(memory, embeddings, labels, where)
    size, n = len(memory.valid), len(x)
    written = jnp.ones(n, bool) if where is None else where
    rank = jnp.cumsum(written, dtype=jnp.int32) - 1
    count = rank[-1] + 1
    # The last `size` embeddings have distinct slots.
    written &= rank >= count - size
    slot = jnp.where(written, (memory.position + rank) % size, size)

    def put(old: Array, new: Array) -> Array:
        new = _within_range(lax.stop_gradient(new), old.dtype).astype(old.dtype)
        return old.at[slot].set(new, mode="drop")

    return Memory(
        put(memory.embeddings, x),
        put(memory.labels, labels),
        put(memory.valid, written),
        (memory.position + count) % size,
    )


@jitted(static=("axis_name",), keep_dtypes=True)
def references(
    memory: Memory,
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, Any]:
    """Build the references of a batch: the batch itself, followed by a memory.

    The result has options of every blockwise loss and miner, of retrieval and of
    verification. With a distance matrix, pass `references` to the metric and the other
    options to the loss. An anchor is never its own positive.

    Memory: O((n + size) d).

    Args:
        memory: a `Memory` of earlier batches.
        embeddings: vectors ``[n, d]`` of the batch; gradients flow through them.
        labels: integers ``[n, ...]``.
        where: bool ``[n]``, False for padding.
        axis_name: inside ``jax.shard_map``, the mesh axes over which batch and memory
            are split: each device has a memory of its own part.

    Returns:
        A dict of `references` ``[n + size, d]`` in the dtype of the embeddings,
        `reference_labels` (integers ``[n + size, ...]``), `reference_where` (bool
        ``[n + size]``) and `positions` (integers ``[n]``).

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if shapes do not fit.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x, labels = jnp.array([[0.0], [3.0]]), jnp.array([0, 1])
    >>> memory = tj.memory.push(tj.memory.create(2, 1), x + 1, labels)
    >>> pairs = tj.memory.references(memory, x, labels)
    >>> distances = tj.euclidean(x, pairs.pop("references"))
    >>> print(tj.batch_hard_loss(distances, labels, margin=0.5, **pairs))
    0.0
    """
    x, labels, where = _checked(memory, embeddings, labels, where)
    n, size = len(x), len(memory.valid)
    positions = jnp.arange(n)
    if axis_name is not None:
        check_split(x, axis_name)
        positions += lax.axis_index(axis_name) * (n + size)
    real = jnp.ones(n, bool) if where is None else where
    kept = lax.stop_gradient(memory.embeddings).astype(x.dtype)
    return {
        "references": jnp.concatenate([x, kept]),
        "reference_labels": jnp.concatenate([labels, memory.labels]),
        "reference_where": jnp.concatenate([real, memory.valid]),
        "positions": positions,
    }


def _within_range(x: Array, dtype: DTypeLike) -> Array:
    """Clip finite numbers to the range of a dtype; NaN and infinity stay."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return x
    limits = jnp.finfo(dtype)
    if limits.max >= jnp.finfo(x.dtype).max:
        return x
    clipped = jnp.clip(x, limits.min.astype(x.dtype), limits.max.astype(x.dtype))
    return jnp.where(jnp.isfinite(x), clipped, x)


def _checked(
    memory: Any, embeddings: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array | None]:
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be a Memory, got {type(memory).__name__}.")
    (x,) = as_vectors(("embeddings", embeddings), rank=2)
    d = memory.embeddings.shape[1]
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(
            f"embeddings must be [n, {d}], as in memory, got shape {x.shape}."
        )
    labels, shape = jnp.asarray(labels), memory.labels.shape[1:]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if labels.shape != (len(x), *shape):
        raise ValueError(
            f"labels must be {[len(x), *shape]}, one for each of the embeddings as in "
            f"memory, got shape {labels.shape}."
        )
    if jnp.iinfo(labels.dtype).max > jnp.iinfo(memory.labels.dtype).max:
        raise TypeError(
            f"labels must fit into the labels of memory, {memory.labels.dtype}, got "
            f"dtype {labels.dtype}; create the memory with label_dtype."
        )
    if where is not None:
        where = per_item("where", where, len(x), "embeddings", jnp.bool_)
    return x, labels, where
