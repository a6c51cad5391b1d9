"""The closed forms themselves: against samples of our own chains, and against quadrature."""

import math

import pytest
import torch

from samplers import Ancestral, sample
from tests.exact import Checkerboard, Modes, finite_chain, gaussian_chain, mmd, tilted


@pytest.mark.parametrize(
    ("kind", "eta"),
    [(kind, eta) for kind in ("vp", "flow") for eta in (1.0, 0.5, 0.0)] + [("student", 1.0)],
)
def test_the_gaussian_chain_ends_in_the_law_pushed_forward(kind, eta):
    model = gaussian_chain([1.0, -2.0], [0.5, 2.0], steps=8, dim=2, kind=kind, eta=eta)
    x = sample(model, lambda x, _: x[:, 0], Ancestral(4000), batch=1024, progress=False).items
    mean, var = model.denoiser.law()
    x = x.double()
    assert ((x.mean(0) - mean).abs() < 3.5 * (var / len(x)).sqrt()).all()
    # the variance of a normal sample has relative standard error sqrt(2 / n)
    assert ((x.var(0) / var - 1).abs() < 3.5 * math.sqrt(2 / len(x))).all()


def test_the_finite_chain_ends_in_the_law_enumerated():
    model = finite_chain()
    law = model.process.law()
    assert law.sum() == pytest.approx(1, abs=1e-12)
    items = sample(
        model, lambda x, _: x[:, 0, 0], Ancestral(4000), batch=1024, progress=False
    ).items
    count = torch.bincount(model.process.index(items.argmax(-1)), minlength=len(law))
    expected = 4000 * law
    # chi-square with 8 degrees of freedom: above 30.1 once in 5,000
    assert ((count - expected) ** 2 / expected).sum() < 30.1


def test_the_tilt_of_a_normal_by_quadrature():
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    mean, var = torch.tensor([0.7]).double(), torch.tensor([1.3]).double()
    log_p = -((x - mean) ** 2) / (2 * var) - 0.5 * math.log(2 * math.pi * var)
    mass = (log_p + 0.8 * x - 0.6 * x**2 / 2).exp() * (x[1] - x[0])
    new_mean, new_var, log_z = tilted(mean, var, 0.8, 0.6)
    assert math.log(mass.sum()) == pytest.approx(log_z, abs=1e-9)
    found = (mass * x).sum() / mass.sum()
    assert found == pytest.approx(float(new_mean), abs=1e-9)
    assert (mass * (x - found) ** 2).sum() / mass.sum() == pytest.approx(float(new_var), abs=1e-9)


def grid(limit: float, n: int) -> torch.Tensor:
    """[n², 2] midpoints of cells that cover the square."""
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * limit - limit
    return torch.cartesian_prod(middle, middle)


def densities():
    points = grid(6.0, 600)
    modes = Modes()
    gap = (points[:, None] - modes.means).square().sum(2)
    yield modes, points, (-gap / (2 * modes.std**2)).exp().sum(1)
    points = grid(4.0, 400)
    board = Checkerboard()
    cell = ((points + 4) // 2).long()
    yield board, points, board.dark[cell[:, 0], cell[:, 1]]


@pytest.mark.parametrize(("density", "points", "p"), list(densities()), ids=["modes", "board"])
def test_densities_in_the_plane_by_quadrature(density, points, p):
    tilt = p * density.reward(points).exp()
    assert math.log(tilt.sum() / p.sum()) == pytest.approx(density.log_z, abs=2e-4)
    for alpha, sigma, x in ((0.05, 1.0, (0.3, -1.0)), (0.7, 0.7, (2.5, 0.4)), (0.9, 0.4, (5, -3))):
        at = torch.tensor([x], dtype=torch.float64)
        near = p * (-(at - alpha * points).square().sum(1) / (2 * sigma**2)).exp()
        mean = (near[:, None] * points).sum(0) / near.sum()
        level = torch.tensor([[alpha]]).double(), torch.tensor([[sigma]]).double()
        assert torch.allclose(density.clean(at, *level)[0], mean, atol=2e-3)
    n = 20_000
    for law, target in ((tilt, True), (p, False)):
        draws = density.draw(n, torch.Generator().manual_seed(1), target=target)
        mean = (law[:, None] * points).sum(0) / law.sum()
        assert ((draws.mean(0) - mean).abs() < 4 * draws.std(0) / n**0.5).all()


def test_far_from_all_squares_the_guess_stays_on_the_board():
    x = torch.tensor([[400.0, -300.0]], dtype=torch.float64)
    level = torch.tensor([[0.999]]).double(), torch.tensor([[0.01]]).double()
    clean = Checkerboard().clean(x, *level)
    assert clean.isfinite().all()
    assert clean.abs().max() <= 4


@pytest.mark.parametrize(("density", "points", "p"), list(densities()), ids=["modes", "board"])
def test_kernel_distances_to_the_law_itself(density, points, p):
    mass = p * density.reward(points).exp()
    heavy = mass > 1e-9 * mass.max()
    y, q = points[heavy], mass[heavy] / mass[heavy].sum()
    x = torch.tensor([[0.3, -0.2], [2.0, 1.0], [-4.0, 0.1]], dtype=torch.float64)
    width = 0.8
    kernel = (-torch.cdist(x, y).square() / (2 * width**2)).exp() @ q
    assert torch.allclose(density.near(x, width), kernel, atol=1e-4)
    draws = density.draw(4000, torch.Generator().manual_seed(3))
    own = density.near(draws, width)
    assert abs(float(own.mean()) - density.own(width)) < 4 * float(own.std()) / math.sqrt(4000)
    # exact draws are near, by about sqrt((1 - own) / n); those of the untilted law are not
    equal = torch.full((4000,), 1 / 4000, dtype=torch.float64)
    floor = math.sqrt((1 - density.own(width)) / 4000)
    assert mmd(draws, equal, density, width) < 2 * floor
    plain = density.draw(4000, torch.Generator().manual_seed(3), target=False)
    assert mmd(plain, equal, density, width) > 10 * floor
