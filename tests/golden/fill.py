"""Weights and inputs that are pure functions of names, so that parity needs no checkpoint.

`state_dict(keys, seed)` rebuilds the state dict under the official names from a golden file's "keys"
([key, shape, dtype, kind], in order). Needs numpy and torch only.
"""

import hashlib

import numpy as np
import torch


def state_dict(keys, seed=0):
    """{official name: tensor} for the `keys` of a golden json."""
    return {key: torch.from_numpy(np.asarray(tensor_for(seed, key, shape, kind))) for key, shape, _, kind in keys}


# ---------------------------------------------------------------- weights


def tensor_for(seed, key, shape, kind):
    """The value of one state-dict entry, from its name and shape alone (float32 numpy array)."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    shape = tuple(shape)
    if kind == "count":  # num_batches_tracked
        return np.asarray(1 + digest[16], dtype=np.int64)
    if kind == "running_mean":
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if kind == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if kind == "norm_weight":
        # small where a residual branch ends, so that depth does not blow the activations up
        low, high = (0.2, 0.6) if is_branch_end(key) else (0.6, 1.4)
        return rng.uniform(low, high, shape).astype(np.float32)
    if kind == "bias":
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if kind == "unit":  # embeddings, random Fourier matrix
        return rng.standard_normal(shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else int(shape[0])
    if kind == "transposed":  # in x out x k x k, stride k: every output pixel sees one tap
        fan_in = shape[0]
    gain = 1.0 if (".qkv." in key or ".aggreg." in key or "_proj" in key) else 1.5
    return (np.sqrt(gain / fan_in) * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32)


def is_branch_end(key):
    return ".main." in key and any(part in key for part in (".point_conv.norm.", ".conv2.norm.", ".proj.norm."))


# ---------------------------------------------------------------- inputs


def reference_image(height=423, width=637):
    """Smooth shapes, edges and some noise; uint8, the same on every machine (integer arithmetic and numpy PCG64)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    image = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (height + width - 2)], -1)
    disc = (x - 210) ** 2 + (y - 190) ** 2 < 120**2
    bar = (x > 400) & (x < 590) & (y > 60) & (y < 350)
    image[disc] = [200, 60, 40]
    image[bar] = [30, 90, 220]
    image[(x // 16 + y // 16) % 7 == 0] //= 2
    image += np.random.Generator(np.random.PCG64(1234)).integers(-12, 13, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def small_input(seed, size):
    rng = np.random.Generator(np.random.PCG64(seed * 1000 + size))
    return rng.standard_normal((1, 3, size, size), dtype=np.float32)
