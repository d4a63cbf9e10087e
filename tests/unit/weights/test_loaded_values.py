"""After updates through the product's own installer an engine's model holds what a load gives it.

Compared are the parameters, buffers and tensor attributes of every module with those of a model of
the same engine that was loaded once, with the last weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from engine_plugins.errors import UnsupportedError, WeightMismatchError
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.loader.dtype_fit import wanted_dtypes
from engine_plugins.weights.loader.engine_tensors import tensors_beside
from tests.support.loader_maps import (
    PlayedEngine,
    PlayedRank,
    load_through,
    logical,
    played_engine,
    receiving,
    same_bits,
    update,
)
from tests.support.source_ranks import offered_tensors

pytestmark = pytest.mark.loader

VLLM, SGLANG = "vllm", "sglang"
KIND = next((kind for kind in (VLLM, SGLANG) if find_spec(kind) is not None), "")
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DOTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

WRAPPED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts", "embed_tokens", "lm_head")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A tiny model of a family of transformers, on the engines that have it."""

    config: str
    sizes: Mapping[str, Any]
    engines: tuple[str, ...] = (VLLM, SGLANG)
    published: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] | None = None


MODELS = {
    "direct copies": Model("GptOssConfig", {**EXPERTS, "head_dim": 32}, (VLLM,)),
    "nameless loaders": Model(
        "MiniMaxM2Config",
        {**EXPERTS, "head_dim": 32, "tie_word_embeddings": False},
        (VLLM,),
        published={
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "rotary_dim": 32,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "use_mtp": False,
        },
    ),
    "packed experts": Model(
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "derived norms": Model(
        "Gemma2Config", {"head_dim": 16}, published={"hidden_act": "gelu_pytorch_tanh"}
    ),
    "a loaded buffer": Model(
        "Gemma4TextConfig",
        {
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": False,
        },
        (VLLM,),  # SGLang's wants an attention backend that no CPU has
    ),
    "loaded activations": Model("ApertusConfig", {}),
    # On vLLM's Transformers backend; on SGLang one of two sizes with numbers in names is padded.
    "a bias made while loading": Model("PhiConfig", {"tie_word_embeddings": False}),
    "experts in one storage": Model(
        "AfmoeConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "n_group": 1,
            "topk_group": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        (SGLANG,),
    ),
    "transformers' own code": Model(
        "SeedOssConfig", {"head_dim": 16, "tie_word_embeddings": False}
    ),
    "a padded vocabulary": Model(
        "GPTNeoXConfig", {"vocab_size": 264, "tie_word_embeddings": False}, (SGLANG,)
    ),
    "experts in transformers' code": Model("Dots1Config", DOTS, (SGLANG,)),
    "norms that no checkpoint has": Model(
        "FalconH1Config",
        {
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "tie_word_embeddings": False,
        },
        (SGLANG,),
        arguments={
            "mamba_radix_cache_strategy": "no_buffer",
            "disable_overlap_schedule": True,
        },
    ),
    "biases": Model("Qwen2Config", {"tie_word_embeddings": False}),
}
HERE = [name for name, model in MODELS.items() if KIND in model.engines]


@pytest.fixture(scope="module")
def engine() -> Iterator[PlayedEngine]:
    with played_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensors]]:
    """The folder and the checkpoint of a model of `MODELS`.

    Each is made once: vLLM's Transformers backend changes classes of transformers for good.
    """

    @functools.cache
    def made(name: str) -> tuple[Path, Tensors]:
        folder = tmp_path_factory.mktemp("model")
        return folder, checkpoint(MODELS[name], folder)

    return made


def checkpoint(model: Model, folder: Path) -> dict[str, torch.Tensor]:
    """Random values of a model, saved to a folder and read from there."""
    torch.manual_seed(0)
    config = getattr(transformers, model.config)(**{**COMMON, **model.sizes})
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for each in (*made.parameters(), *made.buffers()):
            if each.is_floating_point():
                each.copy_(torch.randn_like(each) * 0.2 + 0.5)
    made.config.architectures = [type(made).__name__]
    made.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(model.published or {})))
    return load_file(folder / "model.safetensors")


@contextmanager
def as_built(dtype: torch.dtype) -> Iterator[None]:
    """Engines build their models under the dtype that they serve in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a model."""
    everything = {**tensors_beside(model), **dict(model.named_parameters())}
    return {name: each.detach().clone() for name, each in everything.items() if not each.is_meta}


def freshly_loaded(rank: PlayedRank, tensors: Tensors, dtype: torch.dtype) -> dict[str, Any]:
    """What an engine holds that was started with these tensors."""
    with as_built(dtype):
        model = rank.model()
        load_through(model, {name: tensor.clone() for name, tensor in tensors.items()})
        rank.installer(model)
    return held(model)


def assert_same(model: nn.Module, fresh: Tensors) -> None:
    now = held(model)
    assert now.keys() == fresh.keys()
    wrong = [name for name, each in fresh.items() if not same_bits(each, now[name])]
    assert wrong == []


@pytest.mark.parametrize("first", ["random", "zeros"])
@pytest.mark.parametrize("name", HERE)
def test_three_updates_leave_what_one_load_gives(
    engine: PlayedEngine, saved: Callable[[str], tuple[Path, Tensors]], name: str, first: str
) -> None:
    folder, values = saved(name)
    more: Mapping[str, Any] = MODELS[name].arguments or {}
    memory = {key: torch.zeros_like(each) for key, each in values.items()}
    with ExitStack() as stack:
        with engine.rank(folder, tp_size=1, tp_rank=0, **more) as rank:
            fresh = freshly_loaded(rank, values, torch.float32)
        rank = stack.enter_context(engine.rank(folder, tp_size=1, tp_rank=0, **more))
        live = rank.model()
        load_through(live, {key: torch.randn_like(each) for key, each in values.items()})
        trainer = stack.enter_context(offered_tensors(memory))
        receiver = stack.enter_context(receiving(rank.installer(live)))
        for number in range(3):
            for key, tensor in memory.items():
                tensor.copy_(values[key] if number else values[key] * (first == "random"))
                tensor.mul_(1.0 if number == 2 else 0.5)
            update(receiver, [trainer])
        assert_same(live, fresh)


@pytest.mark.parametrize("name", [name for name in ("biases", "packed experts") if name in HERE])
def test_an_engine_in_bf16_is_traced_as_what_it_is(
    engine: PlayedEngine, saved: Callable[[str], tuple[Path, Tensors]], name: str
) -> None:
    """Float32 is refused; bfloat16 lands, and gives what a load of the checkpoint does."""
    folder, exact = saved(name)
    values = {key: each.bfloat16() for key, each in exact.items()}
    memory = {key: torch.zeros_like(each) for key, each in values.items()}
    with ExitStack() as stack:
        with engine.rank(folder, tp_size=1, tp_rank=0, dtype="bfloat16") as rank:
            fresh = freshly_loaded(rank, values, torch.bfloat16)
        rank = stack.enter_context(engine.rank(folder, tp_size=1, tp_rank=0, dtype="bfloat16"))
        wide = logical({key: each.float() for key, each in values.items()})
        with pytest.raises(WeightMismatchError, match="wants bfloat16"):
            engine_steps(rank.trace(wide), wide, rank.rules)
        with as_built(torch.bfloat16):
            live = rank.model()
            load_through(live, {key: torch.randn_like(each) for key, each in values.items()})
            installer = rank.installer(live)
        trainer = stack.enter_context(offered_tensors(memory))
        receiver = stack.enter_context(receiving(installer))
        direct = []
        for sign in (1, -1, 1):
            for key, tensor in memory.items():
                tensor.copy_(values[key] * sign)
            direct.append(update(receiver, [trainer]).direct_bytes > 0)
        assert direct == [False, True, True]
        assert_same(live, fresh)


def wrapper_base() -> type[nn.Module]:
    """The class by which the product knows a wrapper."""
    module = "vllm.lora.layers.base" if KIND == VLLM else "sglang.srt.lora.layers"
    base: type[nn.Module] = import_module(module).BaseLayerWithLoRA
    return base


def wrap(model: nn.Module) -> int:
    """Wrap layers as the engine does after it has loaded them; how many."""
    names = [name for name, _ in model.named_modules() if name.endswith(WRAPPED)]
    for name in names:
        layer = model.get_submodule(name)
        if KIND == VLLM:
            around: Any = wrapper_base()()
            around.base_layer = layer
        else:
            around = wrapper_base()(layer, None)
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, around)
    return len(names)


@pytest.mark.parametrize("name", ["biases", "packed experts"])
def test_layers_that_adapters_stand_on_are_updated(
    engine: PlayedEngine, saved: Callable[[str], tuple[Path, Tensors]], name: str
) -> None:
    """An engine with LoRA has wrapped layers, whose parameters have other names than a loader's."""
    folder, values = saved(name)
    memory = {key: torch.zeros_like(each) for key, each in values.items()}
    with ExitStack() as stack:
        with engine.rank(folder, tp_size=1, tp_rank=0) as rank:
            fresh = freshly_loaded(rank, values, torch.float32)
        rank = stack.enter_context(engine.rank(folder, tp_size=1, tp_rank=0))
        live = rank.model()
        load_through(live, {key: torch.randn_like(each) for key, each in values.items()})
        installer = rank.installer(live)
        assert wrap(live) >= 8
        trainer = stack.enter_context(offered_tensors(memory))
        receiver = stack.enter_context(receiving(installer))
        for sign in (1, -1, 1):
            for key, tensor in memory.items():
                tensor.copy_(values[key] * sign)
            report = update(receiver, [trainer])
            assert sign == 1 or report.direct_bytes > 0, "wrapped layers are landed in as well"
        now = {key.replace(".base_layer", ""): each for key, each in held(live).items()}
        wrong = [key for key, each in fresh.items() if not same_bits(each, now[key])]
        assert wrong == []
        kept = [each for each in live.modules() if isinstance(each, wrapper_base())]
        assert len(kept) >= 8, "the wrappers are where they were"


@pytest.mark.skipif(KIND != VLLM, reason="SGLang's own loaders load wrapped experts as others")
def test_experts_that_adapters_stand_on_are_refused_on_vllm(
    engine: PlayedEngine, saved: Callable[[str], tuple[Path, Tensors]]
) -> None:
    """Their kernels belong to the wrapper, and a reload was never seen to keep them."""
    folder, values = saved("packed experts")
    with engine.rank(folder, tp_size=1, tp_rank=0) as rank:
        live = rank.model()
        installer = rank.installer(live)
        of_experts = import_module("vllm.lora.layers").FusedMoEWithLoRA
        around = of_experts.__new__(of_experts)
        nn.Module.__init__(around)
        around.base_layer = live.get_submodule("model.layers.0.mlp.experts")
        setattr(live.get_submodule("model.layers.0.mlp"), "experts", around)  # noqa: B010
        with pytest.raises(UnsupportedError, match="LoRA for experts"):
            installer.trace(logical(values))


@pytest.mark.skipif(KIND != VLLM, reason="a buffer on vLLM's Transformers backend")
def test_a_bias_that_an_engine_keeps_in_a_buffer_is_missed(
    engine: PlayedEngine, tmp_path: Path
) -> None:
    """A router's correction bias is trained without a gradient, and no parameter."""
    values = checkpoint(Model("Dots1Config", DOTS), tmp_path)
    bias = [name for name in values if "e_score_correction_bias" in name]
    assert bias
    with engine.rank(tmp_path, tp_size=1, tp_rank=0) as rank:
        whole = logical(values)
        engine_steps(rank.trace(whole), whole, rank.rules)
        without = [tensor for tensor in whole if tensor.name not in bias]
        with pytest.raises(WeightMismatchError, match="e_score_correction_bias"):
            engine_steps(rank.trace(without), without, rank.rules)


@pytest.mark.skipif(KIND != SGLANG, reason="SGLang holds this bias in the dtype that it serves in")
def test_a_wide_bias_is_wanted_in_the_engines_dtype(engine: PlayedEngine, tmp_path: Path) -> None:
    """Ernie's router has it in float32 in every checkpoint, which SGLang casts as it loads."""
    sizes = {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    }
    values = checkpoint(Model("Ernie4_5_MoeConfig", sizes), tmp_path)
    bias = {name for name in values if "e_score_correction_bias" in name}
    assert bias
    offered = logical(
        {name: each if name in bias else each.bfloat16() for name, each in values.items()}
    )
    with engine.rank(tmp_path, tp_size=1, tp_rank=0, dtype="bfloat16") as rank:
        trace = rank.trace(offered)
        wanted = wanted_dtypes(trace, offered, torch.bfloat16)
        assert wanted == dict.fromkeys(bias, torch.bfloat16)
        assert engine_steps(trace, offered, rank.rules, mended=bias)[1] == []


@pytest.mark.skipif(KIND != VLLM, reason="vLLM's reload asks weight loaders for their names")
@pytest.mark.parametrize("where", ["serves", "noted"])
def test_a_loader_that_a_reload_could_not_ask_is_found_when_it_connects(
    engine: PlayedEngine, saved: Callable[[str], tuple[Path, Tensors]], where: str
) -> None:
    """Of what serves, and of what vLLM has noted of the model as it was built."""

    class Nameless:
        __slots__ = ()

        def __call__(self, parameter: torch.Tensor, weight: torch.Tensor) -> None:
            parameter.data.copy_(weight)

    folder, values = saved("biases")
    with engine.rank(folder, tp_size=1, tp_rank=0) as rank:
        live = rank.model()
        installer = rank.installer(live)
        norm = live.get_submodule("model.norm")
        layerwise = import_module("vllm.model_executor.model_loader.reload.layerwise")
        noted = layerwise.get_layerwise_info(norm).restore_metadata[0]
        tensor: Any = noted["weight"] if where == "noted" else norm.weight
        tensor.weight_loader = Nameless()
        with pytest.raises(UnsupportedError, match=r"cannot reload model\.norm\.weight"):
            installer.trace(logical(values))
