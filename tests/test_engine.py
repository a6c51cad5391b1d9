"""The engine: counted to the row, the same for any batch, and unharmed by rewards that fail."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samplers import (
    SMC,
    SVDD,
    Ancestral,
    Beam,
    BestOfN,
    Importance,
    TreeSampling,
    TreeSearch,
    ZeroOrder,
    sample,
)
from samplers.core import Rollouts
from steering import from_pipeline, zoo
from steering.core import Model, Proposal, images_in_unit_range
from steering.gaussian import NormalTransition
from steering.rewards import Jpeg
from tests.brownian import Walk, brownian, first

QUIET = {"progress": False}


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(50),
        BestOfN(50),
        Importance(50),
        SMC(40),
        SVDD(proposals=4),
        Beam(),
        ZeroOrder(),
        TreeSampling(),
        TreeSearch(value="clean"),
    ],
)
def test_results_are_bit_equal_for_every_batch_size(sampler):
    runs = [
        sample(brownian(), first, sampler, nfe=600, batch=b, draws=10, **QUIET)
        for b in (1, 2, 3, 7, 16, 50, 400)
    ]
    for run in runs[1:]:
        assert torch.equal(run.items, runs[0].items)
        assert torch.equal(run.weights, runs[0].weights)


def test_a_condition_alone_is_the_same_as_among_others():
    alone = sample(brownian(prompts=("a",)), first, Importance(20), **QUIET)
    three = sample(brownian(prompts=("a", "b", "c")), first, Importance(20), **QUIET)
    assert torch.equal(three.items[three.rows == 0], alone.items)
    assert not torch.equal(three.items[three.rows == 1], alone.items)


def test_rewards_get_the_prompts_of_their_items():
    def by_prompt(items, prompts):
        return [{"low": -1.0, "high": 1.0}[p] for p in prompts]

    run = sample(brownian(prompts=("low", "high")), by_prompt, Ancestral(30), **QUIET)
    assert run.rewards.tolist() == [{"low": -1.0, "high": 1.0}[p] for p in run.prompts]


def test_every_network_row_is_counted_and_none_is_over_budget():
    """1,000 random runs: what the network saw is what the ledger says, and within the budget."""
    chance = random.Random(0)
    for _ in range(1000):
        price, steps = chance.choice([1, 2]), chance.randint(2, 12)
        prompts = tuple("abc"[: chance.randint(1, 3)])
        model = brownian(steps=steps, prompts=prompts, price=price)
        nfe = steps * price + chance.randint(0, 150)
        calls = chance.choice([None, chance.randint(1, 40)])
        trees = [
            TreeSampling(branch="even"), TreeSampling(pilot=3),
            TreeSearch(branch="even", parallel=5), TreeSearch(value="clean"),
        ]  # fmt: skip
        sampler = chance.choice([Ancestral(), BestOfN(), Importance(), SMC(2), SMC(), *trees])
        if isinstance(sampler, SMC) or getattr(sampler, "value", "") == "clean":
            # populations of two, and a reward call for every look
            nfe, calls = 2 * nfe, None if calls is None else 20 + calls
        batch = chance.choice([5, 16, 64, 200])
        run = sample(model, first, sampler, nfe=nfe, reward_calls=calls, batch=batch, **QUIET)
        seen = sum(model.denoiser.rows_seen)
        assert int(run.spent.rows.sum()) == (seen - run.spent.padded) * price
        assert (run.spent.rows <= nfe).all()
        assert calls is None or (run.spent.reward_calls <= calls).all()
        # nothing unscored: every leg goes on until a leaf that has its reward
        walks = run._engine.record.walks
        went_on = {w.src for w in walks}
        assert all(w.entry in went_on if w.stop < steps else w.score for w in walks) or isinstance(
            sampler, SMC
        )
        assert sum(w.rows for w in walks) == run.nfe


@pytest.mark.parametrize("limit", [1, 3, 16, 31, 63])
def test_running_out_of_memory_changes_nothing(limit):
    whole = sample(brownian(), first, Importance(100), draws=20, **QUIET)
    model = brownian(limit=limit)
    small = sample(model, first, Importance(100), draws=20, **QUIET)
    assert torch.equal(small.items, whole.items)
    assert small.nfe == whole.nfe == 1000
    assert max(model.denoiser.rows_seen) <= limit


@pytest.mark.parametrize("batch", [1, 4, 15])
def test_a_call_is_never_filled_beyond_the_batch_asked_for(batch):
    model = brownian(dim=4096)  # small states on a CPU are filled up to 16 rows regardless
    run = sample(model, first, TreeSearch(branch="even"), nfe=400, batch=batch, **QUIET)
    assert set(model.denoiser.rows_seen) <= {1, 2, 4, 8, 12, batch}
    assert run.spent.padded <= run.nfe / 2
    assert run.nfe <= 400


class Turns:
    """A model whose networks share a device by turns: notes which of them was at work."""

    def __init__(self, offloaded: bool) -> None:
        self.log: list[str] = []
        inner = brownian()
        self.inner, self.rows = inner.denoiser, inner.denoiser.rows
        self.model = replace(inner, denoiser=self, decode=self.decode, offloaded=offloaded)

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        self.log.append("denoise")
        return self.inner(x, t, row)

    def decode(self, x: Tensor) -> Tensor:
        self.log.append("decode")
        return x

    def swaps(self) -> int:
        return sum(a != b for a, b in zip(self.log, self.log[1:], strict=False))


@pytest.mark.parametrize(
    "sampler", [BestOfN(40), SMC(40), TreeSearch(branch="even", parallel=8, value="clean")]
)
def test_offloaded_networks_are_not_moved_to_and_fro_and_nothing_changes(sampler):
    runs = [Turns(offloaded) for offloaded in (False, True)]
    beside, apart = (
        sample(turns.model, first, sampler, nfe=400, batch=8, draws=8, **QUIET) for turns in runs
    )
    assert torch.equal(beside.items, apart.items)
    assert torch.equal(beside.spent.rows, apart.spent.rows)
    # a search cannot ask on before it is told; others decode when all has been walked
    rounds = {BestOfN: 1, SMC: 5}.get(type(sampler))
    if rounds is not None:
        assert runs[1].swaps() <= 2 * rounds
    # never both: while a walk is under way, what has landed waits
    assert runs[1].swaps() < runs[0].swaps()


def test_an_interrupted_run_scores_what_it_held():
    turns = Turns(offloaded=True)
    kept: list[int] = []

    def stop_late(engine):
        kept.append(len(engine.store))
        if len(kept) == 15:
            os.kill(os.getpid(), signal.SIGINT)

    from samplers.core import Budget
    from samplers.engine import Engine, Settings

    sampler = BestOfN(500)
    engine = Engine(turns.model, first, settings=Settings(8))
    plan = engine.plan(1.0, 0, Budget(None, None, None))
    state = sampler.init(plan)
    assert engine.run(sampler, state, plan, watch=stop_late) == "interrupted"
    assert len(sampler.result(state).id) == kept[-1] > 0


def test_a_call_of_one_row_that_has_no_memory_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        sample(brownian(limit=0), first, BestOfN(5), **QUIET)


# --- rewards that fail -------------------------------------------------------------------------

HOSTILE = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e308, -1e308, 0.0, 1.0, -1.0, None)


def test_a_thousand_hostile_reward_vectors():
    chance = random.Random(1)
    for trial in range(1000):
        table = [chance.choice(HOSTILE) for _ in range(chance.randint(1, 8))]

        def reward(items, prompts, table=table):
            index = (items[:, 0].abs() * 997).long() % len(table)
            return [table[k] for k in index.tolist()]

        tree = {"branch": (0, 1), "parallel": 3}
        samplers = (BestOfN(12), Importance(12), SMC(12), TreeSampling(**tree), TreeSearch(**tree))
        sampler = samplers[trial % 5]
        lam = chance.choice([0.0, 1.0, 1e3])
        run = sample(brownian(steps=3), reward, sampler, nfe=60, lam=lam, **QUIET)
        assert run.rewards.isfinite().all()
        assert run.weights.isfinite().all()
        assert run.ess.isfinite().all()
        good = list(reward(run.items, None)) if run.distinct else []
        assert run.rewards.tolist() == good
        if isinstance(sampler, (BestOfN, TreeSearch)) and run.distinct:
            assert run.best == 0


def test_one_bad_item_does_not_fail_its_batch():
    def picky(items, prompts):
        if (items[:, 0] > 1).any():
            raise RuntimeError("too large")
        return items[:, 0]

    run = sample(brownian(), picky, BestOfN(200), **QUIET)
    plain = sample(brownian(), first, BestOfN(200), **QUIET)
    assert torch.equal(run.rewards, plain.rewards[plain.rewards <= 1])
    assert run.failed == int((plain.rewards > 1).sum())
    assert run.spent.first_error == "RuntimeError: too large"


def test_a_fifth_of_the_calls_failing_is_counted_exactly():
    def flaky(items, prompts):
        return torch.where((items[:, 1] * 1e4).long() % 5 == 0, torch.nan, items[:, 0])

    run = sample(brownian(), flaky, Importance(500), **QUIET)
    everything = sample(brownian(), first, Ancestral(500), **QUIET).items
    assert run.failed == int(flaky(everything, None).isnan().sum()) > 50
    assert run.distinct == 500 - run.failed


def test_a_state_that_is_not_finite_has_failed_though_its_pixels_are():
    class Broken(Walk):
        def __call__(self, x, t, row):
            return torch.where(x[:, :1] > 0.5, torch.inf, super().__call__(x, t, row))

    model = Model(Broken(), brownian().process, decode=images_in_unit_range)
    run = sample(model, first, BestOfN(100), **QUIET)
    assert 10 < run.failed < 90
    assert int(run.found[0]) == 100 - run.failed


def test_a_held_out_reward_that_fails_loses_nothing():
    def wrong(items, prompts):
        return items

    def broken(items, prompts):
        raise RuntimeError("no memory")

    with pytest.warns(UserWarning, match=r"also: wrong ended with WrongShapeError"):
        run = sample(brownian(), first, BestOfN(50), also=[wrong, first, broken], **QUIET)
    assert run.distinct == 50
    assert run.also["wrong"].isnan().all()
    assert run.also["broken"].isnan().all()
    assert torch.equal(run.also["first"], run.rewards)
    nothing = sample(brownian(), lambda x, p: [None] * len(p), BestOfN(5), also=[first], **QUIET)
    assert nothing.also["first"].shape == (0,)


def test_a_denoiser_of_another_shape_is_told():
    class Flat(Walk):
        def __call__(self, x, t, row):
            return x[:, :1]

    with pytest.raises(TypeError, match=r"denoiser returned shape \(16, 1\)"):
        sample(Model(Flat(), brownian().process), first, BestOfN(3), **QUIET)


def test_a_second_ctrl_c_does_not_wait_for_a_slow_reward():
    def slow(items, prompts):
        time.sleep(3)
        return first(items, prompts)

    def press():
        for _ in range(2):
            time.sleep(0.4)
            os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    began = time.monotonic()
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        sample(brownian(), slow, BestOfN(5), **QUIET)
    assert time.monotonic() - began < 2.5
    presser.join()


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_real_network_gives_the_same_to_the_bit_in_small_batches(batch):
    """Calls are filled up to 16 rows: below, a convolution's sums depend on the batch."""
    model = from_pipeline(zoo.load("mnist"), steps=4)
    usual = sample(model, Jpeg(), BestOfN(16), **QUIET)
    small = sample(model, Jpeg(), BestOfN(16), batch=batch, **QUIET)
    assert torch.equal(usual.items, small.items)


def test_an_item_that_cannot_be_decoded_has_failed():
    """Whatever the reward makes of it: half precision breaks pixels without an error."""
    model = replace(brownian(), decode=lambda x: torch.where(x > 1, torch.nan, x))
    run = sample(model, lambda items, prompts: [1.0] * len(prompts), BestOfN(100), **QUIET)
    assert run.items.isfinite().all()
    assert 0 < run.failed == 100 - run.distinct
    assert run.spent.first_error == "a decoded item that is not finite"


def test_a_reward_that_always_fails_says_why():
    def broken(items, prompts):
        raise OSError("the judge is not at home")

    with pytest.warns(UserWarning, match="the judge is not at home"):
        run = sample(brownian(), broken, BestOfN(5), **QUIET)
    assert run.distinct == 0
    with pytest.raises(ValueError, match="nothing was found"):
        _ = run.best


@pytest.mark.parametrize(
    ("reward", "error"),
    [
        (lambda items, prompts: items, ValueError),  # [N, 2]
        (lambda items, prompts: items.sum(), ValueError),  # a scalar
        (lambda items, prompts: [1.0], ValueError),  # too few
        (lambda items: items[:, 0], TypeError),  # takes no prompts
        (lambda items, prompts: undefined, NameError),  # noqa: F821
    ],
)
def test_programming_errors_end_the_run(reward, error):
    with pytest.raises(error):
        sample(brownian(), reward, BestOfN(20), **QUIET)


def test_on_error_raise_ends_the_run():
    with pytest.raises(ValueError, match="nan"):
        sample(brownian(), lambda x, p: [math.nan] * len(x), BestOfN(5), on_error="raise", **QUIET)


# --- time --------------------------------------------------------------------------------------


def test_slow_rewards_are_scored_while_denoising_goes_on():
    main, threads, scored = threading.get_ident(), set(), 0

    def slow(items, prompts):
        nonlocal scored
        threads.add(threading.get_ident())
        time.sleep(0.05)
        scored += len(items)
        return items[:, 0]

    scored_at_call = []  # items scored when each network call was made

    class Watched(Walk):
        def __call__(self, x, t, row):
            scored_at_call.append(scored)
            return super().__call__(x, t, row)

    model = replace(brownian(), denoiser=Watched())
    sample(model, slow, BestOfN(64), batch=8, **QUIET)
    # in turn, the last of the 8 batches would start with 56 items scored
    assert main not in threads
    assert scored_at_call[-1] < 56


def test_a_time_limit_returns_what_was_found():
    def slow(items, prompts):
        time.sleep(0.02)
        return items[:, 0]

    run = sample(brownian(), slow, Importance(), seconds=0.2, batch=16, **QUIET)
    assert run.status == "seconds"
    assert run.distinct > 0
    assert run.rewards.isfinite().all()


def test_ctrl_c_returns_what_was_found():
    seen = 0

    def reward(items, prompts):
        nonlocal seen
        seen += len(items)
        if seen == 48:
            os.kill(os.getpid(), signal.SIGINT)
        return items[:, 0]

    before = signal.getsignal(signal.SIGINT)
    run = sample(brownian(), reward, BestOfN(10_000), batch=16, **QUIET)
    assert run.status == "interrupted"
    assert 48 <= run.distinct < 1000
    assert signal.getsignal(signal.SIGINT) is before
    assert run.best == 0


# --- guidance ----------------------------------------------------------------------------------


class Shift:
    """Moves the mean of every step by `by` standard deviations: its weight has a closed form."""

    differentiates = False

    def __init__(self, by: float, exact: bool = True) -> None:
        self.by, self.exact = by, exact

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.ones_like(i)

    def propose(self, step) -> Proposal:
        clean = step.denoise(step.x, step.i, step.row)
        base = step.process.transition(step.x, step.i, clean)
        guided = NormalTransition(base.mean + self.by * base.std[:, None], base.std)
        return Proposal(base, guided, clean, torch.zeros(len(step), dtype=torch.bool))


def test_guided_walks_carry_their_weight():
    """Steps shifted by b: x_0 ~ N(b sqrt(T), 1), log p/q = sum of -b z - b²/2, E_q[p/q] = 1."""
    b, steps, n = 0.3, 10, 4000
    run = sample(brownian(steps, dim=1), first, Importance(n), lam=1.0, guidance=Shift(b), **QUIET)
    # importance weights under q of p exp(r): b = 1/sqrt(T) = .316 would be exact, so they are even
    weight_sd = math.sqrt(math.exp((1 - b * math.sqrt(steps)) ** 2) - 1)
    assert abs(run.log_z.item() - 0.5) < 4 * weight_sd / math.sqrt(n)
    assert abs(float((run.weights * run.rewards).sum()) - 1) < 4 / math.sqrt(n)
    assert run.ess.item() > 0.95 * n
    biased = sample(
        brownian(steps, dim=1), first, Importance(n), guidance=Shift(b), weights="none", **QUIET
    )
    # without weights the draws are those of N(b sqrt(T), 1) tilted once more
    assert abs(float((biased.weights * biased.rewards).sum()) - 1 - b * math.sqrt(steps)) < 0.2
    assert biased.biased
    assert "BIASED" in str(biased)


def test_guidance_without_density_or_noise_is_refused():
    model = brownian()
    with pytest.raises(ValueError, match="no density"):
        sample(model, first, BestOfN(5), guidance=Shift(0.1, exact=False), **QUIET)
    with pytest.raises(ValueError, match="draws noise"):
        sample(brownian(ode=True), first, BestOfN(5), guidance=Shift(0.1), **QUIET)
    assert model.denoiser.rows_seen == []


# --- partial rollouts --------------------------------------------------------------------------


class Script:
    """A sampler that plays a list of requests, one after the other, and keeps the answers."""

    def __init__(self, requests: list[Rollouts]) -> None:
        self.requests, self.answers = requests, {}

    def init(self, plan):
        return {"sent": 0, "back": 0}

    def ask(self, state, room):
        if state["sent"] == len(self.requests) or state["sent"] > state["back"]:
            return Rollouts.none()
        state["sent"] += 1
        return self.requests[state["sent"] - 1]

    def tell(self, state, walked):
        state["back"] += 1
        for k, id in enumerate(walked.id.tolist()):
            self.answers[id] = float(walked.reward[k])

    def done(self, state):
        return state["back"] == len(self.requests)

    def result(self, state):
        return BestOfN(1).result(BestOfN(1).init(_plan()))


def _plan():
    from samplers.core import Budget, Plan

    one = torch.ones(1, 10, dtype=torch.int64)
    return Plan(one, one, torch.ones(10, dtype=torch.bool), 1.0, 0, Budget())


def run_script(*requests, model=None):
    from samplers.engine import Engine

    script, model = Script(list(requests)), model or brownian()
    engine = Engine(model, first)
    plan = _plan()
    engine.run(script, script.init(plan), plan)
    return script, engine


def test_a_walk_in_legs_is_the_walk_in_one():
    """Same key, same noise: 0 -> 10 equals 0 -> 4, then 4 -> 10 with the same key."""
    _, whole = run_script(Rollouts.of([1], -1, 0, 10, [5], 0, True))
    script, legs = run_script(
        Rollouts.of([1], -1, 0, 4, [5], 0, False), Rollouts.of([2], 1, 4, 10, [5], 0, True)
    )
    assert torch.equal(legs.states([2]), whole.states([1]))
    assert script.answers[2] == legs.states([2])[0, 0]
    assert int(legs.ledger.rows.sum()) == 10


def test_a_look_costs_one_row_which_the_walk_on_has_back():
    script, engine = run_script(
        Rollouts.of([1], -1, 0, 4, [5], 0, True), Rollouts.of([2], 1, 4, 10, [5], 0, True)
    )
    # the clean guess of this chain is the state itself
    assert script.answers[1] == engine.states([1])[0, 0]
    assert int(engine.ledger.rows.sum()) == 10
    _, whole = run_script(Rollouts.of([1], -1, 0, 10, [5], 0, True))
    assert torch.equal(engine.states([2]), whole.states([1]))


def test_planting_costs_nothing_and_a_kept_state_can_be_scored():
    script, engine = run_script(
        Rollouts.of([1], -1, 0, 0, [5], 0, False),
        Rollouts.of([2], 1, 0, 10, [6], 0, False),
        Rollouts.of([3], 2, 10, 10, [7], 0, True),
        Rollouts.of([4], 2, 10, 10, [7], 0, False, drop=[1]),
    )
    assert script.answers[3] == engine.states([2])[0, 0] == engine.states([3])[0, 0]
    assert int(engine.ledger.rows.sum()) == 10
    assert 1 not in engine.entry


def test_a_source_is_turned_towards_a_fresh_draw_of_the_prior():
    """Whatever the prior's spread: variance-exploding grids do not begin at 1."""
    from steering.gaussian import vp
    from steering.noise import normal

    process = replace(vp((2,), torch.linspace(0.01, 1, 11)), prior_std=3.0)
    _, engine = run_script(
        Rollouts.of([3], -1, 0, 0, [5], 0, False),
        Rollouts.of([2], 3, 0, 0, [6], 0, False, angle=[0.3]),
        model=Model(Walk(), process),
    )
    x, z = engine.states([3]), normal(torch.tensor([6]), (2,))
    assert torch.allclose(x, 3 * normal(torch.tensor([5]), (2,)))
    assert torch.allclose(engine.states([2]), math.cos(0.3) * x + math.sin(0.3) * 3 * z)


def test_a_sampler_that_breaks_its_contract_is_told():
    with pytest.raises(RuntimeError, match="asked for twice"):
        run_script(*[Rollouts.of([1], -1, 0, 4, [5], 0, False)] * 2)
    with pytest.raises(RuntimeError, match="does not fit"):
        run_script(Rollouts.of([1], -1, 5, 4, [5], 0, False))
    with pytest.raises(RuntimeError, match="not kept"):
        run_script(Rollouts.of([1], 7, 0, 4, [5], 0, False))


class Greedy:
    """Asks for what it may not."""

    def init(self, plan):
        return []

    def ask(self, state, room):
        state.append(len(state))
        return Rollouts.from_prior([state[-1]], [state[-1]], 0, 10, True)

    def tell(self, state, walked):
        pass

    def done(self, state):
        return len(state) > 100

    def result(self, state):
        raise AssertionError("it was stopped before")


@pytest.mark.parametrize("budget", [{"nfe": 55}, {"reward_calls": 5}])
def test_a_sampler_cannot_overrun_its_budget(budget):
    model = brownian()
    with pytest.raises(RuntimeError, match="asked for walks beyond"):
        sample(model, first, Greedy(), **budget, **QUIET)
    assert sum(model.denoiser.rows_seen) <= 55


def test_what_is_scored_when_the_clock_runs_out_is_kept():
    def slow(items, prompts):
        time.sleep(0.3)
        return items[:, 0]

    run = sample(brownian(), slow, BestOfN(500), seconds=0.1, **QUIET)
    assert run.status == "seconds"
    assert run.distinct == int(run.spent.reward_calls) > 0


@pytest.mark.parametrize("end", ["clock", "ctrl-c"])
def test_no_other_reward_call_begins_once_a_run_is_to_end(end):
    began: list[float] = []

    def slow(items, prompts):
        began.append(time.monotonic())
        time.sleep(1)
        return items[:, 0]

    presser = threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT))
    if end == "ctrl-c":
        presser.start()
    limit = 0.4 if end == "clock" else None
    # eight walks arrive at a time, so a second call waits when the first one begins
    run = sample(brownian(), slow, BestOfN(500), seconds=limit, batch=8, **QUIET)
    presser.cancel()
    assert run.status == ("seconds" if end == "clock" else "interrupted")
    assert len(began) == 1
    assert run.distinct == 8


def test_a_reward_that_returns_nothing_is_a_mistake_and_no_failed_item():
    with pytest.raises(ValueError, match="returned None"):
        sample(brownian(), lambda items, prompts: None, BestOfN(5), **QUIET)


def test_an_item_whose_decoding_raises_has_failed_alone():
    def fragile(x):
        if (x > 1.5).any():
            raise RuntimeError("out of memory, say")
        return x

    run = sample(replace(brownian(), decode=fragile), first, BestOfN(100), **QUIET)
    assert 0 < run.failed < 40
    assert run.distinct == 100 - run.failed
    assert run.spent.first_error is not None
    assert "out of memory" in run.spent.first_error


# --- λ by its target ---------------------------------------------------------------------------


def test_lam_is_found_by_its_divergence():
    """N(0, 1) tilted by exp(λ x) is N(λ, 1), at KL λ²/2 nats: kl = .5 is λ = 1."""
    nfe = 30_000  # a pilot of 256 walks
    run = sample(brownian(), first, Importance(), nfe=nfe, kl=0.5, **QUIET)
    # λ is the solution of KL_n(λ) = .5; its spread is of order 1/sqrt(n) in KL, so as in λ
    assert abs(run.lam - 1) < 5 / math.sqrt(256)
    assert run.nfe <= nfe
    assert run.nfe == int(run.spent.reward_calls) * 10


def test_lam_is_found_by_its_sample_size():
    """E[w]² / E[w²] = exp(-λ²) for N(0, 1): ess = exp(-1) is λ = 1."""
    run = sample(brownian(), first, Importance(), nfe=30_000, ess=math.exp(-1), **QUIET)
    assert abs(run.lam - 1) < 5 / math.sqrt(256)


def test_the_pilot_keeps_every_limit():
    """reward_calls bound it like nfe does, and what cannot run is refused before it."""
    for budget in ({"reward_calls": 20}, {"nfe": 300}):
        model = brownian()
        with pytest.raises(ValueError, match=f"{next(iter(budget))}=.* is too small"):
            sample(model, first, Importance(), kl=0.5, **budget, **QUIET)
        assert model.denoiser.rows_seen == []
    run = sample(brownian(), first, Importance(), reward_calls=640, kl=0.5, **QUIET)
    assert run.spent.reward_calls.tolist() == [640]
    assert run.distinct == 640 - 64  # a tenth went to the pilot
    model = brownian()
    with pytest.raises(ValueError, match="branch"):
        sample(model, first, TreeSampling(branch=(99,)), nfe=3000, kl=0.5, **QUIET)
    assert model.denoiser.rows_seen == []


def test_a_target_that_rests_on_few_walks_warns():
    # 16 walks show at most log 16 = 2.8 nats; 2.3 nats leave less than two of them
    with pytest.warns(UserWarning, match="effective walks"):
        sample(brownian(), first, Importance(), nfe=1000, kl=2.3, **QUIET)


def test_a_target_that_no_pilot_can_show_is_refused():
    with pytest.raises(ValueError, match="aim lower"):
        sample(brownian(), first, Importance(), nfe=30_000, kl=8.0, **QUIET)
    with pytest.raises(ValueError, match="no spread"):
        sample(brownian(), lambda x, p: x[:, 0] * 0, Importance(), nfe=30_000, kl=0.5, **QUIET)


# --- what comes back ---------------------------------------------------------------------------


def test_draws_are_distinct_items_with_counts():
    run = sample(brownian(), first, Importance(50), draws=1000, lam=1.0, **QUIET)
    assert int(run.counts.sum()) == 1000
    assert len(run.ids.unique()) == run.distinct <= 50
    # stratified: an item of weight w is drawn n w times, to less than 2
    assert ((run.counts - 1000 * run.weights).abs() < 2).all()


def test_the_summary_tells_what_was_spent():
    run = sample(brownian(), first, Importance(), nfe=1000, draws=10, also=[_second], **QUIET)
    text = str(run)
    for said in ("1000 network rows", "100 reward calls", "held out, _second", "ESS", "log Z"):
        assert said in text
    assert run.also["_second"].tolist() == run.items[:, 1].tolist()


def test_the_summary_of_weighted_items_is_their_weighted_mean():
    run = sample(brownian(), first, Importance(), nfe=2000, also=[_second], **QUIET)
    mean = float((run.weights * run.rewards).sum())
    assert f"mean {mean:.4f}" in str(run)
    assert abs(mean - float(run.rewards.mean())) > 0.5  # tilted: 1 against 0
    ranked = sample(brownian(), first, BestOfN(), nfe=2000, **QUIET)
    assert f"mean {float(ranked.rewards.mean()):.4f}" in str(ranked)


def test_the_published_law_is_labelled():
    run = sample(brownian(), first, TreeSampling(law="published"), nfe=1000, **QUIET)
    assert "BIASED: drawn by the published law" in str(run)
    assert not sample(brownian(), first, TreeSampling(), nfe=1000, **QUIET).biased


def _second(items, prompts):
    return items[:, 1]


def test_images_of_what_is_no_image_are_refused():
    with pytest.raises(TypeError, match=r"use \.items"):
        _ = sample(brownian(), first, BestOfN(3), **QUIET).images
