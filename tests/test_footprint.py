"""What a run is expected to take, on a device that is made up."""

from types import SimpleNamespace

import pytest
import torch

from samplers import BestOfN, sample
from samplers.footprint import GB, footprint
from tests.brownian import Walk, brownian, first


@pytest.fixture
def device(monkeypatch):
    """10 GB, 4 of them held; a call takes 1 GB and .5 GB for each state."""
    told = SimpleNamespace(peak=0.0, limit=10)

    def called(self, x, t, row):
        told.peak = 5 + 0.5 * len(x)
        if told.peak > told.limit:
            raise torch.OutOfMemoryError
        return x

    monkeypatch.setattr(Walk, "__call__", called)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4 * GB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: int(told.peak * GB))
    properties = SimpleNamespace(total_memory=10 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return told


class OnCuda:
    """Says that its states live on a GPU; they live on the CPU."""

    def __init__(self, model):
        self._model, self.denoiser, self.process = model, model.denoiser, Placed(model.process)
        self.device = SimpleNamespace(type="cuda", __index__=lambda: 0)


class Placed:
    def __init__(self, process):
        self._process = process

    def prior(self, key):
        return self._process.prior(key)

    def time(self, i):
        return self._process.time(i)


@pytest.fixture
def model(monkeypatch):
    arange, zeros = torch.arange, torch.zeros
    monkeypatch.setattr(torch, "arange", lambda *a, device=None, **k: arange(*a, **k))
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    return OnCuda(brownian())


def test_memory_is_a_straight_line_through_one_state_and_two(device, model):
    found = footprint(model, 8)
    assert (found.held, found.total) == (4, 10)
    assert found.call == pytest.approx(1 + 0.5 * 8)
    assert str(found) == "expected: 9.0 of 10.0 GB (4.0 held, 5.0 for a call of 8)"


def test_a_batch_that_will_not_fit_is_said_with_one_that_will(device, model):
    assert str(footprint(model, 64)).endswith("too much, say batch=10")
    assert "too much" not in str(footprint(model, 9))


def test_two_states_that_do_not_fit_are_no_error(device, model):
    device.limit = 5.6
    assert "not even 2 states fit" in str(footprint(model, 8))


def test_a_cpu_does_not_tell(capsys):
    assert footprint(brownian(), 8) is None
    sample(brownian(), first, BestOfN(2), progress=False)
    assert "expected" not in capsys.readouterr().out
