"""What the built-in models are trained on, and that a run which was stopped goes on."""

import json

import pytest
import torch

from steering.zoo import train_mnist_flow, training


class Recorder:
    """A network that knows the velocity, a function of (x, sigma), and notes what it is asked."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, x, t, class_labels):
        self.sigma, self.labels = t / 1000, class_labels
        v = self.velocity(x, self.sigma.view(-1, 1, 1, 1))
        return type("Output", (), {"sample": v})


@pytest.mark.parametrize("end", ["noise", "clean"])
def test_the_flow_is_trained_on_noise_minus_clean_along_straight_lines(end):
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(1000, 1, 2, 2, generator=rng)
    zero, labels = torch.zeros_like(value), torch.full((1000,), 3)
    # from zero to the noise x = sigma · noise, from the clean end to zero (1 - sigma) · clean
    if end == "noise":
        clean, noise, net = zero, value, Recorder(lambda x, sigma: x / sigma)
    else:
        clean, noise, net = value, zero, Recorder(lambda x, sigma: -x / (1 - sigma))
    loss = train_mnist_flow.flow_loss(net, clean, noise, labels, rng)
    assert loss < 1e-6  # float32 rounding, divided by sigma from 1e-5 on, squared
    assert 0 < net.sigma.min() <= net.sigma.max() < 1
    # half of them uniform, half logit-normal: means of 1/2, a standard error of at most 0.01
    assert abs(net.sigma.mean() - 0.5) < 0.03
    dropped = (net.labels == train_mnist_flow.NULL).double().mean()
    assert ((net.labels == 3) | (net.labels == train_mnist_flow.NULL)).all()
    assert abs(dropped - 0.12) < 0.04  # four standard errors


def test_pairs_follow_the_flow_by_heuns_rule():
    """v = a · x: every step of h multiplies by 1 - a h + (a h)² / 2, Euler's last by 1 - a h."""
    x, rate, steps = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), 0.8, 5
    end = train_mnist_flow.follow(Recorder(lambda x, _: rate * x), x, torch.zeros(3), steps)
    a = rate / steps
    expected = x * (1 - a + a**2 / 2) ** (steps - 1) * (1 - a)
    torch.testing.assert_close(end, expected, atol=1e-6, rtol=1e-5)


class StopError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    target = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    stop_at, saved = 3, []

    def save(ema):
        saved.append({name: average.clone() for name, average in ema.items()})
        if len(saved) == stop_at:
            raise StopError

    def run():
        net = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.zeros_(net.weight)
        rng = torch.Generator().manual_seed(0)

        def loss(rows):
            return (net(target[rows]) - target[rows]).square().mean()

        training.fit(net, loss, len(target), save, tmp_path, minutes=0.02, peak=0.1, rng=rng)

    def lines():
        return [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]

    with pytest.raises(StopError):
        run()
    assert len(lines()) == 3  # the third snapshot's state was not written: the second is resumed
    second = lines()[1]
    run()
    after = lines()[3:]
    assert lines()[1] == second
    assert second["step"] < after[0]["step"]
    assert second["wall_seconds"] <= after[0]["wall_seconds"]
    steps = [line["step"] for line in after]
    assert steps == sorted(steps)
    assert after[-1]["lr"] == 0
    assert after[-1]["wall_seconds"] >= 1.2  # of both starts together
    assert after[-1]["loss"] < lines()[0]["loss"]
    assert not (tmp_path / "state.safetensors").exists()
