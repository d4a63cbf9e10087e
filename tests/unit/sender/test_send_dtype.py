"""What a trainer holds goes in the dtypes that the engines' parameters have, or in one told."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.errors import SettingsError, SourceError, UpdateEndUnknownError
from engine_plugins.sender import known_end
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.sources.forms.block_fp8 import BlockFp8
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.bad_gateway import bad_gateway
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served
from tests.support.process_group import output_of_ranks

ROUTER, BIAS, NORM = "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "norm.weight"
WANTS = {"embed.weight": "bfloat16", "mlp.up.weight": "bfloat16", NORM: "bfloat16"}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(FakeEngine())) for _ in range(2)]


@pytest.fixture
def engines(servers: list[FakeEngine]) -> list[FakeEngine]:
    for engine in servers:
        engine.reset()
        engine.wants = dict(WANTS)
    return servers


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """A trainer's float32, with what engines keep in it, and a tensor of whole numbers."""
    return {
        "embed.weight": torch.randn(12, 6),
        "mlp.up.weight": torch.randn(6, 8).t(),
        ROUTER: torch.randn(4, 6),
        BIAS: torch.randn(4),
        NORM: torch.randn(6),
        "steps": torch.arange(3),
    }


def sender_of(
    weights: dict[str, torch.Tensor],
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    **more: Any,
) -> WeightSender:
    urls = [engine.url for engine in engines]
    return WeightSender.from_hf(
        weights.items, engines=urls, token=TOKEN, transport=transport, **more
    )


def train(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.mul_(-2)


def holds(engine: FakeEngine, weights: dict[str, torch.Tensor], wants: dict[str, str]) -> bool:
    """Whether an engine has the trainer's values, in its own dtypes."""
    cast = {
        name: tensor.to(getattr(torch, wants[name])) if name in wants else tensor
        for name, tensor in weights.items()
    }
    return engine.weights.keys() == cast.keys() and all(
        engine.weights[name].dtype == tensor.dtype and torch.equal(engine.weights[name], tensor)
        for name, tensor in cast.items()
    )


@pytest.mark.parametrize(
    "way",
    [{}, {"fan_out": 1}, {"two_phase": True}, {"direction": "push"}, {"register": "every_update"}],
    ids=["pull", "fan_out", "two_phase", "push", "every_update"],
)
def test_each_tensor_goes_in_the_dtype_of_the_engines_parameter(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: dict[str, torch.Tensor],
    way: dict[str, Any],
) -> None:
    """At every step; routers, biases and whole numbers stay, and slots stay where they are."""
    with sender_of(weights, engines, transport, **way) as sender:
        for version in (1, 2, 3):
            train(weights)
            report = sender.update(version)
            assert all(holds(engine, weights, WANTS) for engine in engines)
            assert report.slot_bytes == (256 + 256 + 256,)
            assert "slots of 0.0 MB" in str(report)
            if version == 1 or "register" not in way:
                assert len(engines[0].sources) == 2, "as they are held, and as they are wanted"


def test_slots_that_an_engine_may_still_read_are_not_laid_out_anew(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One gives no answer, and may be reading; another comes again and wants other dtypes."""
    for name in ("GRACE_S", "UNSEEN_S", "GONE_S"):
        monkeypatch.setattr(known_end, name, 0.5)
    silent, restarted = engines
    with bad_gateway(silent.url) as gateway:
        urls = [gateway.url, restarted.url]
        with WeightSender.from_hf(
            weights.items, engines=urls, token=TOKEN, transport=transport
        ) as sender:
            sender.update(1)
            restarted.restart()
            restarted.wants = {**WANTS, ROUTER: "bfloat16"}
            gateway.faults |= dict.fromkeys(("/weights/update", "/weights", "/state"), "504")
            with pytest.raises(UpdateEndUnknownError, match="may still read what was cast") as end:
                sender.update(2, timeout_s=2.0)
            assert gateway.url in end.value.message
            assert restarted.version is None


def test_release_frees_the_slots_and_the_next_update_lays_them_out_anew(
    engines: list[FakeEngine], transport: InMemoryTransport, weights: dict[str, torch.Tensor]
) -> None:
    with sender_of(weights, engines, transport) as sender:
        sender.update(1)
        held = {each.box.name: each.memory for each in sender._job.offer.source._placed}
        slots = weakref.ref(held.pop("embed.weight").untyped_storage())
        held.clear()
        sender.release()
        gc.collect()
        assert slots() is None
        train(weights)
        sender.update(2)
        assert all(holds(engine, weights, WANTS) for engine in engines)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (torch.bfloat16, "float32"),
        (torch.float16, "bfloat16"),
        (torch.float16, "float32"),
        (torch.float64, "float16"),
    ],
)
def test_any_floats_become_any_others(
    engine: FakeEngine, transport: InMemoryTransport, held: torch.dtype, wanted: str
) -> None:
    """Up as well as down."""
    engine.wants = {"w": wanted}
    weights = {"w": torch.randn(5, 3).to(held)}
    with sender_of(weights, [engine], transport) as sender:
        sender.update(1)
    assert holds(engine, weights, engine.wants)


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "added"])
def test_engines_that_want_different_dtypes_are_both_named(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: dict[str, torch.Tensor],
    later: bool,
) -> None:
    """The second is refused before it has anything; the first goes on."""
    first, second = engines
    second.wants = {**WANTS, NORM: "float16"}
    with sender_of(weights, [first] if later else engines, transport) as sender:
        if later:
            sender.update(1)
            sender.add_engines(second.url)
        with pytest.raises(EnginesFailedError) as caught:
            sender.update(2)
        (failure,) = caught.value.failures.values()
        assert failure.code == "weight_mismatch"
        for said in (first.url, second.url, NORM, "bfloat16", "float16"):
            assert said in failure.detail
        assert "send_dtype" in failure.remedy
        assert second.version is None
        assert first.version == 2
        assert holds(first, weights, WANTS)


def test_an_engine_that_takes_them_as_they_come_may_want_another(
    engines: list[FakeEngine], transport: InMemoryTransport, weights: dict[str, torch.Tensor]
) -> None:
    """It had no wish while float32 was offered: what it wants shows once the other's is heard."""
    engines[1].wants = {NORM: "float32"}
    with (
        sender_of(weights, engines, transport) as sender,
        pytest.raises(EnginesFailedError, match=r"wants norm\.weight in float32, and .* bfloat16"),
    ):
        sender.update(1)
    assert engines[1].version is None


@pytest.mark.parametrize("how", ["restart", "added", "restart while updating"])
def test_an_engine_that_comes_later_gets_the_dtypes_that_are_known(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: dict[str, torch.Tensor],
    how: str,
) -> None:
    first, second = engines
    with sender_of(weights, [first], transport) as sender:
        if how == "restart while updating":
            first.restart_after = {1}
        sender.update(1)
        if how == "added":
            sender.add_engines(second.url)
        else:
            first.restart()
        train(weights)
        sender.update(2)
    assert holds(first, weights, WANTS)
    assert how != "added" or holds(second, weights, WANTS)


def test_an_engine_that_comes_again_with_other_dtypes_needs_a_new_sender(
    engine: FakeEngine, transport: InMemoryTransport, weights: dict[str, torch.Tensor]
) -> None:
    """Its first wish is kept, and it is not told that it contradicts itself."""
    engine.wants = {NORM: "bfloat16"}
    with sender_of(weights, [engine], transport) as sender:
        sender.update(1)
        engine.restart()
        engine.wants = {NORM: "float16"}
        with pytest.raises(EnginesFailedError, match="it wanted it in bfloat16") as caught:
            sender.update(2)
    assert engine.version is None
    assert "make a new sender" in str(caught.value)
    with sender_of(weights, [engine], transport) as sender:
        sender.update(2)
    assert holds(engine, weights, engine.wants)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_value_that_the_engines_dtype_cannot_hold_is_refused(
    engine: FakeEngine, transport: InMemoryTransport, held: torch.dtype
) -> None:
    """It would become infinite on the way; what is so in the trainer goes as it is."""
    engine.wants = {"w": "float16"}
    weights = {"w": torch.ones(4, 3, dtype=held), "bias": torch.ones(2)}
    with sender_of(weights, [engine], transport) as sender:
        sender.update(1)
        weights["w"][2, 1] = 70_000
        with pytest.raises(SourceError, match="w has values that float16 cannot hold"):
            sender.update(2)
        assert engine.version == 1
        weights["w"][2, 1] = float("inf")
        sender.update(3)
    assert holds(engine, weights, engine.wants)


def test_a_dtype_that_is_told_is_sent_to_all(
    engines: list[FakeEngine], transport: InMemoryTransport, weights: dict[str, torch.Tensor]
) -> None:
    """But for whole numbers and what only its lowest bits tell apart; nobody is asked."""
    engine = engines[0]
    engine.wants = {}
    with sender_of(weights, [engine], transport, send_dtype=torch.bfloat16) as sender:
        sender.update(1)
    assert holds(engine, weights, {**WANTS, ROUTER: "bfloat16"})


@pytest.mark.parametrize("as_is", [None, "as_is"])
def test_as_they_are_tensors_are_refused(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: dict[str, torch.Tensor],
    as_is: Any,
) -> None:
    with (
        sender_of(weights, engines, transport, send_dtype=as_is) as sender,
        pytest.raises(EnginesFailedError, match="other dtypes are wanted"),
    ):
        sender.update(1)


@pytest.mark.parametrize("asked", ["bfloat16", torch.int8, torch.float8_e4m3fn, 16])
def test_a_dtype_that_cannot_be_is_refused(asked: Any) -> None:
    with pytest.raises(SettingsError, match="send_dtype"):
        WeightSender.from_hf({}, engines="http://127.0.0.1:1", token=TOKEN, send_dtype=asked)


def test_one_that_wants_again_what_was_cast_for_it_is_an_error(
    engine: FakeEngine, transport: InMemoryTransport
) -> None:
    """A wish that no cast fulfils would be asked for for ever."""
    weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(128, 128)}
    engine.wants = {f"{name}_scale_inv": "bfloat16" for name in weights}
    with (
        sender_of(weights, [engine], transport, quantization=BlockFp8()) as sender,
        pytest.raises(EnginesFailedError, match="still wants other dtypes"),
    ):
        sender.update(1)


def test_beside_fp8_the_rest_goes_in_the_engines_dtypes(
    engine: FakeEngine, transport: InMemoryTransport
) -> None:
    """The same slots hold both forms."""
    matrix = "model.layers.0.mlp.up_proj.weight"
    weights = {matrix: torch.randn(256, 128), NORM: torch.randn(6), ROUTER: torch.randn(4, 6)}
    engine.wants = {NORM: "bfloat16"}
    with sender_of(weights, [engine], transport, quantization=BlockFp8()) as sender:
        for version in (1, 2):
            train(weights)
            report = sender.update(version)
            assert torch.equal(engine.weights[NORM], weights[NORM].bfloat16())
            assert torch.equal(engine.weights[ROUTER], weights[ROUTER])
            scale = engine.weights[f"{matrix}_scale_inv"].repeat_interleave(128, 0)
            found = engine.weights[matrix].float() * scale
            assert torch.allclose(found, weights[matrix], rtol=0.07, atol=0.05)
            assert report.slot_bytes == (256 * 128 + 256 + 256,)


def test_an_engine_that_cannot_be_connected_does_not_stop_the_others(
    engines: list[FakeEngine], transport: InMemoryTransport, weights: dict[str, torch.Tensor]
) -> None:
    """It is asked once: what it said then is its failure."""
    engines[1].refuse["/weights/connect"] = Refused(422, "weight_mismatch", "no such names")
    with (
        sender_of(weights, engines, transport) as sender,
        pytest.raises(EnginesFailedError, match="no such names"),
    ):
        sender.update(1)
    assert holds(engines[0], weights, WANTS)


def test_every_rank_learns_what_the_leading_one_hears(tmp_path: Path) -> None:
    """Two processes, each with its own rows, and a rank whose share of a tensor is empty."""
    with served(FakeEngine(pulls=False)) as engine:
        engine.wants = {"w": "bfloat16", "short": "bfloat16"}
        said = output_of_ranks(
            "tests.support.cast_trainer_rank", "2", str(tmp_path / "rendezvous"), engine.url
        )
    reports = [json.loads(line) for line in said.splitlines()]
    assert len(reports) == 4
    assert all(report["slots"] == [512, 256] for report in reports), reports
    offered = [
        dict(zip(each.tensors.names, each.tensors.dtypes, strict=True))
        for each in list(engine.sources.values())[2:]
    ]
    assert offered == [{"w": "bfloat16", "short": "bfloat16", "router": "float32"}] * 2
    assert len(engine.plans) == 1


@pytest.mark.parametrize("way", [{"two_phase": True}, {"direction": "push"}, {"fan_out": 1}])
def test_different_wishes_are_refused_by_every_way(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: dict[str, torch.Tensor],
    way: dict[str, Any],
) -> None:
    """In two phases nobody installs; down a tree the one that could be fed does."""
    first, second = engines
    second.wants = {**WANTS, NORM: "float16"}
    with (
        sender_of(weights, engines, transport, **way) as sender,
        pytest.raises(EnginesFailedError, match=r"wants norm\.weight in float16, and .* bfloat16"),
    ):
        sender.update(1)
    assert second.version is None
    assert first.version == (1 if "fan_out" in way else None)
