"""Keyed noise: what is drawn is a pure function of a 64-bit key, whatever the batch, order or device.

One primitive, Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
written in integer tensor operations, so that rows of one batch may carry different keys. The 64 bits
of a key are the cipher's key; its 128-bit counter holds the element's index and what it is used for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_NORMAL, _UNIFORM, _CHILD, _ROOT = range(4)  # last counter word: streams of one key never overlap


def root_key(seed: int, row: Tensor) -> Tensor:
    """Key of condition `row` under `seed`.

    Args:
        seed: any integer; its low 64 bits count.
        row: [N] int64 condition index.

    Returns:
        [N] int64 keys.
    """
    signed = (int(seed) + 2**63) % 2**64 - 2**63
    return _derive(torch.full_like(row, signed), row, _ROOT)


def child_key(key: Tensor, index: Tensor | int) -> Tensor:
    """Key of child number `index` of `key`: a node's child, a walk of a root, a step of a walk.

    Args:
        key: [N] int64.
        index: [N] int64, or one integer for all.

    Returns:
        [N] int64 keys.
    """
    return _derive(key, torch.as_tensor(index, device=key.device).expand_as(key), _CHILD)


def normal(key: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one independent array per key (Box-Muller on Philox words).

    Args:
        key: [N] int64; the noise lives on the key's device.
        shape: shape of one array.

    Returns:
        [N, *shape] float32.
    """
    size = math.prod(shape)
    words = _philox(key, -(-size // 4), _NORMAL)
    drawn = torch.empty(len(key), 2, 2, words[0].shape[1], device=key.device)
    for pair in range(2):
        # (0, 1]: the logarithm of 0 must not happen, that of 1 may
        radius = (_unit(words[2 * pair]).log_().mul_(-2)).sqrt_()
        angle = _unit(words[2 * pair + 1]).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=drawn[:, pair, 0])
        torch.mul(radius, angle.sin_(), out=drawn[:, pair, 1])
    return drawn.flatten(1)[:, :size].unflatten(1, tuple(shape)) if shape else drawn[:, 0, 0, 0]


def uniform(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform noise on the open interval (0, 1), one independent array per key.

    Args:
        key: [N] int64.
        shape: shape of one array; () gives one number per key.

    Returns:
        [N, *shape] float64, 52 bits of it random.
    """
    size = math.prod(shape)
    a, b, c, d = _philox(key, -(-size // 2), _UNIFORM)
    bits = torch.stack([(a << 20) ^ (b >> 12), (c << 20) ^ (d >> 12)], -1)
    drawn = (bits.double() + 0.5) * 2.0**-52
    return drawn.flatten(1)[:, :size].unflatten(1, tuple(shape)) if shape else drawn[:, 0, 0]


def _unit(word: Tensor) -> Tensor:
    return word.float().add_(0.5).mul_(2.0**-32)


def _derive(key: Tensor, index: Tensor, stream: int) -> Tensor:
    low, high = (index & _MASK)[:, None], ((index >> 32) & _MASK)[:, None]
    a, b, _, _ = _rounds(key, low, high, torch.zeros_like(low), torch.full_like(low, stream))
    return ((a << 32) | b)[:, 0]


def _philox(key: Tensor, blocks: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four [N, blocks] tensors of 32-bit words for counters 0..blocks-1 of each key."""
    counter = torch.arange(blocks, device=key.device).expand(len(key), blocks)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=key.device)
    return _rounds(key, counter, zero, zero, zero + stream)


def _rounds(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor):
    k0, k1 = (key & _MASK)[:, None], ((key >> 32) & _MASK)[:, None]
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
