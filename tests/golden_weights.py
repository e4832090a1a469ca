"""Weights and video of the full-size golden data as a function of key, shape and seed, in numpy alone: the golden
files then hold outputs only."""

import zlib

import numpy as np


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The value of state dict entry `key` (fairseq's names)."""
    r = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    if key.endswith("num_batches_tracked"):
        return np.array(17, dtype=np.int64)
    if key.endswith("running_var"):
        return (0.5 + r.random_sample(shape)).astype(np.float32)
    if key.endswith("running_mean"):
        return (0.1 * r.standard_normal(shape)).astype(np.float32)
    if key.endswith("pos_conv.0.weight_g"):
        return (0.5 + r.random_sample(shape)).astype(np.float32)
    z = r.standard_normal(shape)
    if "relu" in key or key == "feature_extractor_video.resnet.frontend3D.2.weight":  # PReLU slopes
        return (0.25 + 0.1 * z).astype(np.float32)
    if len(shape) == 1 and key.endswith("weight"):  # norm scales
        return (1 + 0.2 * z).astype(np.float32)
    if len(shape) == 1:  # biases
        return (0.1 * z).astype(np.float32)
    if len(shape) >= 3:  # convolutions
        return (z * (2.0 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
    return (z * shape[1] ** -0.5).astype(np.float32)


def video(T: int, seed: int) -> np.ndarray:
    """(1, T, 1, 88, 88) float32: blobs on orbits, of the range of normalised lip crops."""
    r = np.random.RandomState(seed)
    yy, xx = np.mgrid[0:88, 0:88].astype(np.float64)
    ranges = ((20, 70), (20, 70), (-25, 25), (-25, 25), (3, 15), (0.2, 1.2))
    orbits = [[r.uniform(*bounds) for bounds in ranges] for _ in range(5)]
    out = np.zeros((1, T, 1, 88, 88))
    for t in range(T):
        image = 0.25 + 0.1 * np.sin(0.7 * t) + 0.1 * np.sin(xx / (6 + 3 * np.sin(0.5 * t)))
        for cx, cy, ax, ay, size, speed in orbits:
            dx, dy = xx - cx - ax * np.sin(speed * t), yy - cy - ay * np.cos(speed * t)
            image = image + 0.4 * np.exp(-(dx**2 + dy**2) / (2 * size**2))
        out[0, t, 0] = image
    out += r.uniform(0, 0.1, out.shape)
    return ((out - 0.421) / 0.165).astype(np.float32)
