"""Handwritten digits that come with scikit-learn."""

import numpy as np

# The first digits train, the others test. Writers follow one another, so that a random
# split would show the test writers while training.
TRAIN = 898


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Load 1,797 handwritten digits of 13 writers, in the order of their file.

    Returns:
        uint8 images ``[1797, 8, 8, 1]``, whose 17 levels of ink are multiples of 15,
        and int32 labels ``[1797]``.

    References:
        Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. UCI Machine
        Learning Repository. 1998. doi:10.24432/C50P49
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = (15 * np.asarray(pixels)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, np.asarray(labels, np.int32)
