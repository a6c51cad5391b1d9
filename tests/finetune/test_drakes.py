"""Tuning: what it climbs, what it keeps, and that it can be stopped at any time."""

from __future__ import annotations

import json

import pytest
import torch

from steering import rewards, zoo
from steering.finetune import NotFiniteError, drakes, path_kl
from steering.models.sequence_pipeline import SequencePipeline
from tests.finetune.small import count_c, equal, small_pipeline, weights

QUICK = {"steps": 4, "truncate": 3, "batch": 8, "lr": 3e-3, "progress": False}


def test_alpha_zero_climbs_and_leaves_the_given_pipeline():
    pipe = small_pipeline()
    was = {k: v.clone() for k, v in weights(pipe).items()}
    tuned = drakes(pipe, count_c, alpha=0.0, updates=40, **QUICK)
    assert tuned.history[0]["reward"] < 2.5
    assert "kl" not in tuned.history[0]
    assert tuned.history[-1]["drawn_reward"] > 5
    assert equal(was, weights(pipe))
    assert all(p.requires_grad and p.grad is None for p in pipe.denoiser.parameters())
    assert not equal(was, weights(tuned.pipe))
    drawn = tuned.pipe([None] * 50, num_inference_steps=4, output_type="pt").sequences
    assert (drawn == 1).double().sum(1).mean() > 5


def test_large_alpha_keeps_the_model():
    pipe = small_pipeline()
    kept = drakes(pipe, count_c, alpha=100.0, updates=40, **QUICK)
    free = drakes(pipe, count_c, alpha=0.3, updates=40, **QUICK)
    assert kept.history[-1]["path_kl"] < 0.02 < 0.5 < free.history[-1]["path_kl"]
    assert abs(kept.history[-1]["drawn_reward"] - count_c_before(pipe)) < 0.3


def count_c_before(pipe: SequencePipeline) -> float:
    generator = torch.Generator().manual_seed(0)
    drawn = pipe([None] * 400, num_inference_steps=4, output_type="pt", generator=generator)
    return float((drawn.sequences == 1).double().sum(1).mean())


def test_history_says_what_the_chain_itself_does():
    pipe = small_pipeline()
    tuned = drakes(pipe, count_c, alpha=0.5, updates=20, every=10, **QUICK)
    assert [line["update"] for line in tuned.history if "path_kl" in line] == [10, 20]
    found = path_kl(tuned.pipe, pipe, steps=4, n=1000)
    said = tuned.history[-1]
    error = (found.error**2 + said["path_kl_error"] ** 2) ** 0.5
    assert abs(found.mean - said["path_kl"]) < 4 * error


def test_rows_are_what_the_networks_are_asked(monkeypatch):
    from steering.models.sequence_denoiser import SequenceDenoiser

    seen = {"forward": 0, "backward": 0}
    plain = SequenceDenoiser.forward

    def counted(self, sample, *rest, **more):
        out = plain(self, sample, *rest, **more)
        if torch.is_grad_enabled() and out[0].requires_grad:
            out[0].register_hook(lambda g: seen.__setitem__("backward", seen["backward"] + len(g)))
        seen["forward"] += len(sample)
        return out

    for checkpointing in (True, False):
        for kl, alpha in (("path", 0.5), ("published", 0.5), ("path", 0.0)):
            seen.update(forward=0, backward=0)
            with monkeypatch.context() as m:
                m.setattr(SequenceDenoiser, "forward", counted)
                tuned = drakes(
                    small_pipeline(), count_c, alpha=alpha, kl=kl, updates=2, every=100,
                    accumulate=2, checkpointing=checkpointing, **QUICK,
                )  # fmt: skip
            watched = 64 * 4 * 2
            assert tuned.total("forward") == seen["forward"] - watched
            assert tuned.total("backward") == seen["backward"]
            assert tuned.total("rewards") == 32


def test_resumed_runs_end_equal_to_the_bit(tmp_path):
    settings = {"alpha": 0.5, "every": 2, "warmup": 6, "accumulate": 2, **QUICK}
    pipe = small_pipeline()
    whole = drakes(pipe, count_c, updates=7, **settings)
    drakes(pipe, count_c, updates=5, out=tmp_path, **settings)
    # as if it was stopped after update 5 was logged and before it was kept
    asked = []

    def watched(items, prompts):
        asked.append(len(items))
        return count_c(items, prompts)

    resumed = drakes(pipe, watched, updates=7, out=tmp_path, **settings)
    assert len(asked) == 1 + 2 * 2 + 2  # the check; two batches of two updates; two checkpoints
    assert equal(weights(whole.pipe), weights(resumed.pipe))

    def timeless(history):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in history]

    assert timeless(whole.history)[:4] == timeless(resumed.history)[:4]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 8))
    with pytest.raises(ValueError, match=r"alpha=0.5, not 0.25.*or another folder"):
        drakes(pipe, count_c, updates=9, out=tmp_path, **settings | {"alpha": 0.25})


def test_tuned_pipelines_reload_bit_equal_and_are_steered(tmp_path):
    import samplers
    import steering

    pipe = small_pipeline()
    tuned = drakes(pipe, count_c, alpha=0.5, updates=3, prompts=["A", None], **QUICK)
    tuned.save(tmp_path)
    loaded = SequencePipeline.from_pretrained(tmp_path)
    assert equal(weights(tuned.pipe), weights(loaded))
    drawn = [
        p(["A"] * 4, num_inference_steps=4, generator=torch.Generator().manual_seed(1)).sequences
        for p in (tuned.pipe, loaded)
    ]
    assert drawn[0] == drawn[1]
    assert all(text[0] == "A" for text in drawn[0])
    model = steering.from_pipeline(loaded, steps=4)
    found = samplers.sample(model, count_c, samplers.BestOfN(of=8), nfe=32, progress=False)
    assert found.items.shape == (1, 6, 4)


def test_nan_rewards_end_in_one_error_and_the_last_good_state_stays(tmp_path):
    pipe, calls = small_pipeline(), []

    def breaks(items, prompts):
        calls.append(1)
        return count_c(items, prompts) * (float("nan") if len(calls) > 5 else 1.0)

    settings = {"alpha": 0.5, "every": 2, **QUICK}
    with pytest.raises(
        NotFiniteError, match=r"5 updates in a row.*number 8.*loss, reward"
    ) as error:
        drakes(pipe, breaks, updates=50, out=tmp_path, **settings)
    # fine: the check, updates 1 and 2, the look at the checkpoint, update 3
    tuned = error.value.tuned
    assert tuned.skipped == 5
    assert [line["skipped"] for line in tuned.history[:3]] == [False] * 3
    three = drakes(pipe, count_c, updates=3, **settings)
    assert equal(weights(tuned.pipe), weights(three.pipe))
    # from the last checkpoint, with a reward that is mended, it goes on as if nothing had been
    whole = drakes(pipe, count_c, updates=4, **settings)
    mended = drakes(pipe, count_c, updates=4, out=tmp_path, **settings)
    assert equal(weights(whole.pipe), weights(mended.pipe))


def test_one_bad_update_is_left_out_and_counted():
    calls = []

    def breaks(items, prompts):
        calls.append(1)
        r = count_c(items, prompts)
        if len(calls) == 3:  # a finite value whose gradient is not
            return r + (items[:, 0, 0] * 0).sqrt()
        return r

    tuned = drakes(small_pipeline(), breaks, alpha=0.5, updates=4, **QUICK)
    assert [line["skipped"] for line in tuned.history] == [False, True, False, False]
    assert tuned.skipped == 1
    assert all(torch.isfinite(w).all() for w in weights(tuned.pipe).values())


def test_weights_of_a_reward_gather_no_gradients():
    judge = torch.nn.Linear(24, 1)

    def learned(items, prompts):
        return judge(items.flatten(1))[:, 0]

    tuned = drakes(small_pipeline(), learned, alpha=0.5, updates=2, **QUICK)
    assert tuned.history[0]["gradient"] > 0
    assert judge.weight.grad is None
    assert judge.weight.requires_grad


def test_rewards_without_a_gradient_are_refused_first():
    def hard(items, prompts):
        return (items.argmax(-1) == 1).sum(1)

    with pytest.raises(TypeError, match=r"without a gradient.*finetune\.distill"):
        drakes(small_pipeline(), hard, alpha=0.5, **QUICK)
    with pytest.raises(TypeError, match=r"returned \[2, 6\] for 2 items"):
        drakes(small_pipeline(), lambda items, _: items.sum(-1), alpha=0.5, **QUICK)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"tau": 0.0}, "tau=0.0: give a finite number above 0"),
        ({"kl": "paths"}, "kl='paths' is unknown: give 'path' or 'published'"),
        ({"straight_through": "start"}, "straight_through='start' is unknown"),
        ({"truncate": 0}, "truncate=0"),
        ({"updates": 1.5}, "updates=1.5"),
        ({"batch": True}, "batch=True"),
        ({"prompts": ["AX"]}, "'X'"),
        ({"steps": 0}, "steps"),
    ],
)
def test_wrong_arguments(given, match):
    with pytest.raises(ValueError, match=match):
        drakes(small_pipeline(), count_c, **{"alpha": 0.5, **QUICK} | given)


def test_chains_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"remask=0.5"):
        drakes(small_pipeline(remask=0.5), count_c, alpha=0.5, **QUICK)
    with pytest.raises(ValueError, match="weighting by masks"):
        drakes(small_pipeline("uniform"), count_c, alpha=0.5, kl="published", **QUICK)
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        drakes(torch.nn.Linear(1, 1), count_c, alpha=0.5, **QUICK)


def test_uniform_chains_are_tuned_too():
    tuned = drakes(small_pipeline("uniform"), count_c, alpha=0.0, updates=40, **QUICK)
    assert tuned.history[-1]["drawn_reward"] > tuned.history[0]["reward"] + 1


def test_weights_that_all_are_frozen_are_all_tuned_in_the_copy():
    pipe = zoo.load("tfbind8")  # frozen, as built-in checkpoints are
    reward = rewards.Table(zoo.tfbind8_scores())
    settings = {"alpha": 0.1, "steps": 4, "truncate": 4, "updates": 2, "batch": 4}
    tuned = drakes(pipe, reward, progress=False, **settings)
    pairs = zip(tuned.pipe.denoiser.parameters(), pipe.denoiser.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in pipe.denoiser.parameters())
