"""Metrics, as matrices and pair by pair.

A `Metric` is called on two sets of vectors for all their distances, and its `paired`
method compares vectors row by row:

>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
>>> print(tj.euclidean(x))
[[0.        5.        1.       ]
 [5.        0.        4.2426405]
 [1.        4.2426405 0.       ]]
>>> print(tj.euclidean.paired(x[:2], x[1:]))
[5.        4.2426405]

Matrices of metrics with an inner-product form cost one matrix product at full
precision. That form has no digits left where two vectors are much closer to each other
than to the origin (in float32, nearer than about 3e-4 of their norm). `paired` takes
the difference and keeps all digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tripletjax._api import jitted
from tripletjax._closures import canonical


class Metric:
    """A distance between vectors.

    `metric(x, y)` is the matrix of all distances between two sets of vectors,
    `metric(x)` the one within a set, with an exactly zero diagonal, and
    `metric.paired(a, b)` compares row by row. Leading dimensions are batch dimensions;
    float16 and bfloat16 vectors are computed and returned in float32.

    Every vector must be finite, padding too (a NaN in one row of a matrix product
    reaches the gradients of all rows), and so must be its squared norm.

    Metrics made from the same functions are equal and hash alike, so that they can be
    static arguments of jitted code.

    Memory: O(n m) for a matrix, O(n d) pair by pair.

    Args:
        paired: any function of two vectors ``[d], [d] -> scalar``. Its value is used
            as it is; where two different items may coincide, its gradient there must
            be finite (as that of `tripletjax.euclidean.paired` is, and that of
            ``jnp.linalg.norm(a - b)`` is not).
        matrix: optionally a faster way to all distances at once,
            ``[n, d], [m, d] -> [n, m]``.

    Raises:
        TypeError: if a function is not callable.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> chebyshev = tj.Metric(paired=lambda a, b: jnp.max(jnp.abs(a - b)))
    >>> print(chebyshev(jnp.array([[0.0, 0.0], [3.0, 4.0]])))
    [[0. 4.]
     [4. 0.]]
    """

    def __init__(
        self,
        paired: Callable[[Array, Array], Array],
        *,
        matrix: Callable[[Array, Array], Array] | None = None,
    ):
        for name, function in (("paired", paired), ("matrix", matrix)):
            if not callable(function) and not (name == "matrix" and function is None):
                raise TypeError(f"{name} must be callable, got {function!r}.")
        self._functions = canonical(paired), canonical(matrix)
        self._products: InnerProductForm | None = None

    @property
    def products(self) -> "InnerProductForm | None":
        """The inner-product form of the metric, or None."""
        return self._products

    @property
    def inner_products(self) -> "InnerProductForm":
        """The inner-product form of a metric that must have one."""
        if self._products is None:
            raise TypeError(f"metric must be made of inner products, got {self!r}.")
        return self._products

    def __call__(self, x: ArrayLike, y: ArrayLike | None = None) -> Array:
        """All distances between two sets of vectors, or within one.

        Args:
            x: vectors ``[..., n, d]``.
            y: vectors ``[..., m, d]``; `x` itself if not given.

        Returns:
            Distances ``[..., n, m]``. If `y` is not given the diagonal is exactly 0,
            and so is its gradient.

        Raises:
            TypeError: if an argument is complex.
            ValueError: if an argument has fewer than two dimensions or no vector, or
                the two do not fit together.
        """
        return _matrix(x, y, metric=self)

    def paired(self, a: ArrayLike, b: ArrayLike) -> Array:
        """The distance between each vector of `a` and its partner in `b`.

        Args:
            a: vectors ``[..., d]``.
            b: vectors of the same shape.

        Returns:
            Distances ``[...]``.

        Raises:
            TypeError: if an argument is complex.
            ValueError: if the shapes differ.
        """
        return _paired(a, b, metric=self)

    def _matrix_checked(self, x: Array, y: Array, own_index: Array) -> Array:
        """Distances ``[n, m]`` of checked vectors ``[n, d]`` and ``[m, d]``.

        `own_index` ``[n]`` is the index of each x among y, or -1. The distance there is
        0, and so is its gradient.
        """
        matrix = self._functions[1]
        if matrix is None:
            return _every_pair(self._compare, x, y, own_index)
        return jnp.where(jnp.arange(len(y)) == own_index[:, None], 0, matrix(x, y))

    def _paired_checked(self, a: Array, b: Array) -> Array:
        """Distances of checked vectors, pair by pair, from their differences.

        Without an inner-product form they are two vectors ``[d]``. With one they are
        the results of `InnerProductForm.vectors`, ``[..., d]``.
        """
        if self.products is None:
            return self._compare(a, b)
        return self.products.distance(self.products.half_square(a, b))

    def _compare(self, a: Array, b: Array) -> Array:
        distance = self._functions[0](a, b)
        if jnp.shape(distance) != ():
            raise ValueError(
                f"paired must return a scalar for two vectors of shape {a.shape}, got "
                f"shape {jnp.shape(distance)}."
            )
        return distance

    def __eq__(self, other: object) -> bool:
        # Every call of a jitted function compares its static arguments.
        if self is other:
            return True
        return isinstance(other, Metric) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._functions[0])

    def _parts(self) -> tuple:
        return *self._functions, self._products

    def __repr__(self) -> str:
        name = getattr(self._functions[0], "__name__", repr(self._functions[0]))
        return f"Metric({name.strip('_')})"


@jitted(callables=("metric",))
def _paired(a: ArrayLike, b: ArrayLike, *, metric: Metric) -> Array:
    a, b = as_vectors(("a", a), ("b", b), rank=1)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {a.shape} and {b.shape}.")
    return jnp.vectorize(metric._compare, signature="(d),(d)->()")(a, b)


@jitted(callables=("metric",), optional=("y",))
def _matrix(x: ArrayLike, y: ArrayLike | None, *, metric: Metric) -> Array:
    same = y is None
    x, y = as_vectors(("x", x), ("y", x if same else y), rank=2)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must have vectors of one length, got {x.shape} and {y.shape}."
        )
    try:
        jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError:
        raise ValueError(
            f"x and y must have matching batch dimensions, got {x.shape} and {y.shape}."
        ) from None
    own_index = jnp.arange(x.shape[-2]) if same else jnp.full(x.shape[-2], -1)
    matrix = jnp.vectorize(metric._matrix_checked, signature="(n,d),(m,d),(n)->(n,m)")
    return matrix(x, y, own_index)


def _every_pair(
    paired: Callable[[Array, Array], Array], x: Array, y: Array, own_index: Array
) -> Array:
    """The matrix of any metric, a few rows at a time: O(n m + (n + m) d) memory."""

    # A vector is not compared with itself: many distances have no gradient there.
    @jax.checkpoint
    def compare(is_own: Array, a: Array, b: Array) -> Array:
        distance = paired(a, jnp.where(is_own, a + 1, b))
        return jnp.where(is_own, 0, distance)

    def row(index_and_a: tuple[Array, Array]) -> Array:
        index, a = index_and_a
        return jax.vmap(compare, in_axes=(0, None, 0))(
            jnp.arange(len(y)) == index, a, y
        )

    rows = max(1, min(len(x), 2**20 // y.size))
    return jax.lax.map(row, (own_index, x), batch_size=rows)


@jitted()
def normalize(x: ArrayLike) -> Array:
    r"""Scale vectors to unit norm.

    $$x / \lVert x \rVert_2$$

    A zero vector stays zero, and its gradient is 0. The squares of very large and very
    small numbers neither overflow nor vanish.

    Memory: O(n d).

    Args:
        x: vectors ``[..., d]``, finite. float16 and bfloat16 vectors are computed and
            returned in float32.

    Returns:
        Vectors of the same shape.

    Raises:
        TypeError: if `x` is complex.
        ValueError: if `x` is a scalar or empty.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> print(tj.normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    [[0.6 0.8]
     [0.  0. ]]
    """
    (x,) = as_vectors(("x", x), rank=1)
    return _direction(x)


def as_vectors(*named: tuple[str, ArrayLike], rank: int) -> list[Array]:
    """Check ranks and dtypes; at least float32, and one dtype for all."""
    arrays = []
    for name, array in named:
        array = jnp.asarray(array)
        if array.ndim < rank:
            shape = "[..., n, d]" if rank == 2 else "[..., d]"
            raise ValueError(f"{name} must be {shape}, got shape {array.shape}.")
        if array.size == 0:
            raise ValueError(f"{name} is empty: it has shape {array.shape}.")
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{name} must be real, got dtype {array.dtype}.")
        arrays.append(array)
    dtype = jnp.result_type(*arrays, jnp.float32)
    return [array.astype(dtype) for array in arrays]


def _safe_sqrt(x: Array) -> Array:
    """The square root, with gradient 0 at 0 instead of infinity."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


class InnerProductForm(NamedTuple):
    """A metric as a function of half the squared difference of two vectors.

    Attributes:
        vectors: a function from vectors ``[..., d]`` to those of the inner products.
        self_term: a function from these to a term that each of the two vectors adds to
            half their squared difference.
        distance: a function from half the squared difference to the distance.
    """

    vectors: Callable[[Array], Array]
    self_term: Callable[[Array], Array]
    distance: Callable[[Array], Array]

    def metric(self, name: str) -> Metric:
        """The metric of two sets of vectors, in both forms."""

        def paired(a: Array, b: Array) -> Array:
            return self.distance(self.half_square(self.vectors(a), self.vectors(b)))

        def matrix(x: Array, y: Array) -> Array:
            return self.matrix(self.vectors(x), self.vectors(y))

        paired.__name__ = name
        metric = Metric(paired, matrix=matrix)
        metric._products = self
        return metric

    def matrix(self, x: Array, y: Array) -> Array:
        """All distances of results of `vectors`, ``[n, d]`` and ``[m, d]``."""
        offset = common_offset(x)
        halves = self.halves(x, offset)[:, None] + self.halves(y, offset)
        products = jnp.matmul(x - offset, (y - offset).T, precision="highest")
        squares = halves - products
        # Not jnp.maximum, whose gradient at a tie is a half.
        return self.distance(jnp.where(squares < 0, 0, squares))

    def half_square(self, a: Array, b: Array) -> Array:
        """Half the squared difference of each pair, from the difference."""
        own = self.self_term(a) + self.self_term(b)
        return 0.5 * jnp.sum(jnp.square(a - b), axis=-1) + own

    def halves(self, x: Array, offset: Array) -> Array:
        """The terms of each vector: their sum less the product is the half square."""
        return 0.5 * jnp.sum(jnp.square(x - offset), axis=-1) + self.self_term(x)


def common_offset(x: Array) -> Array:
    """The mean vector, rounded, where it exceeds four standard deviations; else 0.

    Rounding errors of inner products grow with the norms, while distances do not depend
    on the origin: subtract the offset first. It has few digits, so that vectors of
    small integers, and ties between their distances, stay exact.
    """
    x = jax.lax.stop_gradient(x)
    mean, squares = jnp.mean(x, axis=0), jnp.mean(x * x, axis=0)
    rounded = jax.lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=7)
    # The mean is over four standard deviations.
    common = mean * mean > 16 / 17 * squares
    return jnp.where(common & jnp.isfinite(squares), rounded, 0)


def _direction(x: Array) -> Array:
    """The unit vector along `x`; a zero vector stays zero, with gradient 0."""
    # Scaled first, for the squares of tiny and of huge vectors to be finite.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest < jnp.finfo(x.dtype).tiny, jnp.inf, largest)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squared == 0, 1, squared))


def identity(x: Array) -> Array:
    return x


def _nothing(x: Array) -> Array:
    return jnp.zeros_like(x[..., 0])


def _half_if_zero(x: Array) -> Array:
    # 1 - 0 is half of |a|^2 + |b|^2: a zero vector lacks its part.
    return jnp.where(jnp.max(jnp.abs(x), axis=-1) == 0, 0.5, 0).astype(x.dtype)


def _manhattan(a: Array, b: Array) -> Array:
    difference = a - b
    # The gradient of jnp.abs at 0 is 1.
    return jnp.sum(jnp.where(difference == 0, 0, jnp.abs(difference)), axis=-1)


euclidean = InnerProductForm(
    identity, _nothing, lambda half: _safe_sqrt(2 * half)
).metric("euclidean")
euclidean.__doc__ = r"""The Euclidean distance, $\lVert x - y \rVert_2$.

Its gradient at distance 0 is 0."""

squared_euclidean = InnerProductForm(identity, _nothing, lambda half: 2 * half).metric(
    "squared_euclidean"
)
squared_euclidean.__doc__ = r"""The squared Euclidean distance,
$\lVert x - y \rVert_2^2$: FaceNet's."""

cosine = InnerProductForm(_direction, _half_if_zero, lambda half: half).metric("cosine")
cosine.__doc__ = r"""The cosine distance,
$1 - x \cdot y / (\lVert x \rVert \lVert y \rVert)$, between 0 and 2.

A zero vector has no direction: its similarity to anything is 0, its distance 1."""

manhattan = Metric(_manhattan)
manhattan.__doc__ = r"""The Manhattan distance, $\lVert x - y \rVert_1$."""
