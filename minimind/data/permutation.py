"""A pseudo-random order of n things in constant memory, any part of which can be asked for on its own."""

from hashlib import blake2b

import numpy as np

_ROUNDS = 6
_MIN_HALF_BITS = 4  # a smaller domain has too few orders to look random


class Permutation:
    """A bijection of 0..n-1, different for each `key`.

    A balanced Feistel network over the next power of four, with cycle walking: a value that falls outside is
    sent through again until it is inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self._half = np.uint64(max(_MIN_HALF_BITS, -(-(max(n, 1) - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        digest = blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """int64, the shape of `values`: where each of `values` (in 0..n-1) goes."""
        out = self._network(np.asarray(values).astype(np.uint64))
        limit = np.uint64(self.n)
        outside = np.flatnonzero(out >= limit)
        while len(outside):
            out[outside] = self._network(out[outside])
            outside = outside[out[outside] >= limit]
        return out.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
