"""Folders of pictures for the tests."""

import numpy as np
from PIL import Image


def shapes(folder, *, kinds=8, each=10, size=(24, 20), mode="L", seed=0):
    """A folder of pictures: of each kind rectangles of one place, with noise."""
    draw = np.random.default_rng(seed)
    for kind in range(kinds):
        place = folder / f"group{kind % 2}" / f"kind{kind}"
        place.mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            left, top = divmod(kind, 4)
            pixels[4 * top : 4 * top + 6, 10 * left : 10 * left + 8] += 150
            image = Image.fromarray(pixels).convert(mode)
            suffix = ("png", "bmp", "webp")[number % 3]
            image.save(place / f"{number}.{suffix}", lossless=True)
    return folder
