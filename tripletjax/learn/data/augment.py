"""Image augmentation in JAX, as a pure function of a random key."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of images that keep their class.

    ``augment(key, images)`` is a pure function of images ``[n, height, width,
    channels]`` from 0 to 1. Each value is drawn between minus and plus its bound.

    Attributes:
        shift: largest shift, as a share of the longer side.
        rotation: largest rotation, in degrees.
        zoom: largest change of the size, as a share.
        shear: largest shear, as a share of the size.
        elastic: largest shift of a grid point, as a share of the longer side.
        flip: whether half of the images are mirrored, left to right.
        brightness: largest value that is added, where the range is 1.
        contrast: largest change of the range about the mean, as a share.
        erase: share of the images in which a rectangle becomes grey.
    """

    shift: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"{field.name} must be finite and >= 0, got {value!r}."
                )
        if self.erase > 1:
            raise ValueError(f"erase must be 0 to 1, got {self.erase!r}.")

    def __call__(self, key: Array, images: Array) -> Array:
        keys = jax.random.split(key, 5)
        if self.shift or self.rotation or self.zoom or self.shear or self.elastic:
            images = random_warp(
                keys[0],
                images,
                shift=self.shift * max(images.shape[1:3]),
                rotation=self.rotation,
                zoom=self.zoom,
                shear=self.shear,
                elastic=self.elastic * max(images.shape[1:3]),
            )
        if self.flip:
            images = random_flip(keys[1], images)
        if self.brightness or self.contrast:
            images = random_light(
                keys[2], images, brightness=self.brightness, contrast=self.contrast
            )
        if self.erase:
            images = random_erase(keys[3], images, self.erase)
        return images


def random_flip(key: Array, images: Array) -> Array:
    """Mirror half of the images ``[n, height, width, channels]``, left to right."""
    chosen = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def random_light(
    key: Array, images: Array, *, brightness: float = 0.0, contrast: float = 0.0
) -> Array:
    """Stretch the tones of each image about its mean and shift them, within 0 to 1.

    ``y = (x - mean) (1 + c) + mean + b``, with c and b drawn uniformly between minus
    and plus their bounds.
    """
    bounds = jnp.array([contrast, brightness])
    draws = bounds * jax.random.uniform(key, (len(images), 2), minval=-1, maxval=1)
    stretch, added = jnp.moveaxis(draws, 1, 0)[..., None, None, None]
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return jnp.clip((images - mean) * (1 + stretch) + mean + added, 0, 1)


def random_erase(key: Array, images: Array, share: float) -> Array:
    """Turn a rectangle grey in a share of the images ``[n, height, width, channels]``.

    Each side of the rectangle is a tenth to four tenths of the image's.

    References:
        Zhong, Zheng, Kang, Li, Yang. Random Erasing Data Augmentation. 2017.
        arXiv:1708.04896
    """
    n, height, width, _ = images.shape
    draws = jax.random.uniform(key, (5, n, 1, 1, 1))
    inside = draws[4] < share
    for side, (fraction, extent) in zip(
        (jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]),
        (draws[:2], draws[2:4]),
    ):
        length = (0.1 + 0.3 * extent) * len(side.ravel())
        start = fraction * (len(side.ravel()) - length)
        inside &= (side >= start) & (side < start + length)
    return jnp.where(inside, 0.5, images)


def random_warp(
    key: Array,
    images: Array,
    *,
    shift: float = 0.0,
    rotation: float = 0.0,
    zoom: float = 0.0,
    shear: float = 0.0,
    elastic: float = 0.0,
) -> Array:
    """Shift, rotate, scale, shear and bend each image at random.

    Each parameter is drawn uniformly between minus and plus its bound. Pixels from
    outside repeat the border.

    Args:
        key: a random key.
        images: ``[n, height, width, channels]``.
        shift: in pixels, each way.
        rotation: in degrees.
        zoom: as a share of the size.
        shear: as a share of the size.
        elastic: largest shift of each point of a grid of 5 x 5, in pixels. Points
            between them move smoothly.

    Returns:
        Images of the same shape.

    References:
        Simard, Steinkraus, Platt. Best Practices for Convolutional Neural Networks
        Applied to Visual Document Analysis. 2003 (elastic distortions).
    """
    n, height, width, _ = images.shape
    bounds = jnp.array([shift, shift, jnp.deg2rad(rotation), zoom, zoom, shear])
    draws = bounds * jax.random.uniform(key, (n, 6), minval=-1, maxval=1)
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, (height, width)), indexing="ij"))
    offsets = grid.reshape(2, -1) - centre[:, None]
    bends = jnp.zeros((n, 2, 1))
    if elastic:
        key = jax.random.fold_in(key, 1)
        nodes = jax.random.uniform(key, (n, 2, 5, 5), minval=-elastic, maxval=elastic)
        bends = jax.image.resize(nodes, (n, 2, height, width), "cubic")
        bends = bends.reshape(n, 2, -1)

    def warp(image: Array, draw: Array, elastic: Array) -> Array:
        down, right, angle, zoom_y, zoom_x, shear = draw
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.array([[cos, -sin], [sin, cos]])
        stretch = jnp.array([[1 + zoom_y, shear], [0.0, 1 + zoom_x]])
        move = centre + jnp.stack([down, right])
        source = turn @ stretch @ offsets + move[:, None] + elastic
        source = source.reshape(2, height, width)
        channels = jnp.moveaxis(image, -1, 0)
        warped = [
            map_coordinates(c, list(source), order=1, mode="nearest") for c in channels
        ]
        return jnp.stack(warped, axis=-1)

    return jax.vmap(warp)(images, draws, bends)
