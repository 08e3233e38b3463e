"""A network that begins with what another has learnt: a backbone and a head.

What of it is trained is one of three: ``frozen``, the head alone, on features that are
kept; ``top``, the backbone's last stages, too, at a lower rate; ``all``, all of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from tripletjax.learn.networks.embedding_networks import Standardized
from tripletjax.learn.networks.layers import unit_norm
from tripletjax.learn.networks.weights import Frozen


class FeatureStat(nnx.Variable):
    """How features are spread, from before training."""


class Head(nnx.Module):
    """From features of a backbone to unit vectors.

    Features are standardised by what `fit` has seen of them; then one linear layer, or
    two with a ReLU between.

    Args:
        features: how many there are.
        dim: number of dimensions of the embedding.
        hidden: of the first of two layers; 0 for one layer.
        mirror: whether, after training, an embedding is the mean of an image's and its
            mirror image's.
        rngs: Flax random number streams, with ``params``.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        hidden: int = 0,
        mirror: bool = False,
        rngs: nnx.Rngs,
    ):
        self.mean = FeatureStat(jnp.zeros(features))
        self.scale = FeatureStat(jnp.ones(features))
        self.hidden = nnx.Linear(features, hidden, rngs=rngs) if hidden else None
        self.out = nnx.Linear(hidden or features, dim, rngs=rngs)
        self.mirror = mirror

    def fit(self, features: np.ndarray) -> None:
        """Notes how features ``[n, f]`` are spread.

        A head of one layer begins with the directions in which they vary most, so that
        its embedding is about as good as they are.
        """
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        # One that hardly varies tells nothing, and is not blown up.
        scale = 1 / np.maximum(deviation, 0.1 * deviation.mean() + 1e-6)
        self.mean[...] = jnp.asarray(mean, jnp.float32)
        self.scale[...] = jnp.asarray(scale, jnp.float32)
        if self.hidden is None:
            kernel = self.out.kernel
            _, _, directions = np.linalg.svd(
                (features - mean) * scale, full_matrices=False
            )
            some = directions[: kernel.shape[1]].T
            # Its first dimensions; others stay as they were drawn.
            drawn = np.array(kernel[...])
            drawn[:, : some.shape[1]] = some
            kernel[...] = jnp.asarray(drawn)

    def __call__(self, features: Array) -> Array:
        """Unit vectors ``[n, dim]`` of features ``[n, f]``.

        Or of kept ones ``[n, views, f]``: of the image itself, and of its mirror image
        if that counts.
        """
        if features.ndim == 2:
            return self._embed(features)
        x = self._embed(features[:, : 1 + self.mirror])
        return unit_norm(x.sum(axis=1))

    def _embed(self, features: Array) -> Array:
        x = (features.astype(jnp.float32) - self.mean[...]) * self.scale[...]
        if self.hidden is not None:
            x = jax.nn.relu(self.hidden(x))
        return unit_norm(self.out(x))


class BackboneEmbedder(nnx.Module):
    """A backbone with a head on it: from images to unit vectors."""

    def __init__(self, backbone: nnx.Module, head: Head):
        self.backbone, self.head = backbone, head

    def __call__(self, images: Array) -> Array:
        """Unit vectors ``[n, dim]`` of images ``[n, height, width, 3]``."""
        features: Callable[[Array], Array] = self.backbone
        return self.head(features(images))


class Features(nnx.Module):
    """The unit vectors of a backbone's features alone, before anything is learnt."""

    def __init__(self, backbone: nnx.Module):
        self.backbone = backbone

    def __call__(self, images: Array) -> Array:
        features: Callable[[Array], Array] = self.backbone
        return unit_norm(features(images))


class MeanDirection(nnx.Module):
    """The same of features that are kept, ``[n, views, f]``."""

    def __init__(self, views: int):
        self.views = views

    def __call__(self, features: Array) -> Array:
        return unit_norm(unit_norm(features[:, : self.views]).sum(axis=1))


def freeze(backbone: nnx.Module, training: str) -> None:
    """Makes the parameters that are not to be trained `Frozen`."""
    top: tuple[str, ...] = getattr(backbone, "top", ()) if training == "top" else ()
    for path, module in nnx.iter_modules(backbone):
        for name, value in list(vars(module).items()):
            full_name = ".".join(map(str, (*path, name)))
            is_top = any(f"{full_name}.".startswith(f"{one}.") for one in top)
            if type(value) is nnx.Param and not is_top:
                setattr(module, name, Frozen(value[...]))


def trained_part(model: Standardized, training: str | None) -> nnx.Module:
    """What of a model is trained, and kept with the run: the head, or all of it."""
    whole: Any = model.model
    return whole.head if training == "frozen" else model


def backbone_of(model: Standardized) -> nnx.Module:
    whole: Any = model.model
    return whole.backbone


def features_of(model: Standardized) -> Standardized:
    """A model from images to the features of its backbone."""
    made = Standardized(backbone_of(model), model.mean, model.std)
    made.eval()
    return made
