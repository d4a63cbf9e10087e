"""Whether an offer fits: said module by module, with the names that the trainer knows."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from engine_plugins.errors import WeightMismatchError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.coverage import (
    EngineStep,
    engine_steps,
    left_out_by_design,
    prediction_layers,
)
from engine_plugins.weights.loader.loader_trace import LoaderTrace, TracedCopy
from engine_plugins.weights.loader.short_reasons import short_reason
from tests.support.in_memory_model import InMemoryModel, hf_tensors, traced

BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an engine says of its loader."""

    model_dtype: torch.dtype = torch.float32
    ignorable: frozenset[str] = frozenset()

    def may_go_unused(self, name: str) -> bool:
        return name in self.ignorable


def offer(**changes: LogicalTensor | None) -> list[LogicalTensor]:
    """The model's own tensors; `None` takes one away (dots are written as `__`)."""
    tensors = {
        name: LogicalTensor(name=name, shape=tuple(data.shape), dtype=data.dtype)
        for name, data in hf_tensors(seed=0).items()
    }
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change
    return list(tensors.values())


def steps_of(
    tensors: list[LogicalTensor], rules: Rules | None = None, *, tp_rank: int = 0, tp_size: int = 1
) -> tuple[list[EngineStep], list[str]]:
    model = InMemoryModel(tp_rank=tp_rank, tp_size=tp_size)
    return engine_steps(traced(model, tensors), tensors, rules or Rules())


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (0, 2), (1, 2)])
def test_a_fitting_offer_becomes_steps_in_the_models_order(tp_rank: int, tp_size: int) -> None:
    """Every tensor in one step, a fused module's tensors together, in whatever order they came."""
    steps, unused = steps_of(offer()[::-1], tp_rank=tp_rank, tp_size=tp_size)
    assert unused == []
    assert [modules for modules, _ in steps] == [
        ["embed"],
        ["layers.0.attn.qkv"],
        ["layers.0.attn.out"],
        ["layers.1.attn.qkv"],
        ["layers.1.attn.out"],
        ["norm"],
    ]
    assert {t.name for t in steps[3][1]} == {f"model.layers.1.{p}_proj.weight" for p in "qkv"}
    assert sorted(t.name for _, tensors in steps for t in tensors) == sorted(hf_tensors(seed=0))


def test_a_missing_part_of_a_fused_parameter_is_named_by_its_checkpoint_name() -> None:
    """The engine knows only `qkv`; what it got in another layer tells what it lacks here."""
    with pytest.raises(WeightMismatchError) as error:
        steps_of(offer(model__layers__1__k_proj__weight=None))
    text = error.value.message
    assert "model.layers.1.k_proj.weight missing (needed by layers.1.attn.qkv.weight)" in text
    assert "layers.0" not in text
    assert "v_proj" not in text


def test_of_a_layer_that_is_missing_altogether_every_part_is_named() -> None:
    """All three, although nothing at all reached the parameter."""
    gone = {f"model__layers__0__{part}_proj__weight": None for part in "qkv"}
    with pytest.raises(WeightMismatchError) as error:
        steps_of(offer(**gone))
    for part in "qkv":
        assert f"model.layers.0.{part}_proj.weight" in error.value.message


def test_layers_that_lack_different_parts_are_each_told_all_of_theirs() -> None:
    """The fullest layer is the one to compare with, not the first that has more."""
    copies = [
        _copy(f"layers.{layer}.w", f"model.layers.{layer}.{part}", row)
        for layer, parts in enumerate(["ab", "a", "abcd"])
        for row, part in enumerate(parts)
    ]
    numel = {f"layers.{layer}.w": 4 for layer in range(3)}
    with pytest.raises(WeightMismatchError) as error:
        engine_steps(LoaderTrace(copies=tuple(copies), parameter_numel=numel), [], Rules())
    assert "model.layers.0.c, model.layers.0.d missing" in error.value.message
    assert "model.layers.1.b, model.layers.1.c, model.layers.1.d missing" in error.value.message


def test_experts_that_are_modules_of_their_own_are_named_by_layer_and_expert() -> None:
    """Two numbers in the engine's name are two in the checkpoint's."""
    copies = [
        _copy(f"layers.{n}.experts.{e}.w", f"h2.l.{n}.e.{e}.up", 0) for n, e in ((0, 0), (0, 3))
    ]
    numel = dict.fromkeys(("layers.0.experts.0.w", "layers.0.experts.3.w"), 1)
    numel["layers.1.experts.3.w"] = 1
    with pytest.raises(WeightMismatchError, match=r"h2\.l\.1\.e\.3\.up missing"):
        engine_steps(LoaderTrace(copies=tuple(copies), parameter_numel=numel), [], Rules())


def test_a_missing_tensor_without_a_likeness_is_named_by_the_engines_parameter() -> None:
    """There is one final norm: nothing to compare it with."""
    with pytest.raises(
        WeightMismatchError, match=r"norm\.weight has 16 elements, and no tensor fills it"
    ):
        steps_of(offer(model__norm__weight=None))


def test_an_overlap_that_makes_up_for_a_gap_is_named() -> None:
    """A loader that puts b over a half of a: as many elements as there are, and two are empty."""
    copies = (
        _copy("m.w", "a", 0)._replace(shape=(4,), strides=(1,)),
        _copy("m.w", "b", 2)._replace(shape=(4,), strides=(1,)),
    )
    trace = LoaderTrace(copies=copies, parameter_numel={"m.w": 8})
    with pytest.raises(WeightMismatchError, match=r"a, b fill 6, 2 of them by two copies"):
        engine_steps(trace, [], Rules())


def test_a_short_tensor_that_the_loader_fills_up_is_named() -> None:
    """SGLang does so on the CPU; what is padded in every layer alike, it pads by design."""
    copies = [_copy(f"layers.{layer}.w", f"model.layers.{layer}.k", 0) for layer in range(3)]
    pads = [_copy(f"layers.{layer}.w", "", 1)._replace(sources=()) for layer in range(3)]
    numel = {f"layers.{layer}.w": 2 for layer in range(3)}
    all_alike = LoaderTrace(copies=(*copies, *pads), parameter_numel=numel)
    assert engine_steps(all_alike, _tensors("model.layers.{}.k", 3), Rules())[1] == []

    rest = [_copy(f"layers.{layer}.w", f"model.layers.{layer}.v", 1) for layer in (0, 2)]
    one_short = LoaderTrace(copies=(*copies, *rest, pads[1]), parameter_numel=numel)
    with pytest.raises(WeightMismatchError) as error:
        engine_steps(one_short, [], Rules())
    assert (
        "layers.1.w is filled but for 1 elements, which the loader makes up, by model.layers.1.k"
        in error.value.message
    )
    assert "layers.0" not in error.value.message


def test_padding_is_compared_among_layers_and_not_among_names_with_numbers_in_them() -> None:
    """Phi has `fc1`, whose size SGLang pads, and `fc2`, whose size it does not."""
    copies = [
        _copy(f"layers.{n}.fc{k}.bias", f"h.{n}.fc{k}.bias", 0) for n in (0, 1) for k in (1, 2)
    ]
    pads = [_copy(f"layers.{n}.fc1.bias", "", 1)._replace(sources=()) for n in (0, 1)]
    numel = {f"layers.{n}.fc{k}.bias": 3 - k for n in (0, 1) for k in (1, 2)}
    trace = LoaderTrace(copies=(*copies, *pads), parameter_numel=numel)
    offered = [*_tensors("h.{}.fc1.bias", 2), *_tensors("h.{}.fc2.bias", 2)]
    assert engine_steps(trace, offered, Rules())[1] == []


def test_padding_without_any_tensor_is_told_so() -> None:
    """The last rank's share may be nothing but padding."""
    pads = [_copy(f"layers.{n}.w", "", 0)._replace(sources=()) for n in (0, 1)]
    short = pads[0]._replace(parameter="layers.2.w", shape=(0,), strides=(1,))
    filled = [_copy("layers.2.w", "h.2.w", 0)]
    numel = dict.fromkeys([f"layers.{n}.w" for n in range(3)], 1)
    trace = LoaderTrace(copies=(*pads, short, *filled), parameter_numel=numel)
    with pytest.raises(WeightMismatchError, match="which the loader makes up, by no tensor"):
        engine_steps(trace, [], Rules())


def test_what_a_loader_says_is_cut_to_some_names_in_their_order() -> None:
    """Engines put all that they have into it, in an order that changes from run to run."""
    names = {f"layers.0.{letter}.weight" for letter in "zyxwvutsrq"}
    said = short_reason(KeyError(f"no h. The available parameters are: {names}"))
    assert said == (
        'KeyError: "no h. The available parameters are: '
        "{'layers.0.q.weight', 'layers.0.r.weight', "
        "'layers.0.s.weight', 'layers.0.t.weight' and 6 more}\""
    )
    assert short_reason(ValueError("no ['b', 'a']")) == "ValueError: no ['b', 'a']"
    assert short_reason(AssertionError()) == "AssertionError"
    assert len(short_reason(ValueError("x" * 10_000))) < 600


def _tensors(name: str, layers: int) -> list[LogicalTensor]:
    return [
        LogicalTensor(name=name.format(layer), shape=(), dtype=torch.float32)
        for layer in range(layers)
    ]


def test_a_wrong_shape_is_named() -> None:
    """The loader refuses it, and the tensor it was looking at is the culprit."""
    wrong = LogicalTensor(name="model.norm.weight", shape=(15,), dtype=torch.float32)
    with pytest.raises(WeightMismatchError, match=r"model\.norm\.weight: .*\(15,\)"):
        steps_of(offer(model__norm__weight=wrong))


def test_a_wrong_dtype_is_named_with_both_dtypes() -> None:
    """A silent cast would install other values than the trainer's."""
    wrong = LogicalTensor(name="model.norm.weight", shape=(16,), dtype=torch.float16)
    with pytest.raises(
        WeightMismatchError, match=r"model\.norm\.weight is float16, norm\.weight wants float32"
    ):
        steps_of(offer(model__norm__weight=wrong))


def test_the_models_own_dtype_may_be_cast_as_the_engine_does_with_its_checkpoint() -> None:
    """A router kept in float32 by a bfloat16 engine takes the checkpoint's bfloat16."""
    wide = LogicalTensor(name="model.norm.weight", shape=(16,), dtype=BF16)
    assert steps_of(offer(model__norm__weight=wide), Rules(model_dtype=BF16))


def test_names_that_reach_nothing_are_told_apart_from_those_that_may_be_ignored() -> None:
    """The caller decides over all ranks: another rank may have a use for them."""
    extra = {
        name: LogicalTensor(name=name, shape=(3,), dtype=torch.float32)
        for name in ("rotary.inv_freq", "vision.w")
    }
    tensors = [*offer(), *extra.values()]
    _, unused = steps_of(tensors, Rules(ignorable=frozenset({"rotary.inv_freq"})))
    assert unused == ["vision.w"]


def test_many_problems_are_counted_and_only_the_first_are_listed() -> None:
    """A message stays readable whatever the model's size."""
    copies = tuple(_copy(f"m{n}.w", f"t{n}", 0, dtype=torch.float16) for n in range(50))
    numel = {f"m{n}.w": 1 for n in range(50)}
    with pytest.raises(WeightMismatchError) as error:
        engine_steps(LoaderTrace(copies=copies, parameter_numel=numel), [], Rules())
    assert "(and 42 more)" in error.value.message
    assert error.value.message.count("is float16") == 8


def test_modules_that_share_tensors_share_a_step_however_they_are_linked() -> None:
    """A module that shares one tensor with each of two others joins all three.

    Otherwise it would be installed with the first, without what comes with the second.
    """
    places = {"a.w": "ta", "b.w": "tb", "mid.w": "t", "c.w": "ta", "c.v": "tb", "d.w": "tb"}
    copies = tuple(_copy(parameter, source, 0) for parameter, source in places.items())
    numel = dict.fromkeys(("a.w", "mid.w", "b.w", "c.w", "c.v", "d.w"), 1)
    tensors = [LogicalTensor(name=n, shape=(), dtype=torch.float32) for n in ("ta", "tb", "t")]
    steps, _ = engine_steps(LoaderTrace(copies=copies, parameter_numel=numel), tensors, Rules())
    told = [(modules, [tensor.name for tensor in step]) for modules, step in steps]
    assert told == [(["a", "b", "c", "d"], ["ta", "tb"]), (["mid"], ["t"])]


def _copy(
    parameter: str, source: str, offset: int, dtype: torch.dtype = torch.float32
) -> TracedCopy:
    return TracedCopy(
        sources=(source,),
        parameter=parameter,
        offset=offset,
        shape=(),
        strides=(),
        source_dtype=dtype,
        parameter_dtype=torch.float32,
        pure=True,
    )


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.layers.4.mlp.up_proj.weight", True),
        ("model.layers.5.eh_proj.weight", True),
        ("model.layers.6.mlp.up_proj.weight", False),
        ("mtp.fc.weight", True),
        ("model.norm.weight", False),
    ],
)
def test_prediction_layers_are_those_that_the_config_counts(name: str, unused: bool) -> None:
    """The target model of a checkpoint with MTP layers has no parameters for them."""
    layers = prediction_layers(SimpleNamespace(num_hidden_layers=4, num_nextn_predict_layers=2))
    assert left_out_by_design(name, tied=False, predicting=layers) is unused


@pytest.mark.parametrize("counted", [{}, {"num_nextn_predict_layers": None}])
def test_a_config_without_prediction_layers_excuses_no_name(counted: dict[str, None]) -> None:
    layers = prediction_layers(SimpleNamespace(num_hidden_layers=4, **counted))
    for name in ("model.layers.4.eh_proj.weight", "mtp.fc.weight"):
        assert not left_out_by_design(name, tied=False, predicting=layers)
