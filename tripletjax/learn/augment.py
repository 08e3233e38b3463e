"""Image augmentation in JAX, a pure function of a random key."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates


def random_affine(
    key: Array,
    images: Array,
    *,
    shift: float = 0.0,
    rotation: float = 0.0,
    zoom: float = 0.0,
    shear: float = 0.0,
) -> Array:
    """Moves, turns, scales and shears each image a little, at random.

    Each parameter is drawn uniformly between minus and plus its bound. What comes in
    from outside repeats the border.

    Args:
        key: a random key.
        images: ``[n, height, width, channels]``.
        shift: in pixels, each way.
        rotation: in degrees.
        zoom: as a share of the size.
        shear: as a share of the size.

    Returns:
        Images of the same shape.
    """
    n, height, width, _ = images.shape
    bounds = jnp.array([shift, shift, jnp.deg2rad(rotation), zoom, zoom, shear])
    draws = bounds * jax.random.uniform(key, (n, 6), minval=-1, maxval=1)
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, (height, width)), indexing="ij"))
    offsets = grid.reshape(2, -1) - centre[:, None]

    def warp(image: Array, draw: Array) -> Array:
        down, right, angle, zoom_y, zoom_x, shear = draw
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.array([[cos, -sin], [sin, cos]])
        stretch = jnp.array([[1 + zoom_y, shear], [0.0, 1 + zoom_x]])
        move = centre + jnp.stack([down, right])
        source = (turn @ stretch @ offsets + move[:, None]).reshape(2, height, width)
        channels = jnp.moveaxis(image, -1, 0)
        warped = [map_coordinates(c, source, order=1, mode="nearest") for c in channels]
        return jnp.stack(warped, axis=-1)

    return jax.vmap(warp)(images, draws)
