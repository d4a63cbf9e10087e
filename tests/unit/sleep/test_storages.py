"""What lies behind tensors that share memory."""

from __future__ import annotations

import numpy as np
import torch

from engine_plugins.sleep.storages import storages


def test_what_tensors_share_is_there_once() -> None:
    """A view and an alias have no memory of their own, and a view shows the whole of it."""
    whole, other = torch.zeros(100, dtype=torch.uint8), torch.zeros(3)
    found = storages([whole[50:], other, whole, other.view(3, 1)])
    assert [each.nbytes() for each in found] == [12, 100]
    assert {each.data_ptr() for each in found} == {whole.data_ptr(), other.data_ptr()}


def test_of_two_storages_at_one_address_the_larger_counts() -> None:
    """As two libraries see one buffer."""
    buffer = np.zeros(64, dtype=np.uint8)
    whole, part = torch.from_numpy(buffer), torch.from_numpy(buffer[:16])
    for tensors in ([whole, part], [part, whole]):
        assert [each.nbytes() for each in storages(tensors)] == [64]


def test_what_holds_nothing_is_left_out() -> None:
    """An empty tensor, and one whose storage was given back."""
    gone = torch.zeros(8)
    gone.untyped_storage().resize_(0)
    assert storages([torch.empty(0), gone]) == []
