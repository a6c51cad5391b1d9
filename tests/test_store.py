"""The store gives back what was put in, and reuses what was let go."""

import pytest
import torch

from samplers.store import Store


def test_states_come_back_in_any_order_through_growth():
    store, x = Store(), torch.randn(500, 2, 3, generator=torch.Generator().manual_seed(0))
    for part in torch.arange(500).split(7):
        store.put(part.tolist(), x[part])
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(store.get(order.tolist()), x[order])


def test_dropped_room_is_used_again():
    store = Store()
    for round in range(100):
        handles = list(range(round * 10, round * 10 + 10))
        store.put(handles, torch.full((10, 4), float(round)))
        assert store.get(handles[3:4])[0, 0] == round
        store.drop(handles)
    assert len(store) == 0
    assert store._arena is not None
    assert len(store._arena) == 64  # a thousand states went through the room for 64


def test_a_handle_that_is_not_kept_is_an_error():
    store = Store()
    with pytest.raises(KeyError):
        store.get([1])
    store.put([1], torch.zeros(1, 2))
    store.drop([1, 99])
    with pytest.raises(KeyError):
        store.get([1])
    assert 1 not in store
