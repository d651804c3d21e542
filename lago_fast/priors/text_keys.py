"""The key of a text in the latent cache: 128 bits of its characters, seeded by whose answers are kept.

Test: pytest tests/priors/test_text_keys.py
"""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lago_fast import _C

Seed = tuple[int, int]  # two unsigned halves of 64 bits


def seed_of(salt: str) -> Seed:
    """Return the seed that a digest gives to keys."""
    low, high = _C.hash_bytes(salt.encode(), (0, 0))
    return low, high


def text_keys(texts: Sequence[bytes], seed: Seed) -> Tensor:
    """Return one key per text, [n, 2] int64, as `LatentCache.lookup_keys` and `Store.get` take them."""
    halves = [half for text in texts for half in _C.hash_bytes(text, seed)]
    return torch.from_numpy(np.array(halves, dtype=np.uint64).view(np.int64).reshape(-1, 2))


def encoded(*texts: str) -> bytes:
    """Return bytes of which every list of texts has its own: the lengths, then the characters."""
    lengths = array("q", [len(texts), *map(len, texts)])
    # a text from outside may hold half of a surrogate pair
    return lengths.tobytes() + "".join(texts).encode("utf-8", "surrogatepass")
