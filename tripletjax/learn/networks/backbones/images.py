"""Training images of pretrained networks: their mean, deviation and size."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Images:
    """Images that a network was trained on.

    Attributes:
        mean: per channel, from 0 to 1.
        std: standard deviation per channel, of the same images.
        size: in pixels.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int


IMAGENET = Images((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
# (x - 127.5) / 128 of x from 0 to 255.
FACENET = Images((0.5, 0.5, 0.5), (128 / 255, 128 / 255, 128 / 255), 160)
