"""Views of a whole tensor, cut out of shares of it."""

from __future__ import annotations

import pytest
import torch

from engine_plugins.weights.sources.tensor_views import view_of


@pytest.mark.parametrize("columns", [4, 2])
def test_a_view_that_splits_axes_is_cut_out_of_the_whole_tensor_alone(columns: int) -> None:
    """A first share begins where the tensor does, and what follows it in memory is another's."""
    whole = torch.arange(24.0).view(6, 4)
    wanted = whole.view(2, 3, 2, 2)[1, :2]
    view = view_of(wanted, whole.shape)
    found = view.cut((0, 0), whole)
    assert found is not None
    assert torch.equal(found[1], wanted)
    rows = 12 // columns
    share = torch.full((48,), -1.0)[:12].view(rows, columns)
    with pytest.raises(ValueError, match="not whole here"):
        view.cut((0, 0), share)
