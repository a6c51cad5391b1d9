"""Weighted draws teach a model; wrong ones are refused by number."""

from __future__ import annotations

import math

import pytest
import torch

from steering.finetune import distill, drakes
from steering.models.sequence_pipeline import SequencePipeline
from tests.finetune.small import count_c, equal, small_pipeline, weights

QUICK = {"steps": 4, "batch": 16, "lr": 3e-3, "progress": False}


def data(pipe: SequencePipeline, n: int = 200) -> torch.Tensor:
    """Draws [n, 6] of a pipeline."""
    generator = torch.Generator().manual_seed(0)
    return pipe([None] * n, num_inference_steps=4, output_type="pt", generator=generator).sequences


def mean_c(pipe: SequencePipeline) -> float:
    return float((data(pipe, 400) == 1).double().sum(1).mean())


def test_weights_teach_what_a_reward_would():
    # draws of p weighed by exp(log(3) · count of C) are sites with odds of C three times as large
    pipe = small_pipeline()
    tokens = data(pipe, 2000)
    log_w = math.log(3) * (tokens == 1).double().sum(1)
    expected = float(log_w.softmax(0) @ (tokens == 1).double().sum(1))
    tuned = distill(pipe, tokens, log_w, updates=150, **QUICK)
    # 400 draws of 6 sites spread by sqrt(6/4 / 400) = .06; 150 updates are not quite the end
    assert mean_c(tuned.pipe) == pytest.approx(expected, abs=0.25)
    assert expected > mean_c(pipe) + 1
    assert tuned.history[-1]["path_kl"] > 0.5
    assert tuned.total("forward") == tuned.total("backward") == 150 * 16


def test_sequences_without_weight_are_never_seen():
    pipe = small_pipeline()
    tokens = torch.cat([torch.full((5, 6), 2), torch.full((1, 6), 3)])
    log_w = torch.tensor([0.0] * 5 + [-math.inf])
    seen = distill(pipe, tokens, log_w, updates=3, **QUICK)
    alone = distill(pipe, tokens[:5], updates=3, **QUICK)
    assert equal(weights(seen.pipe), weights(alone.pipe))


def test_prompts_have_equal_shares_whatever_their_weights():
    from steering.finetune.distill import _shares

    rows = torch.tensor([0, 0, 1])
    log_w = torch.tensor([1000.0, 1000.0 + math.log(3), -1000.0], dtype=torch.float64)
    shares = _shares(log_w, rows)
    assert shares.tolist() == pytest.approx([0.125, 0.375, 0.5])


def test_resumed_runs_end_equal_to_the_bit(tmp_path):
    pipe, settings = small_pipeline(), {"every": 2, **QUICK}
    tokens = data(pipe, 20)
    whole = distill(pipe, tokens, updates=5, **settings)
    distill(pipe, tokens, updates=2, out=tmp_path, **settings)
    resumed = distill(pipe, tokens, updates=5, out=tmp_path, **settings)
    assert equal(weights(whole.pipe), weights(resumed.pipe))
    with pytest.raises(ValueError, match="data="):
        distill(pipe, tokens[:-1], updates=5, out=tmp_path, **settings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 4, 0, 1]])}, "sequence 1 has 4"),
        ({"tokens": torch.zeros(3, 5, dtype=torch.int64)}, r"shape \[3, 5\]: give \[N, 6\]"),
        ({"tokens": torch.zeros(3, 6)}, "torch.float32"),
        ({"tokens": ["ACGTAC"]}, "list"),
        ({"log_weights": torch.zeros(2)}, r"log_weights has shape \[2\]"),
        ({"log_weights": torch.tensor([0.0, math.nan, 0.0])}, "nan or inf"),
        ({"log_weights": torch.full((3,), -math.inf)}, "no weight at all"),
        ({"rows": torch.tensor([0, 1, 0])}, "rows: give 0 to 0"),
        ({"prompts": ["C"]}, "sequence 0 is not what prompt 0 keeps"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_data_is_refused_before_an_update_and_the_last_state_stays(change, match, tmp_path):
    pipe = small_pipeline()
    good = {"tokens": torch.zeros(3, 6, dtype=torch.int64), "out": tmp_path, **QUICK}
    distill(pipe, updates=2, **good)
    state = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=match):
        distill(pipe, updates=4, **good | change)
    assert (tmp_path / "state.safetensors").read_bytes() == state


def test_a_tuned_pipeline_is_tuned_further():
    pipe = small_pipeline()
    once = drakes(pipe, count_c, alpha=0.5, steps=4, batch=8, updates=2, progress=False)
    twice = distill(once.pipe, data(once.pipe, 20), updates=2, **QUICK)
    assert not equal(weights(once.pipe), weights(twice.pipe))
