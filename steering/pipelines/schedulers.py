"""Reads a diffusers scheduler's tables, once, into a Gaussian chain. No scheduler is ever stepped.

A scheduler object carries a hidden cursor and is right for one particle at a time; its grid and its
levels are all that a chain needs. A fresh one is made from the given one's configuration.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steering.gaussian import (
    Clamp,
    DynamicThreshold,
    GaussianProcess,
    Kernel,
    Prediction,
    consistency_kernel,
    ddim_kernel,
    ddpm_kernel,
)

STRIDED = ("DDIM", "DDIMParallel", "PNDM", "CogVideoXDDIM", "CogVideoXDPM")
DIFFUSION = (*STRIDED, "DDPM", "DDPMParallel", "LCM", "TCD")
EXPLODING = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete")
SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep")
FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
HIGHER_ORDER = ("PNDM", "CogVideoXDPM", "HeunDiscrete", "LMSDiscrete", *SOLVERS, FLOWS[1])
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}
SUPPORTED = DIFFUSION + EXPLODING + SOLVERS + FLOWS


def read_scheduler(
    scheduler: Any,
    shape: tuple[int, ...],
    *,
    steps: int,
    eta: float | None = None,
    mu: float | None = None,
    even: bool = False,
) -> tuple[GaussianProcess, Prediction]:
    """The chain on a scheduler's own grid, and what its network puts out.

    With `eta=None` a scheduler's own stochastic kernel where it has one (DDPM's posterior, the
    re-noising of LCM, TCD and stochastic flow matching), else DDIM's or the flow's with eta = 1.
    With a number, DDIM's kernel or the flow's with this eta: 0 is exactly DDIM, Euler or
    FlowMatchEuler; 1 is exactly Euler-ancestral. TCD has its own eta (gamma), LCM has none.
    Variance-exploding grids are run in variance-preserving coordinates, x / sqrt(sigma² + 1).

    Args:
        scheduler: a diffusers scheduler; left as it is.
        shape: D, shape of one state.
        steps: T.
        eta: share of new noise in 0..1, or None.
        mu: dynamic shift, for schedulers with `use_dynamic_shifting`.
        even: the pipeline sets FlowMatchEuler's sigmas to 1, 1 - 1/T, ..., 1/T, before any shift.

    Raises:
        ValueError: a scheduler, a setting or a number of steps that is not honoured, by name.

    Warns:
        UserWarning: a solver of higher order; its grid is run with the first-order kernel.
    """
    name = check_scheduler(scheduler)
    return read_grid(_on_grid(scheduler, name, steps, mu, even), shape, eta=eta)


def check_scheduler(scheduler: Any) -> str:
    """The short name of a scheduler whose tables can be read.

    Raises:
        ValueError: a scheduler or a setting of it that is not honoured, by name.
    """
    name = type(scheduler).__name__.removesuffix("Scheduler")
    if name not in SUPPORTED or not type(scheduler).__module__.startswith("diffusers."):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is not supported: use one of "
            f"{', '.join(SUPPORTED)} (as {{}}Scheduler), for example "
            "DDIMScheduler.from_config(pipe.scheduler.config)."
        )
    _refuse_unknown_settings(name, scheduler.config)
    return name


def read_grid(
    scheduler: Any, shape: tuple[int, ...], *, eta: float | None = None
) -> tuple[GaussianProcess, Prediction]:
    """`read_scheduler` of a scheduler that passed `check_scheduler` and has its grid set."""
    name, config = type(scheduler).__name__.removesuffix("Scheduler"), scheduler.config
    if name in DIFFUSION:
        process = _diffusion(scheduler, name, shape, eta)
    else:
        process = _from_sigmas(scheduler, name, shape, eta)
    first_order = name.startswith("DPMSolver") and config.solver_order == 1
    if not first_order and name in HIGHER_ORDER:
        kernel = "Euler" if name in FLOWS else "DDIM"
        warnings.warn(
            f"{type(scheduler).__name__} is a solver of higher order: its grid is run with the "
            f"first-order {kernel} kernel (eta={1.0 if eta is None else eta}).",
            stacklevel=6,
        )
    return process, _prediction(config, name)


def _refuse_unknown_settings(name: str, config: Any) -> None:
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    refused = {
        "variance_type": str(config.get("variance_type")).startswith("learned")
        or config.get("variance_type") == "fixed_large_log",
        "invert_sigmas": bool(config.get("invert_sigmas")),
        "interpolation_type": config.get("interpolation_type") == "log_linear",
        "use_flow_sigmas": bool(flows)
        and not (config.get("use_flow_sigmas") and config.prediction_type == "flow_prediction"),
        "prediction_type": name not in FLOWS and config.prediction_type not in PREDICTIONS,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{name}Scheduler with {setting}={config.get(setting)!r} is not supported: "
                "give the pipeline another scheduler or model."
            )


def _prediction(config: Any, name: str) -> Prediction:
    return "flow" if name in FLOWS else PREDICTIONS[config.prediction_type]


def _on_grid(scheduler: Any, name: str, steps: int, mu: float | None, even: bool) -> Any:
    """A fresh scheduler of the same configuration with its grid of `steps` set."""
    limit = scheduler.config.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= limit:
        raise ValueError(
            f"steps={steps!r} is no number of steps: give an int from 1 to {limit}, "
            "the model's training steps."
        )
    # this entry lists what was a default once, and would undo what a pipeline has changed since
    settings = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    if name == "PNDM":  # its warm-up adds times for Runge-Kutta stages; the grid is the same
        settings["skip_prk_steps"] = True
    fresh = type(scheduler).from_config(settings)
    more: dict[str, Any] = {"mu": mu} if scheduler.config.get("use_dynamic_shifting") else {}
    if name == "FlowMatchEulerDiscrete":
        fresh.set_shift(scheduler.shift)
        if even:
            more["sigmas"] = [1 - i / steps for i in range(steps)]
    try:
        fresh.set_timesteps(steps, **more)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{name}Scheduler has no grid of steps={steps}: {error}") from error
    return fresh


def _bound(config: Any) -> Clamp | DynamicThreshold | None:
    if config.get("thresholding"):
        return DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
    if config.get("clip_sample"):
        return Clamp(float(config.clip_sample_range))
    return None


def _diffusion(fresh: Any, name: str, shape: tuple[int, ...], eta: float | None) -> GaussianProcess:
    """Schedulers whose levels are alphas_cumprod at whole-numbered times."""
    config = fresh.config
    t = fresh.timesteps.long().cpu().unique().flip(0)  # PNDM visits one time twice
    products = fresh.alphas_cumprod.double().cpu()
    after = torch.cat([t[1:], torch.full_like(t[:1], -1)])
    if name in STRIDED:
        # these go down by a fixed stride, also where their own grid does not
        after = t - config.num_train_timesteps // fresh.num_inference_steps
    final = torch.as_tensor(getattr(fresh, "final_alpha_cumprod", 1.0)).double()
    product_to = torch.where(after >= 0, products[after.clamp(min=0)], final)
    alpha, sigma = products[t].sqrt(), (1 - products[t]).sqrt()
    alpha_to, sigma_to = product_to.sqrt(), (1 - product_to).sqrt()
    bound = None if name.startswith("CogVideoX") else _bound(config)  # which these ignore
    if name == "LCM":
        if eta not in (None, 1):
            raise ValueError(
                f"eta={eta} has no meaning for LCMScheduler, which re-noises fully: leave it out."
            )
        alpha_to[-1], sigma_to[-1] = 1, 0  # its last step ends clean, whatever the final alpha
        kernel = _lcm(t, alpha_to, sigma_to, config)
    elif name == "TCD":
        bound = None  # it ignores its clipping settings
        product_to = products[after.clamp(min=0)]
        alpha_to, sigma_to = product_to.sqrt(), (1 - product_to).sqrt()
        kernel = _tcd(after.clamp(min=0), products, 0.3 if eta is None else eta)
    elif name.startswith("DDPM") and eta is None:
        large = config.variance_type == "fixed_large"
        kernel = ddpm_kernel(alpha, sigma, alpha_to, sigma_to, large=large)
        kernel = replace(kernel, std=torch.where(t > 0, kernel.std, 0.0))
    else:
        kernel = ddim_kernel(alpha, sigma, alpha_to, sigma_to, 1.0 if eta is None else eta)
    return GaussianProcess(
        shape,
        t.float(),
        torch.cat([alpha, alpha_to[-1:]]),
        torch.cat([sigma, sigma_to[-1:]]),
        kernel,
        bound=bound,
    )


def _lcm(t: Tensor, alpha_to: Tensor, sigma_to: Tensor, config: Any) -> Kernel:
    """Re-noising of c_out · clean + c_skip · x (arXiv:2310.04378; sigma_data = .5)."""
    scaled = (t * config.timestep_scaling).double()
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    kernel = consistency_kernel(alpha_to * out, sigma_to)
    return replace(kernel, on_x=alpha_to * skip)


def _tcd(t_to: Tensor, products: Tensor, gamma: float) -> Kernel:
    """Jump down to (1 - gamma) · t' and come back up with new noise (arXiv:2402.19159)."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"eta={gamma} is no share of noise: give a number from 0 (ODE) to 1.")
    low, high = products[((1 - gamma) * t_to).floor().long()], products[t_to]
    ratio = high / low
    zero = torch.zeros_like(high)
    return Kernel(zero, high.sqrt(), (ratio * (1 - low)).sqrt(), (1 - ratio).clamp(min=0).sqrt())


def _from_sigmas(
    fresh: Any, name: str, shape: tuple[int, ...], eta: float | None
) -> GaussianProcess:
    """Schedulers whose levels are a table of sigmas, one more than there are times."""
    config = fresh.config
    times, sigmas = fresh.timesteps.float().cpu(), fresh.sigmas.double().cpu()
    if name in ("HeunDiscrete", "FlowMatchHeunDiscrete"):  # each level but the first comes twice
        times = torch.cat([times[:1], times[1::2]])
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])
    times = _distinct(times)
    if name in FLOWS or config.get("use_flow_sigmas"):
        alpha, sigma = 1 - sigmas, sigmas
    else:
        alpha = (sigmas.square() + 1).rsqrt()
        sigma = sigmas * alpha
    levels = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    if config.get("stochastic_sampling") and eta is None:
        kernel = consistency_kernel(alpha[1:], sigma[1:])
    else:
        kernel = ddim_kernel(*levels, 1.0 if eta is None else eta)
    bound = _bound(config)
    if bound is not None:
        kernel = _noise_from_bounded(kernel, alpha[:-1], sigma[:-1])
    exploding = name in EXPLODING
    prior = float(fresh.init_noise_sigma) * float(alpha[0]) if exploding else 1.0
    return GaussianProcess(shape, times, alpha, sigma, kernel, prior, bound)


def _noise_from_bounded(kernel: Kernel, alpha: Tensor, sigma: Tensor) -> Kernel:
    """These solvers clip first and take the noise from what is left, unlike DDIM."""
    return Kernel(
        kernel.on_x + kernel.on_eps / sigma,
        kernel.on_clean - kernel.on_eps * alpha / sigma,
        torch.zeros_like(kernel.on_eps),
        kernel.std,
    )


def _distinct(times: Tensor) -> Tensor:
    """Times that name one level each: where rounding made a grid repeat one, it is nudged down."""
    times = times.clone()
    for i in range(1, len(times)):
        if times[i] >= times[i - 1]:
            below = torch.nextafter(times[i - 1], times.new_tensor(-torch.inf))
            times[i] = torch.minimum(below, times[i - 1] - 1e-6)
    return times
