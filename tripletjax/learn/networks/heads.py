"""Pretrained networks in training: a backbone and a head on its features.

The trained part is one of three. ``frozen`` is the head alone, on cached features.
``top`` adds the last stages of the backbone, at a lower learning rate. ``all`` is the
whole network.
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
from tripletjax.learn.networks.whitening import whitening


class FeatureStat(nnx.Variable):
    """Statistics of features, from before training."""


class Head(nnx.Module):
    """Unit vectors from the features of a backbone.

    Features are standardised with the statistics of `fit`. One linear layer follows, or
    two with a ReLU between.

    Args:
        features: number of features.
        dim: dimensions of the embedding.
        hidden: width of the first of two layers; 0 for one layer.
        mirror: whether the embeddings of an image and its mirror image are averaged
            after training.
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

    def fit(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Set the statistics of features, and start from their whitening projection.

        A head of one layer begins with within-class whitening (`whitening`), the closed
        form that training starts from. A head of two layers keeps its random values.

        Args:
            features: ``[n, f]``.
            labels: classes ``[n]``.
        """
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        # A feature that hardly varies carries noise, which is not amplified.
        scale = 1 / np.maximum(deviation, 0.1 * deviation.mean() + 1e-6)
        self.scale[...] = jnp.asarray(scale, jnp.float32)
        self.mean[...] = jnp.asarray(mean, jnp.float32)
        if self.hidden is None:
            kernel = self.out.kernel
            mean, projection = whitening(features, labels, kernel.shape[1])
            self.mean[...] = jnp.asarray(mean, jnp.float32)
            projection /= scale[:, None]
            # Columns have a root mean squared norm of 1, to which learning rates refer.
            projection /= np.linalg.norm(projection) / np.sqrt(kernel.shape[1])
            kernel[...] = jnp.asarray(projection, jnp.float32)

    def __call__(self, features: Array) -> Array:
        """Unit vectors ``[n, dim]`` of features ``[n, f]`` or ``[n, views, f]``.

        The first view is the image itself, the second its mirror image.
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
    """A backbone and a head: unit vectors from images."""

    def __init__(self, backbone: nnx.Module, head: Head):
        self.backbone, self.head = backbone, head

    def __call__(self, images: Array) -> Array:
        """Unit vectors ``[n, dim]`` of images ``[n, height, width, 3]``."""
        features: Callable[[Array], Array] = self.backbone
        return self.head(features(images))


class Features(nnx.Module):
    """Unit vectors of the raw features of a backbone."""

    def __init__(self, backbone: nnx.Module):
        self.backbone = backbone

    def __call__(self, images: Array) -> Array:
        features: Callable[[Array], Array] = self.backbone
        return unit_norm(features(images))


class MeanDirection(nnx.Module):
    """Unit vectors of cached features ``[n, views, f]``, averaged over views."""

    def __init__(self, views: int):
        self.views = views

    def __call__(self, features: Array) -> Array:
        return unit_norm(unit_norm(features[:, : self.views]).sum(axis=1))


def freeze(backbone: nnx.Module, training: str) -> None:
    """Turn the parameters outside the trained part into `Frozen`."""
    top: tuple[str, ...] = getattr(backbone, "top", ()) if training == "top" else ()
    for path, module in nnx.iter_modules(backbone):
        for name, value in list(vars(module).items()):
            full_name = ".".join(map(str, (*path, name)))
            is_top = any(f"{full_name}.".startswith(f"{one}.") for one in top)
            if type(value) is nnx.Param and not is_top:
                setattr(module, name, Frozen(value[...]))


def trained_part(model: Standardized, training: str | None) -> nnx.Module:
    """The part of a model that is trained and saved: the head, or the whole model."""
    whole: Any = model.model
    return whole.head if training == "frozen" else model


def backbone_of(model: Standardized) -> nnx.Module:
    whole: Any = model.model
    return whole.backbone


def features_of(model: Standardized) -> Standardized:
    """A model from images to the features of its backbone."""
    features = Standardized(backbone_of(model), model.mean, model.std)
    features.eval()
    return features
