"""Rewards of texts: what a function is shown, and what it may answer."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from steering.core import Model
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler
from steering.rewards import Sum, from_text


@pytest.fixture(scope="module")
def pipe():
    net = SequenceDenoiser(4, width=8, depth=1, kernel=3, fine=8).eval()
    return SequencePipeline(net, TokenScheduler(4), alphabet="ACGT", length=4)


def test_a_function_is_shown_texts_and_prompts(pipe):
    seen = []

    @from_text(pipe)
    def count(texts, prompts):
        seen.append((texts, prompts))
        return [text.count("G") for text in texts]

    items = one_hot(pipe.read(["GATG", "CCCC"]), 4).float()
    assert count(items, ["a", None]).tolist() == [2, 0]
    assert seen == [(["GATG", "CCCC"], ["a", None])]
    assert count.name == "count"
    assert not count.differentiable
    assert not count.card.differentiable


def test_a_guess_is_read_as_its_likeliest_tokens_and_a_mask_as_free(pipe):
    first = from_text(pipe)(lambda texts: [float(text == "TA_T") for text in texts])
    items = torch.tensor(
        [[[0.2, 0.2, 0.2, 0.4], [0.7, 0.1, 0.1, 0.1], [0.0] * 4, [0.0, 0.1, 0.1, 0.8]]]
    )
    assert first(items, [None]).tolist() == [1.0]


def test_none_and_broken_items_are_nan(pipe):
    shown = []

    @from_text(pipe)
    def picky(texts):
        shown.extend(texts)
        return [None if "A" in text else 1.0 for text in texts]

    items = one_hot(pipe.read(["AAAA", "CCCC", "GGGG"]), 4).float()
    items[2, 0, 0] = math.nan
    assert picky(items, [None] * 3).isfinite().tolist() == [False, True, False]
    assert shown == ["AAAA", "CCCC"]


def test_a_model_of_texts_will_do_and_rewards_compose(pipe):
    class Nothing:
        def rows(self, t, row):
            return torch.ones_like(row)

        def __call__(self, x, t, row):
            return x

    process = pipe.scheduler.process(4, 2)
    model = Model(Nothing(), process, write=pipe.write)
    length = from_text(model)(lambda texts: [len(text) for text in texts])
    both = 0.5 * length + length
    assert isinstance(both, Sum)
    assert both(one_hot(pipe.read(["ACGT"]), 4).float(), [None]).tolist() == [6.0]


def test_what_is_wrong_is_said(pipe):
    with pytest.raises(TypeError, match="returned 1 numbers for 2 texts: return one per text"):
        from_text(pipe)(lambda texts: [0.0])(
            one_hot(pipe.read(["ACGT", "CCCC"]), 4).float(), [None] * 2
        )
    with pytest.raises(TypeError, match=r"returned 3\.0 for 1 texts"):
        from_text(pipe)(lambda texts: 3.0)(one_hot(pipe.read(["ACGT"]), 4).float(), [None])
    with pytest.raises(TypeError, match=r"model=len .* give the pipeline"):
        from_text(len)  # the decorator without its pipeline
    with pytest.raises(TypeError, match="model=SequencePipeline writes no texts"):
        from_text(SequencePipeline)
    with pytest.raises(TypeError, match=r"takes a function of \(texts\)"):
        from_text(pipe)(lambda: 0.0)
