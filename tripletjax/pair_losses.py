r"""Losses of two general shapes, for every loss of pairs that is not a triplet loss.

- *Log-sum-exp*: an anchor's loss is a function of its positives' distances and of the
  log-sum-exp of its negatives' logits. `log_sum_exp_loss` is the general form, and
  `tripletjax.softmax_losses` has the named losses.
- *Separable*: an anchor's loss is a sum over positives and a sum over negatives.
  `separable_loss` is the general form, and `tripletjax.separable_losses` has the named
  losses.

Each loss has two forms: of distances, and of embeddings in `tripletjax.blockwise`.

>>> import jax.numpy as jnp
>>> import tripletjax as tj
>>> x = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
>>> labels = jnp.array([0, 0, 1, 1])
>>> print(f"{tj.supcon_loss(tj.cosine(x), labels, temperature=0.5):.4f}")
0.8707
>>> print(f"{tj.blockwise.supcon_loss(x, labels, temperature=0.5):.4f}")
0.8707
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tripletjax._api import (
    check_finite,
    check_nonnegative,
    check_positive,
    check_real,
    jitted,
)
from tripletjax._closures import canonical
from tripletjax._matrices import as_distances, check_not_embeddings, values_at_hand
from tripletjax.losses import (
    Reduction,
    SumReduction,
    TripletTerms,
    check_elementwise,
    mean_active,
    mean_valid,
    reduced,
)
from tripletjax.pairs import PairMasks, masks_for

P = ParamSpec("P")
R = TypeVar("R")

# Raises for a wrong value of a named argument.
Check = Callable[[str, Any], None]
# A pytree of arrays with gradients, such as a temperature.
Parameters = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["name"]
)
@dataclasses.dataclass(frozen=True)
class PerAnchor:
    """A parameter with a value for each anchor, among those of a separable loss.

    Attributes:
        values: ``[..., n]``.
        name: the argument.
    """

    values: Any
    name: str


def is_per_anchor(x: Any) -> bool:
    """Whether a part of parameters is a `PerAnchor`."""
    return isinstance(x, PerAnchor)


def at_anchors(
    parameters: Parameters, function: Callable[[Any], Any], *, keep: bool = False
) -> Parameters:
    """Parameters with a function of each array ``[..., n]`` of anchors in its place.

    With `keep`, the results are values of anchors as well.
    """

    def of(x: Any) -> Any:
        if not is_per_anchor(x):
            return x
        values = function(x.values)
        return PerAnchor(values, x.name) if keep else values

    return jax.tree.map(of, parameters, is_leaf=is_per_anchor)


class AnchorPairs(NamedTuple):
    """The pairs of each anchor, as the cost of a log-sum-exp loss takes them.

    Attributes:
        distances: distances of the positives ``[..., n, k]``, 0 where there is none.
        exists: which of the positives exist, bool ``[..., n, k]``.
        negatives: log-sum-exp of the logits of the negatives ``[..., n]``, minus
            infinity without a negative.
        nearest: distance of the nearest negative ``[..., n]``, infinite without a
            negative; it has no gradient.
        has_negative: bool ``[..., n]``, also True if `limits` leave out all negatives.
    """

    distances: Array
    exists: Array
    negatives: Array
    nearest: Array
    has_negative: Array

    @property
    def has_positive(self) -> Array:
        """Whether each anchor has a positive, bool ``[..., n]``."""
        return jnp.any(self.exists, axis=-1)

    def terms(self, total: Array, valid: Array) -> TripletTerms:
        """The terms of costs, and of counts that a mean divides by.

        ``active`` is ``valid`` for anchors whose nearest reference is a positive.
        """
        nearest = jnp.min(jnp.where(self.exists, self.distances, jnp.inf), axis=-1)
        correct = self.has_positive & (nearest < self.nearest)
        valid = valid.astype(total.dtype)
        return TripletTerms(total, valid * correct, valid)


class PairTerms(NamedTuple):
    """Sums of positives and of negatives per anchor, which add up over blocks.

    Sums of devices and of steps add up as well.

    Attributes:
        positives: summed costs of positive pairs, number of those with a positive cost,
            and number of all, each ``[..., n]``.
        negatives: the same of negative pairs.
        anchors: 1 for anchors that have a pair, else 0, ``[..., n]``.
    """

    positives: TripletTerms
    negatives: TripletTerms
    anchors: Array

    @property
    def total(self) -> Array:
        """Summed cost of all pairs."""
        return self.positives.total + self.negatives.total

    @property
    def active(self) -> Array:
        """Number of pairs with a positive cost."""
        return self.positives.active + self.negatives.active

    @property
    def valid(self) -> Array:
        """Number of pairs."""
        return self.positives.valid + self.negatives.valid


def _checked(terms: PairTerms) -> PairTerms:
    if not isinstance(terms, PairTerms):
        raise TypeError(
            f"terms must be PairTerms, got {type(terms).__name__}; use "
            "tripletjax.mean_valid or tripletjax.mean_active."
        )
    return terms


# The docstrings of these functions are those of the public reductions.


def _mean_of_anchors(sums: PairTerms) -> Array:
    r"""Summed cost of all pairs over the number of anchors, 0 without an anchor.

    Memory: O(1).

    Args:
        terms: `PairTerms` ``[..., n]``.

    Returns:
        The mean over the last axis, ``[...]``.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x, labels = jnp.array([[0.0], [1.0], [3.0]]), jnp.array([0, 0, 1])
    >>> terms = tj.contrastive_loss(tj.euclidean(x), labels, reduce_fn=None)
    >>> print(f"{tj.mean_of_anchors(terms):.4f}")
    0.6667
    """
    return _checked(sums).total / jnp.maximum(sums.anchors, 1)


def _mean_active_by_side(sums: PairTerms) -> Array:
    r"""Mean cost of positives plus mean cost of negatives, of pairs with a cost.

    Memory: O(1).

    Args:
        terms: `PairTerms` ``[..., n]``.

    Returns:
        The sum of both means over the last axis, ``[...]``.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x, labels = jnp.array([[0.0], [1.0], [1.5]]), jnp.array([0, 0, 1])
    >>> terms = tj.contrastive_loss(tj.euclidean(x), labels, reduce_fn=None)
    >>> print(tj.mean_active_by_side(terms))
    1.5
    """
    positives, negatives, _ = _checked(sums)
    return mean_active.of_sums(positives) + mean_active.of_sums(negatives)


def _mean_valid_by_side(sums: PairTerms) -> Array:
    r"""Mean cost of positives plus mean cost of negatives, of all that are valid.

    Memory: O(1).

    Args:
        terms: `PairTerms` ``[..., n]``.

    Returns:
        The sum of both means over the last axis, ``[...]``.

    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> x, labels = jnp.array([[0.0], [1.0], [1.5]]), jnp.array([0, 0, 1])
    >>> terms = tj.contrastive_loss(tj.euclidean(x), labels, reduce_fn=None)
    >>> print(tj.mean_valid_by_side(terms))
    1.25
    """
    positives, negatives, _ = _checked(sums)
    return mean_valid.of_sums(positives) + mean_valid.of_sums(negatives)


mean_of_anchors = SumReduction(_mean_of_anchors)
mean_active_by_side = SumReduction(_mean_active_by_side)
mean_valid_by_side = SumReduction(_mean_valid_by_side)


@dataclasses.dataclass(frozen=True)
class LogSumExp:
    """The shape of a log-sum-exp loss; static.

    Attributes:
        logit: elementwise ``(distances of negatives, parameters) -> logits``.
        cost: ``(AnchorPairs, parameters) -> terms`` ``[..., n]``.
        limits: None, or ``(distances of positives [..., n, k], which exist, parameters)
            -> (low, high)`` ``[..., n]``: negatives count from low on and below high.
            Limits have no gradient.
    """

    logit: Callable[[Array, Parameters], Array]
    cost: Callable[[AnchorPairs, Parameters], Any]
    limits: Callable[[Array, Array, Parameters], tuple[Array, Array]] | None = None

    def __post_init__(self) -> None:
        for name in ("logit", "cost", "limits"):
            object.__setattr__(self, name, canonical(getattr(self, name)))

    def limits_of(
        self, distances: Array, exists: Array, parameters: Parameters
    ) -> tuple[Array, Array] | None:
        """The limits of each anchor's negatives, or None."""
        if self.limits is None:
            return None
        limits = [*self.limits(*lax.stop_gradient((distances, exists, parameters)))]
        shapes, needed = [jnp.shape(x) for x in limits], exists.shape[:-1]
        if shapes != [needed] * 2:
            raise ValueError(
                f"limits must return low and high, each of shape {needed}, got shapes "
                f"{shapes}."
            )
        low, high = limits
        return low, high

    def logits_of(self, distances: Array, parameters: Parameters) -> Array:
        """The checked logits of negatives of any shape."""
        return _elementwise("logit", self.logit, distances, parameters)

    def terms_of(self, pairs: AnchorPairs, parameters: Parameters) -> Any:
        """The checked terms ``[..., n]`` of the pairs of each anchor, as floats."""
        shape, dtype = pairs.negatives.shape, pairs.negatives.dtype
        terms = self.cost(pairs, parameters)
        if terms is None:
            raise TypeError("cost must return terms of the anchors, got None.")
        for leaf in jax.tree.leaves(terms):
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"cost must return terms of shape {shape}, one per anchor, got "
                    f"shape {jnp.shape(leaf)}; sum over the last axis of the positives."
                )
        return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), terms)

    def terms(self, distances: Array, masks: PairMasks, parameters: Parameters) -> Any:
        """The terms ``[..., n]`` of a distance matrix ``[..., n, m]``."""
        positive, negative = masks
        d_ap = jnp.where(positive, distances, 0)
        kept = negative
        if (limits := self.limits_of(d_ap, positive, parameters)) is not None:
            low, high = (x[..., None] for x in limits)
            # A NaN stays, for the loss to show it.
            kept = kept & ~((distances < low) | (distances >= high))
        logits = self.logits_of(jnp.where(kept, distances, 0), parameters)
        nearest = jnp.min(jnp.where(kept, distances, jnp.inf), axis=-1)
        pairs = AnchorPairs(
            d_ap,
            positive,
            log_sum_exp(logits, kept),
            lax.stop_gradient(nearest),
            jnp.any(negative, axis=-1),
        )
        return self.terms_of(pairs, parameters)


@dataclasses.dataclass(frozen=True)
class Separable:
    """The shape of a separable loss; static.

    Attributes:
        positive_cost: elementwise ``(distances, parameters) -> costs`` of positives.
        negative_cost: the same of negatives.
    """

    positive_cost: Callable[[Array, Parameters], Array]
    negative_cost: Callable[[Array, Parameters], Array]

    def __post_init__(self) -> None:
        for name in ("positive_cost", "negative_cost"):
            object.__setattr__(self, name, canonical(getattr(self, name)))

    def positive_costs(self, distances: Array, parameters: Parameters) -> Array:
        """The checked costs of positives of any shape."""
        return _elementwise("positive_cost", self.positive_cost, distances, parameters)

    def negative_costs(self, distances: Array, parameters: Parameters) -> Array:
        """The checked costs of negatives of any shape."""
        return _elementwise("negative_cost", self.negative_cost, distances, parameters)

    def terms(self, distances: Array, masks: PairMasks, parameters: Parameters) -> Any:
        """The terms ``[..., n]`` of a distance matrix ``[..., n, m]``."""
        parameters = at_anchors(parameters, lambda x: x[..., None])
        functions = self.positive_costs, self.negative_costs
        positives, negatives = (
            sums_of_pairs(function, distances, mask, parameters)
            for function, mask in zip(functions, masks)
        )
        anchors = jnp.any(masks.positive | masks.negative, axis=-1)
        return PairTerms(positives, negatives, anchors.astype(distances.dtype))


class Shape(Protocol):
    """A shape of losses; static. `LogSumExp` and `Separable` are two."""

    def terms(self, distances: Array, masks: PairMasks, parameters: Parameters) -> Any:
        """The terms ``[..., n]`` of a distance matrix ``[..., n, m]``."""


def _elementwise(
    name: str,
    function: Callable[[Array, Parameters], Array],
    distances: Array,
    parameters: Parameters,
) -> Array:
    """The values of a user's function, in the shape and the dtype of the distances."""
    values = function(distances, parameters)
    check_elementwise(values, distances, name=name)
    return jnp.asarray(values).astype(distances.dtype)


def sums_of_pairs(
    function: Callable[[Array, Parameters], Array],
    distances: Array,
    mask: Array,
    parameters: Parameters,
) -> TripletTerms:
    """Sums over the last axis of the costs of some pairs."""
    costs = function(jnp.where(mask, distances, 0), parameters)
    costs = jnp.where(mask, costs, 0)
    terms = (costs, costs > 0, mask)
    return TripletTerms(*(jnp.sum(x, axis=-1, dtype=costs.dtype) for x in terms))


def log_sum_exp(logits: Array, mask: Array) -> Array:
    """Log-sum-exp over the last axis where a mask is True, minus infinity of nothing.

    The maximum is that of the mask, and gradients of the rest are 0.
    """
    empty = ~jnp.any(mask, axis=-1)
    largest = lax.stop_gradient(jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1))
    largest = jnp.where(empty, 0, largest)
    shifted = jnp.where(mask, logits - largest[..., None], 0)
    total = jnp.sum(jnp.where(mask, jnp.exp(shifted), 0), axis=-1)
    return jnp.where(empty, -jnp.inf, largest + jnp.log(jnp.where(empty, 1, total)))


class PairOptions(NamedTuple):
    """Arguments of `pair_masks` that every loss has, besides labels."""

    reference_labels: ArrayLike | None
    positions: ArrayLike | None
    where: ArrayLike | None
    reference_where: ArrayLike | None


class PairLoss(NamedTuple):
    """A loss with the values of its parameters.

    Attributes:
        shape: the shape; static.
        parameters: a pytree of numbers with gradients.
        needs_references: why `reference_labels` must be given, or None.
        symmetric: whether references are anchors as well.
        swapped: whether references are the anchors, and anchors their references.
    """

    shape: Shape
    parameters: Parameters = ()
    needs_references: str | None = None
    symmetric: bool = False
    swapped: bool = False

    def parameters_for(self, dtype: Any, anchors: tuple[int, ...]) -> Parameters:
        """The parameters as arrays of a dtype, for anchors of a shape ``[..., n]``."""

        def broadcast(x: PerAnchor) -> PerAnchor:
            try:
                return PerAnchor(jnp.broadcast_to(x.values, anchors), x.name)
            except ValueError:
                raise ValueError(
                    f"{x.name} must be a scalar or have one value for each anchor, got "
                    f"shape {jnp.shape(x.values)} for anchors of shape {anchors}."
                ) from None

        parameters = jax.tree.map(
            lambda x: broadcast(x) if is_per_anchor(x) else x,
            self.parameters,
            is_leaf=is_per_anchor,
        )
        return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), parameters)

    def check_pairs(self, labels: Any, pairs: PairOptions) -> None:
        """Raise for arguments of pairs that the loss cannot have."""
        by_labels = not isinstance(labels, PairMasks)
        missing = by_labels and pairs.reference_labels is None
        if self.needs_references is not None and missing:
            raise ValueError(
                f"reference_labels must be given: {self.needs_references}."
            )
        if (self.symmetric or self.swapped) and pairs.positions is not None:
            raise ValueError(
                "positions cannot be combined with anchors on both sides; use "
                "PairMasks as labels."
            )


class Definition(NamedTuple):
    """The parameters of a named loss, which both of its forms have.

    Attributes:
        checks: names of numeric parameters, and functions that raise for wrong values.
        callables, flags: names of static parameters.
        by_anchor: whether terms are those of the anchors, and never of references.
        of_anchors: names of parameters that may have a value for each anchor.
    """

    checks: dict[str, Check]
    callables: tuple[str, ...]
    flags: tuple[str, ...]
    by_anchor: bool
    of_anchors: tuple[str, ...]

    def jitted(
        self,
        function: Callable[P, R],
        *,
        check: Callable[..., None],
        callables: tuple[str, ...] = (),
        static: tuple[str, ...] = (),
    ) -> Callable[P, R]:
        """The public function of a form.

        Args:
            function: the form, with the arguments of the public function.
            check: raises for arguments whose values are known and wrong.
            callables, static: names of further static arguments of the form.
        """

        @functools.wraps(function)
        def of_scalars(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in self.checks:
                value: Any = kwargs.get(name)
                if self.checks[name] in (any_tree, check_finite_values):
                    continue
                if value is not None and jnp.ndim(value):
                    raise ValueError(
                        f"{name} must be a scalar, got shape {jnp.shape(value)}; use "
                        "jax.vmap to sweep over several."
                    )
            return function(*args, **kwargs)

        def check_all(*args: Any, **kwargs: Any) -> None:
            check(*args, **kwargs)
            for name in names(check_finite_values):
                if name in kwargs:
                    check_finite_values(name, kwargs[name])

        def names(of: Check) -> tuple[str, ...]:
            return tuple(name for name, check in self.checks.items() if check is of)

        return jitted(
            callables=(*self.callables, *callables, "reduce_fn"),
            flags=self.flags,
            static=static,
            nonnegative=names(check_nonnegative),
            positive=names(check_positive),
            finite=names(check_finite),
            optional=("reduce_fn",),
            check=check_all,
        )(of_scalars)


def check_finite_values(name: str, value: Any) -> None:
    """Raise for a scalar, or for an array at hand, with a NaN or an infinity."""
    if not jnp.ndim(value):
        check_finite(name, value)
        return
    check_real(name, value)
    values = values_at_hand(value)
    if values is not None and not np.isfinite(values.astype(float)).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values.")


def any_tree(name: str, value: Any) -> None:
    """The check of parameters that may be any pytree of numbers."""


# The definition of each loss of distances, for its form of embeddings.
DEFINITIONS: dict[Callable, Definition] = {}


def pair_loss(
    *,
    positive: tuple[str, ...] = (),
    nonnegative: tuple[str, ...] = (),
    finite: tuple[str, ...] = (),
    of_anchors: tuple[str, ...] = (),
    trees: tuple[str, ...] = (),
    callables: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    by_anchor: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Define a loss of distances: check and jit the function that it decorates.

    Args:
        positive, nonnegative, finite: names of numeric parameters, which may be
            traced and have gradients. Known values must be finite.
        of_anchors: names of such parameters that may have a value for each anchor.
        trees: names of pytrees of such parameters, whose values nothing checks.
        callables, flags: names of static parameters.
        by_anchor: whether terms are those of the anchors, and never of references.
    """
    checks: dict[str, Check] = dict.fromkeys(positive, check_positive)
    checks |= dict.fromkeys(nonnegative, check_nonnegative)
    checks |= dict.fromkeys(finite, check_finite)
    checks |= dict.fromkeys(of_anchors, check_finite_values)
    checks |= dict.fromkeys(trees, any_tree)
    definition = Definition(checks, callables, flags, by_anchor, of_anchors)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        public = definition.jitted(function, check=check_not_embeddings)
        DEFINITIONS[public] = definition
        return public

    return decorate


def of_distances(
    loss: PairLoss,
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    pairs: PairOptions,
    reduce_fn: Reduction | None,
) -> Any:
    """The reduced terms of a loss of a distance matrix ``[..., n, m]``."""
    distances = as_distances(distances)
    loss.check_pairs(labels, pairs)
    parameters = loss.parameters_for(distances.dtype, distances.shape[:-1])
    masks = masks_for(distances, labels, **pairs._asdict())
    swap = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731
    sides = [] if loss.swapped else [(distances, masks)]
    if loss.symmetric or loss.swapped:
        sides.append((swap(distances), PairMasks(*map(swap, masks))))
    terms = [loss.shape.terms(*side, parameters) for side in sides]
    return reduced(both_sides(*terms), reduce_fn)


def both_sides(*terms: Any) -> Any:
    """Terms of anchors, followed by those of references that are anchors as well."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *terms)


@pair_loss(callables=("logit", "cost", "limits"), trees=("parameters",))
def log_sum_exp_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    logit: Callable[[Array, Parameters], Array],
    cost: Callable[[AnchorPairs, Parameters], Any],
    limits: Callable[[Array, Array, Parameters], tuple[Array, Array]] | None = None,
    parameters: Parameters = (),
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_valid,
) -> Any:
    r"""Any loss of positives' distances and the log-sum-exp of negatives' logits.

    $$\ell_a = f\Bigl((d_{ap})_{p \in P_a}, \log \sum_{n \in N_a} e^{g(d_{an})}\Bigr)$$

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        logit: g, elementwise ``(distances, parameters) -> logits``.
        cost: f, ``(AnchorPairs, parameters) -> terms``, such as
            ``pairs.terms(total, valid)``. It must return zeros for anchors without
            pairs.
        limits: None, or ``(distances of positives, which exist, parameters) -> (low,
            high)``. Only negatives from low on and below high count, without a
            gradient of the limits.
        parameters: a pytree of numbers with gradients, such as a temperature. Functions
            must not close over traced arrays.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the summed cost over ``valid``, ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit.

    Requirements:
        The batch of the loss that you define. Without a negative, ``pairs.negatives``
        is minus infinity.

    Settings:
        The settings of the named losses are on their pages.

    Relations:
        All losses of `tripletjax.softmax_losses` have this form, such as `supcon_loss`,
        `circle_loss` and `arcface_loss`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> def cost(pairs, temperature):  # N-pair loss of each positive
    ...     loss = jax.nn.softplus(
    ...         pairs.negatives[..., None] + pairs.distances / temperature)
    ...     total = jnp.sum(jnp.where(pairs.exists, loss, 0), axis=-1)
    ...     return pairs.terms(total, jnp.sum(pairs.exists, axis=-1))
    >>> d = jnp.array([[0.0, 0.1, 0.5], [0.1, 0.0, 0.4], [0.5, 0.4, 0.0]])
    >>> loss = tj.log_sum_exp_loss(
    ...     d, jnp.array([0, 0, 1]), logit=lambda d, t: -d / t, cost=cost,
    ...     parameters=0.1)
    >>> print(f"{loss:.4f}")
    0.0334
    """
    loss = PairLoss(LogSumExp(logit, cost, limits), parameters)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)


@pair_loss(callables=("positive_cost", "negative_cost"), trees=("parameters",))
def separable_loss(
    distances: ArrayLike,
    labels: ArrayLike | PairMasks,
    *,
    positive_cost: Callable[[Array, Parameters], Array],
    negative_cost: Callable[[Array, Parameters], Array],
    parameters: Parameters = (),
    reference_labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
    reduce_fn: Reduction | None = mean_of_anchors,
) -> Any:
    r"""Any sum of costs of positive pairs and of costs of negative pairs.

    $$\ell_a = \sum_{p \in P_a} f(d_{ap}) + \sum_{n \in N_a} g(d_{an})$$

    Memory: O(n m), at most 6 times the size of the distances.

    Args:
        distances: ``[..., n, m]``.
        labels: integers ``[..., n]``, or `PairMasks`.
        positive_cost: f, elementwise ``(distances, parameters) -> costs``.
        negative_cost: g, likewise.
        parameters: a pytree of numbers with gradients, such as a margin. Functions must
            not close over traced arrays.
        reference_labels, positions, where, reference_where: as in `pair_masks`.
        reduce_fn: from the terms ``[..., n]`` to the result; None returns the
            terms.

    Returns:
        With the default `reduce_fn` the summed cost over the number of anchors,
        ``[...]``.

    Raises:
        TypeError: if an argument has the wrong dtype or is not callable.
        ValueError: if shapes do not fit.

    Requirements:
        The batch of the loss that you define. Positives alone collapse the embedding.

    Settings:
        The settings of the named losses are on their pages.

    Relations:
        `contrastive_loss`, `margin_loss` and `sigmoid_loss` have this form.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import tripletjax as tj
    >>> d = jnp.array([[0.0, 0.1, 0.5], [0.1, 0.0, 0.4], [0.5, 0.4, 0.0]])
    >>> loss = tj.separable_loss(
    ...     d, jnp.array([0, 0, 1]), parameters=1.0,
    ...     positive_cost=lambda d, margin: d**2,
    ...     negative_cost=lambda d, margin: jax.nn.relu(margin - d) ** 2)
    >>> print(f"{loss:.4f}")
    0.4133
    """
    loss = PairLoss(Separable(positive_cost, negative_cost), parameters)
    pairs = PairOptions(reference_labels, positions, where, reference_where)
    return of_distances(loss, distances, labels, pairs, reduce_fn)
