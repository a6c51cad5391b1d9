"""Every supported scheduler's grid and kernel against its own `step`, with the same noise."""

import importlib
import warnings

import diffusers
import pytest
import torch

from steering import noise
from steering.gaussian import ToClean
from steering.pipelines.schedulers import read_scheduler

SHAPE = (2, 3, 3)
KEY = noise.root_key(5, torch.arange(4))


def network(x, t):
    """A smooth function of state and time: chains agree on it only if states and times do."""
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return 0.8 * x + 0.3 * torch.sin(2 * x + t / 150)


def ours(scheduler, **options):
    process, prediction = read_scheduler(scheduler, SHAPE, **options)
    to_clean = ToClean(process, prediction)
    x = process.prior(KEY)
    for step in range(process.steps):
        i = torch.full((len(x),), step)
        t = process.time(i)
        clean = to_clean(network(x, t), x, t)
        x = process.transition(x, i, clean).sample(noise.child_key(KEY, step))
    return process, x


def theirs(scheduler, steps, monkeypatch, mu=None, **options):
    """The scheduler's own loop, as pipelines run it, with the noise that our chain draws."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    module = importlib.import_module(type(scheduler).__module__)
    step = 0

    def keyed(shape, **_):
        return noise.normal(noise.child_key(KEY, step), shape[1:])

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", keyed)
    start = noise.normal(KEY, SHAPE)
    x = start * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else start
    for step, t in enumerate(scheduler.timesteps):  # noqa: B007 -- `keyed` reads the step
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **options).prev_sample
    last = getattr(scheduler, "sigmas", torch.zeros(1))[-1]
    return x / (last**2 + 1).sqrt() if "Euler" in type(scheduler).__name__ else x


def check(scheduler, steps, monkeypatch, tolerance=1e-4, *, eta=None, step_options=None, **grid):
    process, mine = ours(scheduler, steps=steps, eta=eta, **grid)
    reference = theirs(scheduler, steps, monkeypatch, **grid, **(step_options or {}))
    # float32 rounding, at most some 1e-6 of the values per step: the project's figure for parity
    torch.testing.assert_close(mine, reference, atol=tolerance, rtol=0)
    return process


DIFFUSION = {
    "leading": {},
    "leading-offset": {"steps_offset": 1, "set_alpha_to_one": False},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "clip-off": {"clip_sample": False},
    "clip-range": {"clip_sample_range": 2.0},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "cosine-v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "zero-snr": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
}


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("config", DIFFUSION.values(), ids=DIFFUSION)
@pytest.mark.parametrize("steps", [7, 10])
def test_ddim(config, steps, eta, monkeypatch):
    # 7 does not divide 1000: DDIM then steps to times that it never visits
    if config.get("rescale_betas_zero_snr") and eta == 1.0:
        pytest.skip("the scheduler's own step takes the root of a rounding error below 0: nan")
    scheduler = diffusers.DDIMScheduler(**config)
    process = check(scheduler, steps, monkeypatch, eta=eta, step_options={"eta": eta})
    assert process.stochastic[:-1].all() == (eta > 0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("config", [*DIFFUSION], ids=[*DIFFUSION])
def test_ddpm(config, variance, monkeypatch):
    settings = {k: v for k, v in DIFFUSION[config].items() if k != "set_alpha_to_one"}
    check(diffusers.DDPMScheduler(variance_type=variance, **settings), 10, monkeypatch)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("config", [{}, {"clip_sample": True, "prediction_type": "v_prediction"}])
def test_few_step_students(config, steps, monkeypatch):
    process = check(diffusers.LCMScheduler(**config), steps, monkeypatch)
    assert process.stochastic.tolist() == [True] * (steps - 1) + [False]
    for gamma in (0.0, 0.3, 1.0):
        tcd = diffusers.TCDScheduler(**config)
        check(tcd, steps, monkeypatch, eta=gamma, step_options={"eta": gamma})


EXPLODING = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing-v": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sigma-min": {"final_sigmas_type": "sigma_min"},
    "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    "zero-snr": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "sample": {"prediction_type": "sample"},
}


@pytest.mark.parametrize("config", EXPLODING.values(), ids=EXPLODING)
def test_euler(config, monkeypatch):
    check(diffusers.EulerDiscreteScheduler(**config), 9, monkeypatch, eta=0.0)


@pytest.mark.parametrize("config", ["linspace", "leading", "trailing-v", "zero-snr"])
def test_euler_ancestral_is_eta_1(config, monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**EXPLODING[config])
    check(scheduler, 9, monkeypatch)


FLOWS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "terminal": {"shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
    "renoise": {"stochastic_sampling": True},
}


@pytest.mark.parametrize("config", FLOWS.values(), ids=FLOWS)
def test_flow(config, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    eta = None if config.get("stochastic_sampling") else 0.0
    check(scheduler, 9, monkeypatch, eta=eta)


@pytest.mark.parametrize("mu", [0.4, 1.2])
def test_dynamic_shift(mu, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    check(scheduler, 9, monkeypatch, eta=0.0, mu=mu)


def test_a_shift_set_by_hand_is_kept():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(5.0)
    by_config = diffusers.FlowMatchEulerDiscreteScheduler()
    by_hand, _ = read_scheduler(scheduler, SHAPE, steps=5)
    plain, _ = read_scheduler(by_config, SHAPE, steps=5)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(by_hand.sigma.float(), scheduler.sigmas)
    assert not torch.equal(by_hand.sigma, plain.sigma)


SOLVERS = {
    "plain": {},
    "karras": {"use_karras_sigmas": True},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5},
    "leading-v": {"timestep_spacing": "leading", "prediction_type": "v_prediction"},
    "sigma-min": {"final_sigmas_type": "sigma_min"},
    "flow": {
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    },
}


@pytest.mark.parametrize("config", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_first_order_solver_is_exact_and_says_nothing(config, algorithm, monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=1, algorithm_type=algorithm, **config
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(scheduler, 9, monkeypatch, eta=float(algorithm.startswith("sde")))


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "DEISMultistep",
        "UniPCMultistep",
        "HeunDiscrete",
        "LMSDiscrete",
        "PNDM",
        "FlowMatchHeunDiscrete",
    ],
)
def test_higher_order_solvers_run_first_order_on_their_own_grid(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    with pytest.warns(UserWarning, match=rf"{name}Scheduler.* first-order") as caught:
        process, _ = read_scheduler(scheduler, SHAPE, steps=10, eta=0.5)
    assert sum(issubclass(warning.category, UserWarning) for warning in caught) == 1
    scheduler.set_timesteps(10)
    assert process.steps == 10
    assert (process.times[1:] < process.times[:-1]).all()
    visited = set(scheduler.timesteps.float().tolist())
    if name == "PNDM":  # whose Runge-Kutta warm-up visits times between those of its grid
        visited = set(scheduler._timesteps.tolist())
    assert {round(t, 2) for t in process.times.tolist()} == {round(t, 2) for t in visited}
    # the levels go from noise to data
    snr = process.alpha / process.sigma
    assert (snr[1:] >= snr[:-1]).all()


def test_repeated_times_keep_their_own_levels():
    # rounded Karras times repeat at low noise
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, solver_order=1)
    scheduler.set_timesteps(100)
    assert len(scheduler.timesteps.unique()) < 100
    process, kind = read_scheduler(scheduler, SHAPE, steps=100)
    assert len(process.times.unique()) == 100
    assert (process.times - scheduler.timesteps).abs().max() < 1e-4
    i = torch.arange(100)
    x = torch.ones(100, *SHAPE)
    clean = ToClean(process, kind)(torch.zeros_like(x), x, process.time(i))
    torch.testing.assert_close(clean[:, 0, 0, 0], 1 / process.alpha[:-1].float())


def test_the_scheduler_is_left_as_it_was():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    read_scheduler(scheduler, SHAPE, steps=9)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.step_index is None


class OwnStep(diffusers.DDIMScheduler):
    pass


@pytest.mark.parametrize(
    ("scheduler", "options", "words"),
    [
        (diffusers.EDMEulerScheduler(), {}, "EDMEulerScheduler is not supported"),
        (diffusers.KDPM2DiscreteScheduler(), {}, "KDPM2DiscreteScheduler is not supported"),
        (OwnStep(), {}, "OwnStep is not supported"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), {}, "variance_type='learned_r"),
        (diffusers.DDPMScheduler(variance_type="fixed_large_log"), {}, "fixed_large_log"),
        (diffusers.DDIMScheduler(prediction_type="mystery"), {}, "'mystery'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "invert_sigmas"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), {}, "use_flow_sigmas"),
        (diffusers.DDIMScheduler(), {"steps": 0}, "steps=0"),
        (diffusers.DDIMScheduler(), {"steps": 1001}, "steps=1001"),
        (diffusers.DDIMScheduler(), {"steps": 2.5}, "steps=2.5"),
        (diffusers.DDIMScheduler(), {"eta": 2.0}, "eta=2.0"),
        (diffusers.TCDScheduler(), {"eta": -1.0}, "eta=-1.0"),
        (diffusers.LCMScheduler(), {"eta": 0.0}, "LCMScheduler"),
        (diffusers.LCMScheduler(), {"steps": 60}, "no grid of steps=60"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            {},
            "no grid of steps=10",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_honoured_is_refused_by_name(scheduler, options, words):
    with pytest.raises(ValueError, match=words):
        read_scheduler(scheduler, SHAPE, **{"steps": 10, **options})
