"""Image files like those of the data sets."""

import numpy as np


def write_npz(path, shape, train=40, test=12):
    """A file in Keras' layout in which every image is of another colour: its number."""
    count = train + test
    images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, *[1] * len(shape)), (count, *shape))
    labels = (np.arange(count) % 10).astype(np.uint8)
    np.savez(path, x_train=images[:train], y_train=labels[:train], x_test=images[train:], y_test=labels[train:])
    return path
