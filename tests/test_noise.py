"""Keyed noise: the published cipher, its moments, and independence from how a batch is made."""

import math

import pytest
import torch

from steering.noise import _rounds, child_key, normal, root_key, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Philox-4x32-10, published with Random123
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_the_cipher_gives_its_known_answers(counter, key, words):
    drawn = _rounds(torch.tensor([key]), torch.full((4, 1, 1), counter))
    assert drawn.flatten().tolist() == words


@pytest.mark.parametrize("shape", [(), (3,), (1, 28, 28), (1, 27, 29), (4, 8, 8)])
def test_noise_is_bit_equal_over_batch_sizes_and_places(shape):
    key = root_key(3, torch.arange(16))
    whole = normal(key, shape)
    for size in range(1, 17):
        assert torch.equal(normal(key[:size], shape), whole[:size])
        assert torch.equal(normal(key[-size:], shape), whole[-size:])
    assert torch.equal(normal(key.flip(0), shape), whole.flip(0))


def test_keys_that_differ_only_above_bit_32_differ():
    key = torch.tensor([7, 7 + 2**32, 7 + 2**62])
    for drawn in (normal(key, (4,)), uniform(key, (4,)), child_key(key, 0)[:, None]):
        assert len(drawn.unique(dim=0)) == 3


def test_normal_moments():
    n = 400_000
    x = normal(root_key(0, torch.arange(100)), (n // 100,)).double().flatten()
    # 4 standard errors of the moments of N(0, 1): variances 1, 2, 15, 96 over n
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 4 * math.sqrt(variance / n)
    # neighbours come from one Box-Muller pair or one cipher block: correlation has s.e. 1/sqrt(n)
    for lag in (1, 2, n // 400):
        assert abs((x[:-lag] * x[lag:]).mean()) < 4 / math.sqrt(n)


def test_uniform_moments_and_range():
    u = uniform(root_key(1, torch.arange(1000)), (200,)).flatten()
    assert 0 < u.min()
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(u))
    assert uniform(root_key(1, torch.arange(5))).shape == (5,)


def test_streams_of_one_key_are_apart():
    key = root_key(0, torch.arange(2000))
    u, z, child = uniform(key), normal(key, ()).double(), uniform(child_key(key, 0))
    for a, b in ((u - 0.5, z), (u - 0.5, child - 0.5), (z, child - 0.5)):
        assert abs((a * b).mean()) < 4 * a.std() * b.std() / math.sqrt(len(key))


def test_a_million_children_have_distinct_keys():
    root = root_key(0, torch.zeros(1, dtype=torch.int64))
    child = child_key(root.expand(1_000_000), torch.arange(1_000_000))
    # among n keys of 64 bits a collision has probability n² / 2^65 = 3e-8
    assert len(child.unique()) == 1_000_000


def test_seeds_are_taken_whole():
    row = torch.zeros(1, dtype=torch.int64)
    seeds = [0, 1, -1, 2**40, 2**40 + 1, 2**63, 2**64 - 2]
    assert len({int(root_key(s, row)) for s in seeds}) == len(seeds)
