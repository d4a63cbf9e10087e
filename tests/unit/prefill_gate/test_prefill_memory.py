"""Predictions against made-up steps: accurate where lengths differ, and unmoved by oddities."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_plugins.prefill_gate.fitted_line import KEPT_PER_SIZE
from engine_plugins.prefill_gate.model_memory import AttentionMemory, ModelMemory, ModelSizes
from engine_plugins.prefill_gate.prefill_memory import PrefillMemory
from engine_plugins.prefill_gate.step_shape import NOTHING, Candidate, StepShape
from tests.support.simulated_steps import MIB, SIZES, a_memory, calibrated, true_peak


def _step(tokens: int, *, logprobs: bool = False) -> StepShape:
    return Candidate("x", tokens, tokens, prompt_logprobs=logprobs).joined_to(NOTHING, tokens)


@pytest.mark.parametrize("logprobs", [False, True])
def test_lengths_that_were_not_measured_are_predicted(logprobs: bool) -> None:
    """Within 2 %, from 5 sizes up to 1024 with noise of a quarter MiB."""
    memory = calibrated(a_memory())
    for tokens in (333, 777, 2048, 4096):
        shape = _step(tokens, logprobs=logprobs)
        assert memory.predict(shape).peak_bytes == pytest.approx(true_peak(shape), rel=0.02)


def test_short_chats_do_not_push_out_what_long_prompts_have_taught() -> None:
    """The samples of a size are bounded, and sizes do not displace each other."""
    memory = calibrated(a_memory())
    before = memory.predict(_step(4096)).peak_bytes
    noise = random.Random(1)
    for number in range(5000):
        shape = _step(noise.randint(5, 60))
        memory.observe(shape, true_peak(shape, noise), at=float(number))
    assert memory.predict(_step(4096)).peak_bytes == pytest.approx(before, rel=0.03)
    kept = sum(len(samples) for samples in memory.samples.values())
    assert kept <= 4 * 30 * KEPT_PER_SIZE


def test_a_spike_moves_neither_the_line_nor_for_ever_the_margin() -> None:
    """A page cache that was filled in the middle of one step, say: forgotten with its size."""
    memory = calibrated(a_memory())
    shape = _step(1024)
    usual = memory.predict(shape)
    memory.observe(shape, true_peak(shape) + 4000 * MIB, at=1.0)
    assert memory.predict(shape).peak_bytes == pytest.approx(usual.peak_bytes, rel=0.02)
    for second in range(200):
        memory.observe(shape, true_peak(shape), at=float(second))
    assert memory.predict(shape).margin_bytes == usual.margin_bytes


def test_the_margin_covers_the_errors_that_are_seen_and_never_falls_below_its_floor() -> None:
    """At the quantile: one step in fifty that takes 30 MiB more is covered at 0.99."""
    noise = random.Random(4)
    for quantile, covered in ((0.99, True), (0.5, False)):
        memory = PrefillMemory(
            ModelMemory(SIZES, itemsize=2), margin_quantile=quantile, margin_bytes=5 * MIB
        )
        for tokens in (32, 64, 128, 256, 512, 1024, 2048):
            for turn in range(9):
                shape = _step(tokens)
                over = 30 * MIB if turn == 5 else 0
                memory.observe(shape, true_peak(shape, noise) + over, at=0.0)
        memory.restore(memory.samples, now=1.0)
        margin = memory.predict(_step(700)).margin_bytes
        assert (margin > 25 * MIB) == covered
        assert margin >= 5 * MIB


def test_the_first_step_of_a_size_is_cold_and_left_out() -> None:
    """Kernels are chosen and caches filled in it."""
    memory = a_memory()
    for tokens in (64, 512, 4096):
        for turn in range(3):
            cold = 500 * MIB if turn == 0 else 0
            memory.observe(_step(tokens), true_peak(_step(tokens)) + cold, at=0.0)
    shape = _step(1000)
    assert memory.predict(shape).peak_bytes == pytest.approx(true_peak(shape), rel=0.02)


def test_a_prior_is_taken_twice_until_measurements_speak() -> None:
    """One size tells of steps up to about its own; two sizes far apart give a line."""
    memory = a_memory()
    first = memory.predict(_step(2048))
    assert first.margin_bytes == a_memory().model.phases(_step(2048))[0]
    for _ in range(3):
        memory.observe(_step(1024), true_peak(_step(1024)), at=0.0)
    for tokens in (600, 1024, 1500):
        prediction = memory.predict(_step(tokens))
        assert true_peak(_step(tokens)) <= prediction.peak_bytes
        assert prediction.margin_bytes == 8 * MIB
    far = memory.predict(_step(4096))
    assert far.margin_bytes > far.peak_bytes / 3
    for _ in range(3):
        memory.observe(_step(128), true_peak(_step(128)), at=0.0)
    assert memory.predict(_step(4096)).margin_bytes == 8 * MIB
    assert memory.description()["layers"].proven


def test_a_phase_of_which_little_is_known_gets_its_room_beside_one_that_is_known() -> None:
    """Few logprobs in a long prompt, where logprobs alone were measured: layers may take more."""
    memory = a_memory()
    for tokens in (64, 512):
        for _ in range(3):
            shape = _step(tokens, logprobs=True)
            memory.observe(shape, true_peak(shape), at=0.0)
    mixed = _step(2300)._replace(prompt_logprob_rows=40)
    prediction = memory.predict(mixed)
    assert prediction.regime == "prompt_logprobs"
    assert prediction.peak_bytes < true_peak(mixed) < prediction.needed_bytes


@given(tokens=st.integers(1, 4096), other=st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
def test_one_size_never_predicts_too_little_of_another(tokens: int, other: int) -> None:
    """As far as it is believed, whatever it was."""
    memory = a_memory()
    for _ in range(3):
        memory.observe(_step(tokens), true_peak(_step(tokens)), at=0.0)
    assert memory.predict(_step(other)).needed_bytes >= true_peak(_step(other))


def test_what_was_measured_long_ago_is_forgotten() -> None:
    """An engine that runs for weeks is not judged by its first day."""
    memory = PrefillMemory(
        ModelMemory(SIZES, itemsize=2), margin_quantile=0.99, margin_bytes=0, expire_s=100.0
    )
    calibrated(memory, at=0.0)
    for tokens in (64, 512, 4096):
        for _ in range(8):
            memory.observe(_step(tokens), 2 * true_peak(_step(tokens)), at=500.0)
    assert all(each.at == 500.0 for each in memory.samples["layers"])
    expected = 2 * true_peak(_step(1000))
    assert memory.predict(_step(1000)).peak_bytes == pytest.approx(expected, rel=0.02)


def test_a_step_that_keeps_much_is_predicted_with_it_and_not_learnt_from() -> None:
    """What it keeps is counted by the kernel when it is touched, which is later."""
    memory = calibrated(a_memory())
    before = memory.samples
    shape = _step(500)._replace(held_bytes=300 * MIB)
    plain = memory.predict(_step(500)).peak_bytes
    assert memory.predict(shape).peak_bytes == plain + 300 * MIB
    for _ in range(3):
        memory.observe(shape, 20 * MIB, at=0.0)
    assert memory.samples == before


def test_sizes_of_which_little_is_known_are_worth_a_measurement() -> None:
    """Reading a peak costs a step a tenth of a millisecond."""
    memory = calibrated(a_memory())
    assert memory.is_worth_measuring(_step(4096))
    for _ in range(KEPT_PER_SIZE + 1):
        memory.observe(_step(4096), true_peak(_step(4096)), at=0.0)
    assert not memory.is_worth_measuring(_step(4096))
    assert memory.is_worth_measuring(_step(200))


def test_an_operator_sees_how_far_predictions_are_off() -> None:
    """By phase, as a share of what was measured."""
    memory = calibrated(a_memory())
    memory.restore({}, now=0.0)
    line = memory.description()["prompt_logprobs"]
    assert line.samples == 8
    assert 0 < line.error_p95 < 0.02
    assert line.margin_bytes == 8 * MIB
    assert memory.description()["encoder"].error_p95 == 0.0


def test_a_reset_is_as_good_as_new() -> None:
    """The prior speaks again."""
    memory = calibrated(a_memory())
    memory.reset()
    assert memory.predict(_step(500)) == a_memory().predict(_step(500))


shapes = st.builds(
    StepShape,
    tokens=st.integers(1, 10_000),
    context=st.integers(0, 100_000),
    pairs=st.integers(0, 10**8),
    rows=st.integers(0, 300),
    prompt_logprob_rows=st.integers(0, 5000),
    multimodal_tokens=st.integers(0, 5000),
    lora_tokens=st.integers(0, 5000),
    held_bytes=st.integers(0, 10**9),
)


@given(shape=shapes, more=shapes)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less(shape: StepShape, more: StepShape) -> None:
    """Otherwise the search for the largest chunk would be wrong; measured or not."""
    for memory in (a_memory(), calibrated(a_memory())):
        larger = StepShape(*(one + other for one, other in zip(shape, more, strict=True)))
        assert memory.predict(larger).peak_bytes >= memory.predict(shape).peak_bytes


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e12)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_measurements_make_nonsense(measured: list[tuple[int, float]]) -> None:
    """Whatever a step is said to have taken, predictions stay finite, and not negative."""
    memory = a_memory()
    for tokens, peak in measured:
        memory.observe(_step(tokens), peak, at=0.0)
    prediction = memory.predict(_step(100))
    assert 0 <= prediction.peak_bytes < 1e15
    assert 0 <= prediction.margin_bytes < 1e15


class _Config:
    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


def test_sizes_come_from_the_configs_of_dense_and_moe_models() -> None:
    """Under the names that each family gives them."""
    dense = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "intermediate_size": 128,
    }
    sizes = ModelSizes.from_config(_Config(**dense))
    assert (sizes.kv_heads, sizes.head_dim, sizes.experts_per_token) == (4, 16, 0)
    deepseek = _Config(
        **dense,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=2,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
    )
    sizes = ModelSizes.from_config(deepseek, _Config(hidden_size=10, intermediate_size=40))
    assert (sizes.experts, sizes.experts_per_token, sizes.expert_intermediate) == (8, 2, 32)
    assert (sizes.shared_intermediate, sizes.head_dim) == (64, 32)
    assert (sizes.vision_hidden, sizes.vision_intermediate) == (10, 40)
    mixtral = _Config(**dense, num_local_experts=8, num_experts_per_tok=2)
    assert ModelSizes.from_config(mixtral).expert_intermediate == 128


def test_each_part_of_a_model_takes_memory_in_its_phase() -> None:
    """Experts, adapters, an encoder, an attention that makes scores; ranks share what they cut."""
    plain = ModelMemory(SIZES, itemsize=2).phases(StepShape(100, 100, 10_000, 1, 0, 0, 0))
    assert plain[2:] == (0, 0)
    moe = ModelSizes(
        **{
            **{name: getattr(SIZES, name) for name in SIZES.__dataclass_fields__},
            "experts": 64,
            "experts_per_token": 8,
            "expert_intermediate": 768,
        }
    )
    assert (
        ModelMemory(moe, itemsize=2).phases(StepShape(100, 100, 10_000, 1, 0, 0, 0))[0] > plain[0]
    )
    scores = AttentionMemory(per_pair=64, per_context_token=10)
    with_scores = ModelMemory(SIZES, itemsize=2, attention=scores).phases(
        StepShape(100, 7, 50, 1, 0, 0, 0)
    )
    assert with_scores[0] == plain[0] + 64 * 50 + 10 * 7
    adapters = ModelMemory(SIZES, itemsize=2, lora_rank=16)
    assert adapters.phases(StepShape(100, 100, 10_000, 1, 0, 0, 50))[0] == plain[0] + 16 * 4 * 50
    assert (
        ModelMemory(SIZES, itemsize=2, tp_size=2).phases(StepShape(100, 1, 1, 1, 0, 0, 0))[0]
        < plain[0]
    )


def test_an_engine_that_computes_prompt_logprobs_in_parts_takes_one_part_at_a_time() -> None:
    """Up to there as any other."""
    whole = ModelMemory(SIZES, itemsize=2)
    parts = ModelMemory(SIZES, itemsize=2, logprob_rows_at_once=1024)
    for rows in (1, 1024, 3000):
        shape = StepShape(tokens=3000, prompt_logprob_rows=min(rows, 1024))
        asked = shape._replace(prompt_logprob_rows=rows)
        assert parts.phases(asked) == whole.phases(shape)
    assert parts.description != whole.description


@pytest.mark.parametrize(
    ("itemsize", "fused", "bytes_a_word"), [(2, False, 10), (2, True, 6), (4, False, 8)]
)
def test_prompt_logprobs_take_the_bytes_a_word_that_were_measured(
    itemsize: int, fused: bool, bytes_a_word: int
) -> None:
    """bfloat16 on the CPU: 10 for each token of the prompt and word of the vocabulary; GPUs: 6."""
    model = ModelMemory(SIZES, itemsize=itemsize, fused_logprobs=fused)
    one = model.phases(StepShape(1000, 0, 0, 0, 1, 0, 0))[2]
    two = model.phases(StepShape(1000, 0, 0, 0, 2, 0, 0))[2]
    assert two - one == bytes_a_word * SIZES.vocab
