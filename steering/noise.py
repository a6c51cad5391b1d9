"""Keyed noise: what is drawn is a pure function of a key, whatever the batch or the order.

Keys and uniforms are equal to the bit on every device, normal noise up to a device's own rounding
of logarithm and cosine.

One primitive, Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
written in integer tensor operations, so that rows of one batch may carry different keys. The 64
bits of a key are the cipher's key; its 128-bit counter holds the element's index and its use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

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
    drawn = torch.empty(len(key), 2, 2, words.shape[2], device=key.device)
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
    low, high = index & _MASK, (index >> 32) & _MASK
    zero = torch.zeros_like(low)
    a, b, _, _ = _rounds(key, torch.stack([low, high, zero, zero + stream])[..., None])
    return ((a << 32) | b)[:, 0]


def _philox(key: Tensor, blocks: int, stream: int) -> Tensor:
    """[4, N, blocks] words of 32 bits for counters 0..blocks-1 of each key."""
    counter = torch.zeros(4, len(key), blocks, dtype=torch.int64, device=key.device)
    counter[0] = torch.arange(blocks, device=key.device)
    counter[3] = stream
    return _rounds(key, counter)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Philox' multipliers [2, 1, 1] and what each round adds to the key [10, 2, 1].

    Kept per device: copying them anew would make the host wait for an accelerator at every draw.
    """
    multiplier = torch.tensor([0xD2511F53, 0xCD9E8D57], device=device).view(2, 1, 1)
    weyl = torch.tensor([0x9E3779B9, 0xBB67AE85], device=device).view(2, 1)
    return multiplier, weyl * torch.arange(10, device=device).view(10, 1, 1)


def _rounds(key: Tensor, counter: Tensor) -> Tensor:
    """The cipher: key [N], counter [4, N, B] of 32-bit words -> [4, N, B] words.

    Words 0 and 2 of the counter are multiplied, 1 and 3 are not: each pair is one tensor, since
    for the few hundred words of a small batch the number of operations is what costs.
    """
    multiplier, weyl = _constants(key.device)
    halves = torch.stack([key & _MASK, (key >> 32) & _MASK])  # [2, N]
    round_keys = ((halves + weyl) & _MASK)[..., None]  # [10, 2, N, 1]
    multiplied, kept = counter[0::2], counter[1::2]  # [2, N, B] each
    for k in round_keys.unbind():
        # int64 products wrap, but their 64 bits are those of the unsigned product
        product = (multiplied * multiplier).flip(0)
        multiplied = (product >> 32).bitwise_and_(_MASK).bitwise_xor_(kept).bitwise_xor_(k)
        kept = product.bitwise_and_(_MASK)
    return torch.stack([multiplied[0], kept[0], multiplied[1], kept[1]])
