r"""References from earlier batches: the cross-batch memory.

A batch has few hard negatives; the embeddings of earlier batches are many more, and a
network that learns slowly would embed their images today much as it did then. The last
of them are kept in a ring, and go with the batch as its `references`:

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

Shapes never change, so that nothing is compiled again as the memory fills. Pushing
copies the memory unless it is given away: inside a step that is jitted with
``donate_argnames``, or by ``jax.jit(tj.memory.push, donate_argnums=0)``, it is written
in place.
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
    """A ring of embeddings with their labels.

    Attributes:
        embeddings: ``[size, d]``.
        labels: integers ``[size, ...]``.
        valid: bool ``[size]``, which slots are filled.
        position: int32, the slot that is written next.
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
    """An empty memory.

    Memory: O(size d).

    Args:
        size: how many embeddings it keeps.
        dim: the dimensions of an embedding.
        dtype: of the embeddings; bfloat16 takes half the memory of float32. Numbers
            beyond its range, which for float16 ends at 65,504, become its largest.
        label_dtype: of the labels; as a rule int32, or int64 under jax_enable_x64.
        label_shape: of one label, where it is not a number, such as tags ``(k,)``.

    Returns:
        A `Memory`.

    Raises:
        TypeError: if a size is no integer, or a dtype is not of its kind.
        ValueError: if a size is not positive.

    >>> import tripletjax as tj
    >>> memory = tj.memory.create(1024, 128)
    >>> print(memory.embeddings.shape, memory.valid.any())
    (1024, 128) False
    """
    size, dim = as_integer("size", size), as_integer("dim", dim)
    for name, value in (("size", size), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value, wanted, told in (
        ("dtype", dtype, jnp.floating, "a floating dtype"),
        ("label_dtype", label_dtype, jnp.integer, "an integer dtype"),
    ):
        if not jnp.issubdtype(jnp.dtype(value), wanted):
            raise TypeError(f"{name} must be {told}, got {value!r}.")
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
    """Writes a batch over the oldest embeddings.

    Of a batch that is larger than the memory, the last are kept. What is kept has no
    gradient.

    Memory: O(n d), beside the copy.

    Args:
        memory: as `create` made it.
        embeddings: vectors ``[n, d]``.
        labels: integers ``[n, ...]``.
        where: bool ``[n]``, False for what is not to be written, as padding.

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
    # Of what would be written twice, the last is.
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
    """A batch followed by a memory, as what its anchors are compared with.

    They are options of every blockwise loss and miner, of retrieval and verification;
    for a distance matrix, `references` go to the metric and the rest to the loss. No
    anchor is its own positive.

    Memory: O((n + size) d).

    Args:
        memory: of earlier batches.
        embeddings: vectors ``[n, d]`` of the batch, through which gradients go.
        labels: integers ``[n, ...]``.
        where: bool ``[n]``, False for padding.
        axis_name: inside ``jax.shard_map``, the mesh axes over which batch and memory
            are split: each device has a memory of its own part.

    Returns:
        `references` ``[n + size, d]``, in the dtype of the embeddings,
        `reference_labels`, `reference_where` and `positions`.

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
    """Finite numbers that a dtype cannot hold, as its largest; others as they are."""
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
            f"labels are {labels.dtype} and would not fit into those of memory, "
            f"{memory.labels.dtype}: create it with label_dtype."
        )
    if where is not None:
        where = per_item("where", where, len(x), "embeddings", jnp.bool_)
    return x, labels, where
