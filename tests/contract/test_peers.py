"""What an engine offers its peers is what it was given, or nothing."""

from __future__ import annotations

import msgspec
import torch

from engine_plugins.admin_answers import EngineOffer
from tests.support.configurations import DENSE, DENSE_TP2, MOE_TP2, on
from tests.support.held_weights import held_weights
from tests.support.live_models import LiveModel
from tests.support.problems import problem
from tests.support.served import Served


@on(DENSE, DENSE_TP2, MOE_TP2)
def test_an_engine_offers_the_weights_that_it_was_given(served: Served) -> None:
    """Read from the live parameters of all ranks and put together: bit for bit the HF tensors.

    An engine that serves packed forms of them says so, and names the modules.
    """
    first = served.configuration.model
    assert isinstance(first, LiveModel)
    model = LiveModel(kind=first.kind, version=1 - first.version)
    version = served.install(model)["version"]
    answer = served.server.admin.get("/weights/manifest")
    if not served.engine.feeds_peers:
        said = problem(answer, 409, "illegal_state")
        assert "do not give its weights back: " in said
        assert "qkv_proj" in said
        return
    offer = msgspec.json.decode(answer.content, type=EngineOffer)
    assert (offer.version, len(offer.manifests)) == (version, served.configuration.tensor_parallel)
    held = held_weights(answer)
    expected = model.tensors()
    assert set(held) == set(expected)
    assert [name for name in held if not torch.equal(held[name], expected[name])] == []
