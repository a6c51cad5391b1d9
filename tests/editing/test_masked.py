"""FlowChef's edit against closed forms, on straight and on Gaussian flows."""

from __future__ import annotations

import pytest
import torch

from samplers import Ancestral, Importance, sample
from steering import FlowChefEdit
from steering.core import Model
from steering.editing.masked import PUBLISHED
from steering.gaussian import flow, vp
from tests.editing.gaussians import Gaussians

D, T = (2, 4), 6
SOURCE = torch.linspace(-2, 2, 8).view(D)
MASK = torch.tensor([[1.0, 1, 0, 0], [1, 0.25, 0, 0]])
OPTIONS = {"progress": False, "weights": "none"}


def nothing(items, prompts):
    return items.new_zeros(len(items))


def gaussians(eta=0.0, spread=(0.5, 0.5), kind="flow", mean=(1.0, -1.0)) -> Model:
    """Two conditions, N(mean, spread²) each."""
    levels = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    bar = torch.linspace(0.02, 1, T + 1, dtype=torch.float64)
    process = flow(D, levels, eta=eta) if kind == "flow" else vp(D, bar, eta=eta)
    return Model(Gaussians(process, mean, spread), process, prompts=("edit", "base"))


def run(model, guidance, n=3, **options):
    return sample(model, nothing, Ancestral(n), guidance=guidance, **{**OPTIONS, **options})


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_full_mask_and_a_whole_step_return_the_source(eta):
    for model in (gaussians(eta), gaussians(eta, kind="vp")):
        edit = FlowChefEdit(SOURCE, torch.ones(1), step=1.0)
        # a guess near 1 moved to values up to 2: one float32 rounding
        torch.testing.assert_close(run(model, edit).items, SOURCE.expand(6, *D), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_no_step_and_no_scale_is_plain_sampling_to_the_bit(eta):
    model = gaussians(eta)
    edit = FlowChefEdit(SOURCE, MASK, base=1, scale=0.0, step=0.0, inner=3)
    edited, plain = run(model, edit), run(model, None)
    assert torch.equal(edited.items, plain.items)
    assert edited.spent.rows.tolist() == plain.spent.rows.tolist() == [3 * T] * 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_kept_is_the_source_and_the_rest_follows_the_sum_of_guesses(eta):
    """Outside of the mask nothing pulls, so that it is the chain of the denoiser
    c_edit + s (c_edit - c_base), run by itself."""
    model, scale = gaussians(eta), 1.5
    mask = (MASK == 1).float()
    items = run(model, FlowChefEdit(SOURCE, mask, base=1, scale=scale, step=1.0)).items

    class Sum(Gaussians):
        def __call__(self, x, t, row):
            edit = super().__call__(x, t, row)
            return edit + scale * (edit - super().__call__(x, t, torch.ones_like(row)))

    alone = Model(Sum(model.process, (1.0, -1.0), (0.5, 0.5)), model.process, prompts=("edit", "b"))
    other = run(alone, None).items
    kept = mask > 0
    torch.testing.assert_close(items[:, kept], SOURCE[kept].expand(6, -1), rtol=0, atol=1e-6)
    # float32, T steps of values up to 10
    torch.testing.assert_close(items[:, ~kept], other[:, ~kept], rtol=0, atol=1e-5)
    assert (items[:3] - run(model, None).items[:3])[:, ~kept].abs().min() > 0.1


def test_half_a_mask_gives_half_of_the_scale():
    """A last step to sigma = 0 ends in the guess: with point masses a and b it is known."""
    model = gaussians(spread=(0.0, 0.0))
    edit = FlowChefEdit(SOURCE, torch.full(D, 0.5), base={0: 1}, scale=3.0, step=0.0)
    items = run(model, edit, n=1)
    a, b = 1.0, -1.0
    found = items.items[items.rows == 0][0]
    torch.testing.assert_close(found, torch.full(D, a + 0.5 * 3 * (a - b)), rtol=0, atol=1e-5)
    # the condition that has no base is sampled plainly
    torch.testing.assert_close(items.items[items.rows == 1][0], torch.full(D, b), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", [1, 2])
def test_each_move_removes_its_share_and_full_source_its_share_of_everything(inner):
    """On point masses every guess is a before the pull, so the last guess is known: it is what a
    step of share p leaves, and one that the whole image takes part in while it lasts."""
    model, p = gaussians(spread=(0.0, 0.0)), 0.3
    a, left = 1.0, (1 - p) ** inner
    settings = {"step": p, "inner": inner}
    masked = run(model, FlowChefEdit(SOURCE, (MASK == 1).float(), **settings), n=1).items[0]
    full = run(model, FlowChefEdit(SOURCE, MASK * 0, full_source=1.0, **settings), n=1).items[0]
    expected = SOURCE + (a - SOURCE) * left
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(masked, torch.where(MASK == 1, expected, a), rtol=0, atol=1e-6)
    early = run(model, FlowChefEdit(SOURCE, MASK * 0, full_source=0.99, **settings), n=1).items[0]
    torch.testing.assert_close(early, torch.full(D, a), rtol=0, atol=1e-6)  # the last step is free
    late = FlowChefEdit(SOURCE, torch.ones(D), window=(0.0, 0.9), **settings)
    torch.testing.assert_close(run(model, late, n=1).items[0], torch.full(D, a), rtol=0, atol=1e-6)


def test_sources_and_masks_of_each_condition_are_its_own():
    model = gaussians()
    sources, masks = torch.stack([SOURCE, 3 - SOURCE]), torch.stack([MASK, 1 - MASK]).round()
    found = run(model, FlowChefEdit(sources, masks, step=1.0))
    for row in (0, 1):
        kept = masks[row] > 0
        items = found.items[found.rows == row][:, kept]
        torch.testing.assert_close(items, sources[row][kept].expand(3, -1), rtol=0, atol=1e-6)


def test_an_edit_costs_two_calls_and_a_base_that_edits_nothing_one():
    model = gaussians()
    spent = run(model, FlowChefEdit(SOURCE, MASK, base=1, scale=2.0)).spent
    assert spent.rows.sum() == model.denoiser.asked == 3 * 3 * T  # shared out among both
    alone = FlowChefEdit(SOURCE, MASK, base={0: 1, 1: 0}, scale=2.0)
    assert run(model, alone).spent.rows.tolist() == [3 * 2 * T] * 2


def test_weights_undo_the_edit():
    """E[w] = 1, and weighted draws have the plain chain's mean, which an affine denoiser's chain
    carries from step to step; the edit's own is far from it."""
    process = flow((1,), torch.tensor([1.0, 0.6, 0.3, 0.1]), eta=1.0)
    model = Model(Gaussians(process, (1.0, -1.0), (0.5, 0.5)), process, prompts=("e", "b"))
    both = {0: 1, 1: 0}
    edit = FlowChefEdit(torch.zeros(1), torch.full((1,), 0.5), both, scale=0.3, step=0.1)
    run = sample(model, nothing, Importance(4000), guidance=edit, progress=False)
    mean, row = torch.zeros(2, 1), torch.arange(2)
    for i in torch.arange(3):
        clean = model.denoiser(mean, process.time(i.expand(2)), row)
        mean = process.transition(mean, i.expand(2), clean).mean
    # 4000 draws of spread below 0.5 and weights of spread below 1: about 3 standard errors
    assert run.log_z.exp().tolist() == pytest.approx([1.0, 1.0], abs=0.06)
    for r in row:
        weighted = (run.weights * run.items[:, 0])[run.rows == r].sum()
        weighted /= run.weights[run.rows == r].sum()
        assert float(weighted) == pytest.approx(float(mean[r]), abs=0.03)
        assert abs(float(run.items[run.rows == r].mean() - mean[r])) > 0.06


def test_the_step_of_a_preset_is_the_published_update():
    """Plain descent on 1000 · mean (c - ref)² (FLUX), and Adam on 1e-5 · mean (InstaFlow), done by
    torch's own optimisers; Adam's epsilon hides its square only to first order: 20 %."""
    for model, size, weight, atol in (
        ("flux", 4096 * 64, 1000, 1e-6),
        ("instaflow", 16384, 1e-5, 0.2),
    ):
        preset = PUBLISHED[model, "attribute"]
        x = torch.ones(size, requires_grad=True)
        by = torch.optim.SGD if model == "flux" else torch.optim.Adam
        optimiser = by([x], lr=0.5)
        (weight * x.square().mean()).backward()
        optimiser.step()
        published = float(1 - x[0].detach())
        assert 2 * preset["step"] == pytest.approx(published, rel=max(atol, 2e-5))


def test_presets_are_those_of_the_table():
    edit = FlowChefEdit.published("instaflow", "pose", source=SOURCE, mask=MASK, base=1)
    assert (edit.scale, edit.inner, edit.full_source, edit.window) == (8.0, 2, 0.2, (0.0, 0.4))
    assert PUBLISHED["flux", "style"]["steps"] == 30
    assert FlowChefEdit.published("flux", "background", source=SOURCE, mask=MASK).scale == 0.0
    assert len(PUBLISHED) == 18


BAD = {
    "source": lambda: FlowChefEdit([1.0], MASK),
    "source-nan": lambda: FlowChefEdit(SOURCE * torch.nan, MASK),
    "mask": lambda: FlowChefEdit(SOURCE, MASK * 2),
    "base": lambda: FlowChefEdit(SOURCE, MASK, base=1.0),
    "base-map": lambda: FlowChefEdit(SOURCE, MASK, base={0: "1"}),
    "scale": lambda: FlowChefEdit(SOURCE, MASK, base=1, scale=-1.0),
    "scale-alone": lambda: FlowChefEdit(SOURCE, MASK, scale=2.0),
    "step": lambda: FlowChefEdit(SOURCE, MASK, step=-0.1),
    "rule": lambda: FlowChefEdit(SOURCE, MASK, rule="sgd"),
    "inner": lambda: FlowChefEdit(SOURCE, MASK, inner=0),
    "full_source": lambda: FlowChefEdit(SOURCE, MASK, full_source=5),
    "window": lambda: FlowChefEdit(SOURCE, MASK, window=(0.5, 0.5)),
    "task": lambda: FlowChefEdit.published("flux", "hat", source=SOURCE, mask=MASK),
}
UNFIT = {
    "source": FlowChefEdit(SOURCE[0], MASK),
    "source-count": FlowChefEdit(SOURCE.expand(3, *D), MASK),
    "mask": FlowChefEdit(SOURCE, torch.ones(3)),
    "mask-count": FlowChefEdit(SOURCE, torch.ones(3, *D)),
    "base": FlowChefEdit(SOURCE, MASK, base=2, scale=1.0),
    "base-key": FlowChefEdit(SOURCE, MASK, base={5: 1}, scale=1.0),
    "base-negative": FlowChefEdit(SOURCE, MASK, base=-1, scale=1.0),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_edit_is_refused_where_it_is_made(case):
    with pytest.raises((ValueError, TypeError), match=case.partition("-")[0]):
        BAD[case]()


@pytest.mark.parametrize("case", UNFIT)
def test_an_edit_that_does_not_fit_is_refused_before_the_first_row(case):
    model = gaussians()
    with pytest.raises(ValueError, match=case.partition("-")[0]):
        run(model, UNFIT[case])
    assert model.denoiser.asked == 0


def test_a_base_that_costs_more_than_its_edit_is_refused():
    model = gaussians()
    model.denoiser.cost = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="base of condition 0 takes 2"):
        run(model, FlowChefEdit(SOURCE, MASK, base=1, scale=1.0))
    assert model.denoiser.asked == 0


def test_records_of_other_sources_differ():
    a, b = (FlowChefEdit(SOURCE + k, MASK) for k in (0, 1))
    assert a.told != b.told
