"""Counts of characters give a normalised law, and the numbers worked out by hand."""

import math

import pytest
import torch

from steering.metrics import NGram


def test_it_is_what_is_worked_out_by_hand():
    # two characters, a 3 times and b once; after a: b once and a once, both kinds seen
    model = NGram.fit(["aab", "a"], order=2)
    first = (3 + 2 * 1 / 2) / (4 + 2)
    after_a = (1 + 2 * first) / (2 + 2)
    expected = [-math.log2(first), -math.log2(after_a), -math.log2((1 + 2 * (1 - first)) / 4)]
    # float64 rounding
    assert model.surprise("aab").tolist() == pytest.approx(expected, abs=1e-12)
    # nothing was seen after b: the law of single characters
    assert model.surprise("ba")[1].item() == pytest.approx(-math.log2(first), abs=1e-12)


def test_every_law_sums_to_one():
    texts = ["the cat sat on the mat", "that hat, the cat"]
    model = NGram.fit(texts, order=4)
    letters = sorted(set("".join(texts)))
    for past in ("", "t", "th", "the ", "q", "xcat", "mat"):
        bits = torch.stack([model.surprise(past + c)[-1] for c in letters])
        assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-12)


def test_what_is_familiar_surprises_less():
    model = NGram.fit(["and god said unto moses, go down. and god said."] * 2)
    assert model.surprise("and god said").mean() < model.surprise("dna dog dias").mean()
    assert model.surprise("z").isinf().all()
    assert model.surprise("").shape == (0,)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="order=0"):
        NGram.fit(["a"], order=0)
    for texts in ("text", [], [""]):
        with pytest.raises(ValueError, match="texts: give a list"):
            NGram.fit(texts)
