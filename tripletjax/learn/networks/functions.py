"""Models of other libraries, and plain functions, as models of `fit`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class FunctionModel(nnx.Module):
    """A function of parameters and inputs as a model.

    Args:
        function: from parameters and inputs to embeddings ``[n, d]``. It must be
            hashable, and is compiled again for each other function.
        params: any pytree of arrays.

    Attributes:
        function: as given.
    """

    def __init__(self, function: Callable[[Any, Any], Array], params: Any):
        arrays, self._treedef = jax.tree.flatten(params)
        self._arrays = nnx.List([nnx.Param(jnp.asarray(x)) for x in arrays])
        self.function = function

    @property
    def params(self) -> Any:
        """The parameters, in the structure that they were given in."""
        arrays = [param.get_value() for param in self._arrays]
        return jax.tree.unflatten(self._treedef, arrays)

    def __call__(self, inputs: Any) -> Array:
        return self.function(self.params, inputs)


def as_model(function: Callable[[Any, Any], Array], params: Any) -> FunctionModel:
    """Make a model for `fit` of a function of parameters and inputs.

    Args:
        function: from parameters and inputs to embeddings ``[n, d]``, such as the
            ``apply`` of a Linen module.
        params: any pytree of float arrays, all of which are trained.

    Returns:
        The model. After the training its attribute ``params`` has the trained arrays,
        in the structure of `params`.

    Raises:
        TypeError: if a parameter is no array of floats.

    >>> import jax.numpy as jnp
    >>> from tripletjax import learn
    >>> model = learn.as_model(lambda params, x: x @ params["w"], {"w": jnp.eye(2)})
    >>> print(model(jnp.ones((1, 2))), model.params)
    [[1. 1.]] {'w': Array([[1., 0.],
           [0., 1.]], dtype=float32)}
    """
    for path, x in jax.tree.leaves_with_path(params):
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params must be arrays of floats, got {type(x).__name__} of dtype "
                f"{dtype} at {jax.tree_util.keystr(path) or 'the top'}."
            )
    return FunctionModel(function, params)
