"""One call updates every engine, and every trainer rank hears the same outcome."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import (
    AdminAnswerError,
    EnginePluginError,
    SettingsError,
    SourceError,
)
from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.contract.version_word import CLOSED
from engine_plugins.weights.sources.megatron.source import MegatronChunk, MegatronRank
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.families.catalogue import family_named
from tests.families.maker import random_model
from tests.support.bad_gateway import bad_gateway
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served
from tests.support.process_group import output_of_ranks


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(FakeEngine())) for _ in range(2)]


@pytest.fixture
def engines(servers: list[FakeEngine]) -> list[FakeEngine]:
    """Two new engines, each behind its own HTTP server."""
    for engine in servers:
        engine.reset()
    return servers


@pytest.fixture
def transport() -> Iterator[InMemoryTransport]:
    agent = InMemoryTransport("trainer")
    yield agent
    agent.close()


def tiny() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6, bias=False))


def hf_sender(
    model: torch.nn.Module, engines: list[FakeEngine], transport: InMemoryTransport, **more: Any
) -> WeightSender:
    urls = [engine.url for engine in engines]
    tensors = model.named_parameters()
    return WeightSender.from_hf(tensors, engines=urls, token=TOKEN, transport=transport, **more)


def holds(engine: FakeEngine, model: torch.nn.Module) -> bool:
    tensors = dict(model.named_parameters())
    return tensors.keys() == engine.weights.keys() and all(
        torch.equal(tensors[name], engine.weights[name]) for name in tensors
    )


@pytest.mark.parametrize("given", ["the model", "a function"])
def test_parameters_that_were_replaced_are_followed(
    engines: list[FakeEngine], transport: InMemoryTransport, given: str
) -> None:
    """As by `load_state_dict(assign=True)`, a merged adapter, or an average swapped in."""
    model = tiny()
    weights: Any = model if given == "the model" else model.named_parameters
    urls = [engine.url for engine in engines]
    with WeightSender.from_hf(weights, engines=urls, token=TOKEN, transport=transport) as sender:
        sender.update(1)
        replaced = {name: torch.randn_like(each) for name, each in model.named_parameters()}
        model.load_state_dict(replaced, assign=True)
        sender.update(2)
        assert all(holds(engine, model) for engine in engines)
        model.get_submodule("0").bias = torch.nn.Parameter(torch.randn(4))
        sender.update(3)
        assert all(holds(engine, model) for engine in engines)


def test_every_engine_gets_the_weights_as_they_are_now(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """Bytes, versions, model facts, and one manifest and plan for many updates."""
    model = tiny()
    config = {"model_type": "tiny", "hidden_size": 6}
    reports = []
    with hf_sender(model, engines, transport, config=config) as sender:
        for version in (0, 3, 7):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            reports.append(sender.update(version, pause="wait", verify="full", timeout_s=20))
            assert all(holds(engine, model) and engine.version == version for engine in engines)
    report = reports[-1]
    assert list(report.engines) == [engine.url for engine in engines]
    assert report.bytes == 2 * 52 * 4
    assert report.version == 7
    assert "version 7 on 2 engines" in str(report)
    assert str(report).count("\n") == 2
    for engine in engines:
        assert len(engine.sources) == len(engine.plans) == 1
        assert engine.models == [config]
        assert [asked["pause"] for asked in engine.updates] == ["wait"] * 3
        assert engine.updates[-1]["timeout_s"] == 20
        assert len({asked["request_id"] for asked in engine.updates}) == 3


def test_an_engine_that_restarted_is_told_anew(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """It answers 404 for the plan; the other engine is updated once all the same."""
    model = tiny()
    with hf_sender(model, engines, transport) as sender:
        sender.update(1)
        engines[0].restart()
        sender.update(2)
    assert all(holds(engine, model) and engine.version == 2 for engine in engines)
    assert [len(engine.updates) for engine in engines] == [2, 2]


def test_an_engine_that_always_forgets_is_a_failure(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """Two rounds, then an error: no endless repetition behind a load balancer."""
    engines[0].refuse["/weights/connect"] = Refused(404, "unknown_id", "no source")
    with (
        hf_sender(tiny(), engines[:1], transport) as sender,
        pytest.raises(EnginesFailedError, match="load balancer"),
    ):
        sender.update(1)
    assert len(engines[0].sources) == 2


def test_tensors_that_moved_are_offered_anew(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """An optimizer that replaces `.data` needs no word to the sender."""
    model = tiny()
    with hf_sender(model, engines[:1], transport) as sender:
        sender.update(1)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        sender.update(2)
    assert holds(engines[0], model)
    assert len(engines[0].plans) == 2


def test_failed_engines_are_named_and_the_others_reported(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """The error has each engine's code, detail, remedy, and what it holds now."""
    model = tiny()
    engines[1].version = 9
    with hf_sender(model, engines, transport) as sender:
        with pytest.raises(EnginesFailedError) as caught:
            sender.update(5)
        error = caught.value
        assert list(error.reports) == [engines[0].url]
        failure = error.failures[engines[1].url]
        assert (failure.code, failure.remedy) == ("stale_version", "mend stale_version")
        assert failure.holds == "version 9, serving"
        for words in ("1 of 2 engines", engines[1].url, "version 9 is installed"):
            assert words in str(error)
        assert sender.update(10).version == 10


def test_a_dead_engine_is_named(engines: list[FakeEngine], transport: InMemoryTransport) -> None:
    """The living one is updated; of the dead one nothing is claimed."""
    gone = FakeEngine()
    with served(gone):
        pass
    with (
        hf_sender(tiny(), [engines[0], gone], transport) as sender,
        pytest.raises(EnginesFailedError) as caught,
    ):
        sender.update(1)
    assert caught.value.failures[gone.url].code == "engine_unreachable"
    assert "unknown weights" in caught.value.failures[gone.url].holds
    assert engines[0].version == 1


def test_a_broken_connection_does_not_let_the_trainer_go_on(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """The engine still reads the trainer's memory: wait for it, and tell its own report."""
    model = tiny()
    engines[0].update_s = 1.0
    with (
        WeightSource(lambda: hf_boxes(model.named_parameters()), transport) as source,
        AdminClient(engines[0].url, token=TOKEN, timeout_s=0.2) as client,
    ):
        link = EngineLink(client)
        link.publish({0: source.manifest_bytes})
        ids = [str(link.source_id(0))]
        request = UpdateRequest(plan_id="", version=1, request_id="r1", timeout_s=0.1)
        started = time.monotonic()
        report = link.update(ids, {}, request)
    assert time.monotonic() - started > 0.9
    assert (report.request_id, engines[0].version) == ("r1", 1)
    assert len(engines[0].updates) == 1
    assert holds(engines[0], model)


def test_a_refused_manifest_is_that_engines_failure(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """A wrong token, say: the failure names the rank whose manifest it was."""
    engines[1].refuse["/weights/sources/batch"] = Refused(413, "body_too_large", "too large")
    with (
        hf_sender(tiny(), engines, transport) as sender,
        pytest.raises(EnginesFailedError, match="manifest of trainer rank 0: too large"),
    ):
        sender.update(1)
    assert [engine.version for engine in engines] == [1, None]


def test_megatron_shares_are_sent_in_their_own_layout(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """Two tensor-parallel shares of one process; padding of the vocabulary is not sent."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 4,
        "vocab_size": 7,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "intermediate_size": 8,
        "tie_word_embeddings": True,
    }
    whole = torch.randn(8, 4)
    ranks = [
        MegatronRank(
            chunks=[MegatronChunk(tensors={EMBEDDING: whole[4 * n : 4 * n + 4]}, global_layers=[])],
            tp_rank=n,
            tp_size=2,
        )
        for n in range(2)
    ]
    url = engines[0].url
    with WeightSender.from_megatron(
        ranks, config, engines=url, token=TOKEN, transport=transport
    ) as sender:
        sender.update(1)
    assert torch.equal(engines[0].weights["model.embed_tokens.weight"], whole[:7])
    assert engines[0].models[0]["vocab_size"] == 7


def test_an_fsdp_model_is_sent_as_it_is_now(
    engines: list[FakeEngine], transport: InMemoryTransport, tmp_path: Path
) -> None:
    """Unsharded when the sender is made, stepped in place, and with parameters replaced."""
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        model = tiny()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,))).unshard()
        config = {"model_type": "tiny"}
        with WeightSender.from_fsdp(
            model, engines=engines[0].url, token=TOKEN, transport=transport, config=config
        ) as sender:
            sender.update(1)
            assert holds_shards(engines[0], model)
            model(torch.ones(2, 6)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.5).step()
            assert not holds_shards(engines[0], model)
            sender.update(2)
            assert holds_shards(engines[0], model)
            assert len(engines[0].plans) == 1
            model.to(torch.float64)
            sender.update(3)
            assert holds_shards(engines[0], model)
        assert engines[0].models == [config] * 2
    finally:
        dist.destroy_process_group()


def holds_shards(engine: FakeEngine, model: torch.nn.Module) -> bool:
    return all(
        isinstance(shard, DTensor) and torch.equal(shard.full_tensor(), engine.weights[name])
        for name, shard in model.named_parameters()
    )


EMBEDDING = "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("version", "more"), [(-1, {}), (True, {}), (1, {"timeout_s": 0}), (1, {"timeout_s": 1e9})]
)
def test_what_cannot_be_is_refused_before_any_engine_is_asked(
    engines: list[FakeEngine], transport: InMemoryTransport, version: int, more: dict[str, Any]
) -> None:
    """Versions below 0 and timeouts that no one would wait for."""
    with hf_sender(tiny(), engines, transport) as sender, pytest.raises(SettingsError):
        sender.update(version, **more)
    assert not engines[0].sources


def test_engines_must_be_named_once(transport: InMemoryTransport) -> None:
    """None, or the same twice, is a mistake."""
    for urls in ([], ["http://a:1", "http://a:1/"]):
        with pytest.raises(SettingsError, match="each engine once"):
            WeightSender.from_hf({}, engines=urls, transport=transport)


def test_a_closed_sender_is_an_error(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """Closing twice is none."""
    sender = hf_sender(tiny(), engines, transport)
    sender.close()
    sender.close()
    with pytest.raises(SourceError, match="closed"):
        sender.update(1)


def test_progress_is_drawn_where_asked_for(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fed by /state while the update runs; without a terminal nothing is drawn or asked."""
    engines[0].update_s = 0.6
    with hf_sender(tiny(), engines[:1], transport) as sender:
        sender.update(1)
    assert capsys.readouterr().err == ""
    assert engines[0].polls == 0
    with hf_sender(tiny(), engines[:1], transport, progress=True) as sender:
        sender.update(2)
    assert engines[0].polls >= 1
    assert "v2 http://127.0.0.1" in capsys.readouterr().err


def two_ranks(
    tmp_path: Path, engines: list[FakeEngine], *steps: str, **environment: str
) -> list[dict[str, dict[str, Any]]]:
    """What each of two trainer ranks said, by step."""
    urls = ",".join(engine.url for engine in engines)
    arguments = ("2", str(tmp_path / "rendezvous"), urls, *steps)
    said = output_of_ranks("tests.support.sender_rank", *arguments, **environment)
    lines = [json.loads(line) for line in said.splitlines()]
    return [{line["step"]: line for line in lines if line["rank"] == rank} for rank in range(2)]


def test_two_ranks_feed_one_engine_that_feeds_the_other(
    tmp_path: Path, engines: list[FakeEngine]
) -> None:
    """Both ranks offer to the root alone; when it refuses, both go on to the other engine."""
    for engine in engines:
        engine.pulls = False  # the bytes lie in other processes
    root, leaf = engines
    root.weights = {"w": torch.zeros(8, 8)}
    refused = {"/weights/update": Refused(409, "illegal_state", "this engine is fenced")}
    leaf.after_update = lambda: root.refuse.update(refused)
    first, second = two_ranks(tmp_path, engines, "update:1", "update:2", FAN_OUT="1")
    for step in ("update:1", "update:2"):
        for key in ("report", "kind", "error"):
            assert first[step].get(key) == second[step].get(key), step
    assert f"fed by {root.url}" in first["update:1"]["report"]
    assert "failed on 1 of 2 engines" in first["update:2"]["error"]
    assert leaf.version == 2
    assert [len(ids) for ids in root.plans.values()] == [2], "both ranks feed the root"
    assert [len(ids) for ids in leaf.plans.values()] == [1, 2], "the root, then both ranks"


def test_every_rank_takes_its_own_memory_back(
    tmp_path: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upon an end that nobody knows, and upon Ctrl-C on the leading rank; then all begin anew."""
    (engine, _) = engines
    engine.pulls = False  # the bytes lie in other processes
    engine.update_s = 1.5
    with bad_gateway(engine.url) as gateway:
        gateway.faults["/weights/update"], gateway.times["/weights/update"] = "504", 1
        gateway.delivery = "never"
        monkeypatch.setattr(engine, "url", gateway.url)
        first, second = two_ranks(
            tmp_path,
            [engine],
            "update:1",
            "update:2",
            "interrupt:0:3",
            "update:4",
            "interrupt:1:5",
            "update:6",
        )
    for rank in (first, second):
        assert "cannot be found out" in rank["update:1"]["error"]
        assert rank["update:1"]["word"] == CLOSED
        assert "on 1 engine" in rank["update:2"]["report"]
        assert rank["interrupt:0:3"]["word"] == CLOSED
        assert "on 1 engine" in rank["update:4"]["report"]
    assert first["interrupt:0:3"]["kind"] == "KeyboardInterrupt"
    assert first["interrupt:0:3"]["s"] < 1.4
    assert "trainer rank 0 of 2: KeyboardInterrupt" in second["interrupt:0:3"]["error"]
    for rank in (first, second):
        assert rank["interrupt:1:5"]["word"] == CLOSED
        assert "on 1 engine" in rank["update:6"]["report"]
    assert second["interrupt:1:5"]["kind"] == "KeyboardInterrupt"
    assert second["interrupt:1:5"]["s"] < 1.9
    assert "trainer rank 1 of 2: KeyboardInterrupt" in first["interrupt:1:5"]["error"]
    assert engine.version == 6


def test_two_ranks_succeed_and_fail_as_one(tmp_path: Path, engines: list[FakeEngine]) -> None:
    """Reports and errors are equal on both ranks, and no rank waits for one that raised."""
    for engine in engines:
        engine.pulls = False  # the bytes lie in other processes
        engine.restart_after = {2}
    engines[1].version = 1
    steps = (
        "update:1",
        "update:2",
        "update:3",
        "bad:1:4",
        "gone:0:4",
        "versions",
        "swap:1:5",
        "die:1:6",
    )
    first, second = two_ranks(tmp_path, engines, *steps)
    for step in steps[:-1]:
        for key in ("report", "kind", "error"):
            assert first[step].get(key) == second[step].get(key), step
        assert first[step]["s"] < 10
    assert first["update:1"]["kind"] == "EnginesFailedError"
    assert "version 1 is installed" in first["update:1"]["error"]
    for step in ("update:2", "update:3", "swap:1:5"):
        assert "on 2 engines" in first[step]["report"], first[step]
    assert first["bad:1:4"]["kind"] == "UpdateFailedError"
    assert "trainer rank 1 of 2: ValueError: the optimizer lost" in first["bad:1:4"]["error"]
    assert first["gone:0:4"]["kind"] == "SourceError", "a class that all ranks know is kept"
    assert "trainer rank 0 of 2: w: its memory is gone" in first["gone:0:4"]["error"]
    assert "different versions: [1000, 1001]" in first["versions"]["error"]
    assert "lost the other trainer ranks" in first["die:1:6"]["error"]
    assert first["die:1:6"]["s"] < 10
    assert "die:1:6" not in second
    for engine in engines:
        assert engine.version == 5
        assert {source.agent for source in engine.sources.values()} == {"trainer-0", "trainer-1"}
        assert [len(ids) for ids in engine.plans.values()] == [2, 2]
        assert len(engine.sources) == 3, "rank 1 moved and offered again, rank 0 did not"


def test_an_engines_refusal_says_what_the_trainer_calls_the_tensors(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """Of a transformers model, whose names in memory are others; of named tensors how to tell."""
    model = random_model(family_named("mixtral"), seed=0, dtype=torch.float32)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    refused = Refused(422, "weight_mismatch", f"{gate}: the engine's loader refuses it")
    engines[0].refuse["/weights/connect"] = refused
    own = f"{gate} is the model's model.layers.0.mlp.gate.weight"
    for weights, words in ((model, own), (dict(model.state_dict()), "give from_hf the model")):
        sender = WeightSender.from_hf(
            weights, engines=engines[0].url, token=TOKEN, transport=transport
        )
        with sender, pytest.raises(EnginesFailedError) as caught:
            sender.update(1)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "config", "words"),
    [
        (iter(()), None, "the generator had none"),
        (tiny().parameters(), None, r"a Parameter is given without a name \[.*named_parameters"),
        ("model", None, "a str is no model"),
        (torch.zeros(2), None, "a Tensor is no model"),
        ({"w": torch.zeros(0)}, None, r"w has no values now, its shape is \(0,\): was it offload"),
        ({"w": torch.zeros(2, device="meta")}, None, r"meta tensor .* \(was it offloaded\?\)"),
        ({"v_head.weight": torch.zeros(2)}, None, "value head"),
        ({"w": torch.zeros(2)}, "/no/such/folder", "no config can be read there"),
        ({"base_model.model.lora_A.w": torch.zeros(2)}, None, "adapters"),
        ({"_fsdp_wrapped_module.w": torch.zeros(2)}, None, "FSDP1"),
        ({}, None, "no tensors given"),
    ],
)
def test_what_cannot_be_sent_is_said_before_any_engine_is_asked(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    weights: Any,
    config: object,
    words: str,
) -> None:
    with pytest.raises(EnginePluginError) as caught:
        WeightSender.from_hf(weights, config=config, engines=engines[0].url, transport=transport)
    assert re.search(words, f"{caught.value} [{caught.value.remedy}]")
    assert not engines[0].sources


def test_a_part_needs_patterns_that_match_and_no_fan_out(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    model = tiny()
    with pytest.raises(SourceError, match=r"only=\['2\.\*'\] matches no tensor"):
        hf_sender(model, engines, transport, only=["0.*", "2.*"])
    with pytest.raises(SettingsError, match="none can be sent a part"):
        hf_sender(model, engines, transport, only="0.*", fan_out=2)
    with hf_sender(model, engines, transport, only="0.*") as sender:
        sender.update(1)
    assert engines[0].weights.keys() == {"0.weight", "0.bias"}


def test_a_pattern_must_go_on_matching(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """A head that is tied later is no tensor of its own any more: nothing would be sent for it."""
    first, plain = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
    model = torch.nn.Sequential(first, plain)
    with WeightSender.from_hf(
        model,
        engines=engines[0].url,
        token=TOKEN,
        transport=transport,
        only=["0.weight", "1.weight"],
    ) as sender:
        sender.update(1)
        own, plain.weight = plain.weight, first.weight
        with pytest.raises(SourceError, match=r"only=\['1\.weight'\] matches no tensor"):
            sender.update(2)
        assert engines[0].version == 1
        plain.weight = own
        sender.update(3)


def test_ranks_that_do_not_lead_need_neither_token_nor_route(
    tmp_path: Path, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leading rank publishes for all, in one call; who moved is published again, alone."""
    monkeypatch.delenv("ENGINE_PLUGINS_ADMIN_TOKEN", raising=False)
    for engine in engines:
        engine.pulls = False  # the bytes lie in other processes
    steps = ("update:1", "update:2", "swap:1:3", "outside:1:4", "update:5")
    first, second = two_ranks(tmp_path, engines, *steps, ALONE="1")
    for step in steps:
        if not step.startswith("outside"):
            assert "on 2 engines" in first[step].get("report", ""), first[step]
            assert first[step]["report"] == second[step]["report"]
    assert "on trainer rank 1 of 2: ZeroDivisionError" in first["outside:1:4"]["error"]
    assert first["outside:1:4"]["s"] < 10
    assert second["outside:1:4"]["kind"] == "ZeroDivisionError"
    for engine in engines:
        assert engine.batches == [2, 1]
        assert engine.version == 5
        assert {each.agent for each in engine.sources.values()} == {"trainer-0", "trainer-1"}


def test_each_rank_may_publish_for_itself(tmp_path: Path, engines: list[FakeEngine]) -> None:
    for engine in engines:
        engine.pulls = False  # the bytes lie in other processes
    first, second = two_ranks(tmp_path, engines, "update:1", "swap:1:2", PUBLISH="each_rank")
    for step in ("update:1", "swap:1:2"):
        assert "on 2 engines" in first[step]["report"]
        assert first[step]["report"] == second[step]["report"]
    assert all(engine.batches == [1, 1, 1] for engine in engines)


def test_a_batch_over_the_engines_limit_goes_in_parts(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """Whatever the engine's operator has set; one manifest that is too long is a failure."""
    engine = engines[0]
    engine.most_in_batch = 2
    with (
        WeightSource(lambda: hf_boxes({"w": torch.zeros(2)}), transport) as source,
        AdminClient(engine.url, token=TOKEN) as client,
    ):
        ids = client.put_sources([source.manifest_bytes] * 7)
        assert engine.batches == [1, 2, 2, 2]
        assert list(engine.sources) == ids
        engine.most_in_batch = 0
        with pytest.raises(AdminAnswerError, match="body_too_large"):
            client.put_sources([source.manifest_bytes] * 2)
