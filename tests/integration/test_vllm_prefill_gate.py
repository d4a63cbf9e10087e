"""The prefill gate of vLLM under a limit that its worker's process cannot pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.besieged import Siege, besieged
from tests.support.chaos import scored
from tests.support.engine_server import ROOT, TOKEN
from tests.support.engines import VLLM
from tests.support.gate_models import QUICK
from tests.support.streams import Stream
from tests.support.vllm_server import QUIET
from tests.support.waiting import until

pytestmark = pytest.mark.engine

LONG = 2048
CHAT = [3, 1, 4, 1, 5]
MEASURED = (450, 700, 1000)
MIB = 1 << 20

Sieged = tuple[Siege, dict[str, Any]]


@pytest.fixture(scope="module")
def sieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sieged]:
    """A calibrated server that has too little room for a long prompt with all its logits.

    With it comes what it said of such a prompt when it had room, and no gate.
    """
    with besieged(VLLM, tmp_path_factory.mktemp("siege"), mode="observe", model=QUICK) as siege:
        siege.calibrate()
        siege.configure(mode="off")
        answer = scored(siege.server, siege.prompt(LONG, 7), 4).json()
        siege.server.admin.post("/flush").raise_for_status()
        siege.configure(mode="observe")
        siege.limit_addresses()
        siege.wait_until_seen()
        yield siege, answer


@pytest.fixture
def siege(sieged: Sieged) -> Iterator[Siege]:
    """The gate is in force; the engine lives when the test has ended."""
    siege, _ = sieged
    siege.configure(mode="enforce", cap_bytes=None)
    yield siege
    siege.configure(mode="enforce", cap_bytes=None)
    assert siege.lives(), siege.server.log_tail()


def test_what_has_no_room_at_once_is_cut_and_says_the_same(siege: Siege, sieged: Sieged) -> None:
    """Tokens are those of an engine with room, and so are the prompt's log-probabilities."""
    before = siege.gate()["decisions"]["shrink"]
    answer = scored(siege.server, siege.prompt(LONG, 7), 4)
    assert answer.status_code == 200, answer.text
    assert siege.gate()["decisions"]["shrink"] > before
    [cut], [whole] = answer.json()["choices"], sieged[1]["choices"]
    assert cut["token_ids"] == whole["token_ids"]
    assert _logprobs(cut) == pytest.approx(_logprobs(whole), abs=1e-4)


def test_small_requests_are_answered_among_large_ones(siege: Siege) -> None:
    alone = siege.server.greedy(CHAT, 8)
    with ThreadPoolExecutor(6) as pool:
        large = [
            pool.submit(scored, siege.server, siege.prompt(LONG, seed)) for seed in range(20, 23)
        ]
        small = [pool.submit(siege.server.greedy, CHAT, 8) for _ in range(12)]
        assert [each.result() for each in small] == [alone] * 12
        assert {each.result().status_code for each in large} <= {200, 503}


def test_a_step_that_finds_no_memory_ends_its_largest_prompt_and_no_other(siege: Siege) -> None:
    """The gate only watches: the step is run, fails, and is taken back."""
    alone = siege.server.greedy(CHAT, 200)
    siege.configure(mode="observe")
    other = Stream(siege.server, CHAT, 200)
    other.wait_for(5)
    answer = scored(siege.server, siege.prompt(LONG, 30))
    assert answer.status_code == 503, answer.text
    assert "ran out of memory" in answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    assert other.result() == alone
    assert siege.server.greedy(CHAT, 200) == alone
    assert siege.gate()["exceeded"] >= 1, "the next one like it is judged by it"
    assert "The step is taken back" in siege.server.log.read_text()
    siege.configure(mode="enforce")
    assert scored(siege.server, siege.prompt(LONG, 30)).status_code == 200


def test_what_it_measured_is_what_it_had_predicted(siege: Siege) -> None:
    """Of lengths that no line was drawn from; each told before it was learned."""
    for tokens in MEASURED:
        scored(siege.server, siege.prompt(tokens, 40)).raise_for_status()
    siege.server.greedy(CHAT, 1)
    steps = [each for each in siege.gate()["recent"] if each["tokens"] in MEASURED]
    scored_steps = [each for each in steps if each["prompt_logprob_rows"]]
    assert len(scored_steps) == 3
    for step in scored_steps:
        assert step["predicted_bytes"] == pytest.approx(step["measured_bytes"], rel=0.01)


def test_without_the_gate_the_engine_dies(sieged: Sieged) -> None:
    """The same prompt, the same limit and the same server: the last that is asked of it."""
    siege, _ = sieged
    siege.configure(mode="off", cap_bytes=None)
    assert siege.server.greedy(CHAT, 2)
    try:
        status = scored(siege.server, siege.prompt(LONG, 50)).status_code
    except httpx.HTTPError:
        status = 0
    assert status != 200
    until(lambda: not _answers(siege), within_s=60, otherwise=lambda: "it still answers")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """A server that cannot cut prompts, with a tokenizer, and room for some hundred tokens."""
    folder = tmp_path_factory.mktemp("uncut")
    _save_tokenizer(folder / "tokenizer")
    with besieged(
        VLLM,
        folder,
        mode="enforce",
        model=QUICK,
        arguments=[
            *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
            *("--no-skip-tokenizer-init", "--tokenizer", str(folder / "tokenizer")),
        ],
    ) as siege:
        assert siege.server.greedy(CHAT, 2)
        used = siege.gate()["used_bytes"]
        siege.configure(cap_bytes=used + 64 * MIB)
        until(
            lambda: _largest(siege) < 4096, within_s=10, otherwise=lambda: "the limits are not told"
        )
        yield siege


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_at_the_door_what_is_too_large_is_told_what_fits(
    uncut: Siege, route: str, stream: bool
) -> None:
    """413 on every route before anything is sent, and what is just small enough is answered."""
    answer = _ask(uncut, route, 6000, stream=stream)
    assert answer.status_code == 413, answer.text
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert told["code"] == "prompt_too_large"
    assert 64 <= told["largest_prompt"] < 6000
    assert f"at most {told['largest_prompt']} tokens" in told["error"]["message"]
    assert _ask(uncut, route, 64, stream=stream).status_code == 200


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PREFILL_GATE": "on"}, "PREFILL_GATE must be one of"),
        ({"PREFILL_MARGIN_BYTES": "-1"}, "PREFILL_MARGIN_BYTES must not be negative"),
        ({"PREFILL_CAP_BYTES": str(1 << 60)}, "PREFILL_CAP_BYTES is 1152921504606846976, above"),
    ],
    ids=["mode", "margin", "cap"],
)
def test_a_wrong_setting_fails_the_start(
    settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    """In the words of the setting, whichever process is the first to see it."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("vllm")), "serve"),
            *(str(QUICK.copy_to(tmp_path / "model")), "--port", "0", "--dtype", "float32"),
            *("--enforce-eager", "--skip-tokenizer-init", "--kv-cache-memory-bytes", "64M"),
            *("--worker-extension-cls", "vllm_ext.worker_extension.EnginePluginsWorkerExtension"),
        ],
        cwd=ROOT,
        env={
            **_environment(tmp_path),
            "ENGINE_PLUGINS_PREFILL_GATE": "enforce",
            **{f"ENGINE_PLUGINS_{name}": value for name, value in settings.items()},
        },
        capture_output=True,
        text=True,
        timeout=240,
        process_group=0,
    )
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        **QUIET,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        "ENGINE_PLUGINS_ADMIN_TOKEN": TOKEN,
    }


def _ask(siege: Siege, route: str, tokens: int, *, stream: bool) -> httpx.Response:
    """One word is one token."""
    text = " ".join(["w1"] * (tokens - 8))
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    body: dict[str, Any] = {limit: 2, "temperature": 0, "stream": stream}
    if route == "completions":
        body["prompt"] = text
    elif route == "responses":
        body["input"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    return siege.server.http.post(f"/v1/{route}", json=body)


def _save_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(QUICK.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    made.save_pretrained(folder)


def _largest(siege: Siege) -> int:
    answer = _ask(siege, "completions", 8000, stream=False)
    return int(answer.json()["largest_prompt"]) if answer.status_code == 413 else 1 << 30


def _logprobs(choice: dict[str, Any]) -> list[float]:
    """Those of the prompt's own tokens; the first has none."""
    told = choice["prompt_logprobs"]
    assert len(told) == LONG
    return [next(iter(each.values()))["logprob"] for each in told[1:]]


def _answers(siege: Siege) -> bool:
    try:
        return siege.server.complete(CHAT, 1).status_code == 200
    except httpx.HTTPError:
        return False
