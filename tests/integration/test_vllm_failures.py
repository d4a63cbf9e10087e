"""Two ranks, two API servers, and everything that goes wrong between a trainer and an engine.

The wire is tcp, where a stopped trainer really stalls a read. Every call goes over a new
connection, so either API server may answer it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import StartServer
from tests.support.engine_server import TOKEN
from tests.support.live_models import LiveModel
from tests.support.offers import MSGPACK, offered
from tests.support.stepping_worker import FOLDER, STEPPING_EXTENSION
from tests.support.trainer_process import TrainerProcess, trainer_process
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.engine

OLD, NEW = LiveModel(kind="qwen3_live", version=0), LiveModel(kind="qwen3_live", version=1)
API_KEY = "vllms-own-key"
HALF_WAY = 12
"""A module in the middle of the model's 35."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files hold or fail ranks; see tests/support/stepping_worker.py."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(scope="module")
def server(start_server: StartServer, steps: Path) -> Iterator[VllmServer]:
    """TP2 behind two API servers; vLLM's own key and its official endpoint hook are on too."""
    with start_server(
        OLD,
        tensor_parallel=2,
        api_servers=2,
        extension=STEPPING_EXTENSION,
        api_key=API_KEY,
        environment={
            "UCX_TLS": "tcp",
            "VLLM_PLUGINS": "engine_plugins",
            FOLDER: str(steps),
            "ENGINE_PLUGINS_STALL_TIMEOUT_S": "25",
        },
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(server: VllmServer, steps: Path) -> Iterator[None]:
    """Every test begins and ends with a right answer; a fence that it left is lifted."""
    yield
    for left in steps.iterdir():
        left.unlink()
    with trainer_process(OLD.folder, UCX_TLS="tcp") as trainer:
        done = _update(server, _connect(server, trainer), _next_version(server), force=True)
        assert done.status_code == 200, done.text
        _resume(server)
    assert OLD.wrong_answers(server.greedy) == []


@pytest.fixture
def trainer() -> Iterator[TrainerProcess]:
    """A trainer process that offers the new weights."""
    with trainer_process(NEW.folder, UCX_TLS="tcp") as process:
        yield process


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """For calls that take long."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def _connect(server: VllmServer, trainer: TrainerProcess) -> str:
    published = server.admin.post("/weights/sources", content=trainer.manifest, headers=MSGPACK)
    ids = [published.json()["source_id"]]
    connected = server.admin.post("/weights/connect", json={"source_ids": ids})
    assert connected.status_code == 200, connected.text
    return str(connected.json()["plan_id"])


def _update(server: VllmServer, plan_id: str, version: int, **more: Any) -> httpx.Response:
    return server.admin.post(
        "/weights/update", json={"plan_id": plan_id, "version": version, **more}
    )


def _resume(server: VllmServer) -> None:
    assert server.admin.post("/resume").status_code == 200


def _next_version(server: VllmServer) -> int:
    history = server.admin.get("/weights").json()["history"]
    return 1 + max((report["version"] for report in history), default=0)


def _wait_for(server: VllmServer, what: str, *, phase: str | None = None, name: str = "") -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        state = server.state()
        update = state["update"]
        if (name and state["state"] == name) or (phase and update and update["phase"] == phase):
            return
        time.sleep(0.02)
    raise AssertionError(f"never {what}: {server.state()}")


def _held(server: VllmServer, steps: Path, rank: int) -> Path:
    hold = steps / f"hold-{rank}-{HALF_WAY}"
    hold.touch()
    return hold


def test_both_api_servers_have_the_routes_once(server: VllmServer) -> None:
    """The general plugin and the official hook are both on; each process mounts one time."""
    log = server.log.read_text(errors="replace")
    mounted = [line for line in log.splitlines() if "admin routes are at /admin/v1" in line]
    assert len(mounted) == 2, mounted
    seen = {tuple(sorted(server.state()["engine"].items())) for _ in range(10)}
    assert len(seen) == 1


def test_our_token_and_vllms_key_do_not_open_each_others_doors(server: VllmServer) -> None:
    """The key of vLLM is a stranger on our routes, and our token on those of vLLM."""
    key = {"Authorization": f"Bearer {API_KEY}"}
    token = {"Authorization": f"Bearer {TOKEN}"}
    for headers in ({}, key):
        refused = httpx.get(server.url + "/admin/v1/state", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["code"] == "unauthorized"
    body = {"prompt": [5, 6, 7], "max_tokens": 1}
    for headers in ({}, token):
        refused = httpx.post(server.url + "/v1/completions", json=body, headers=headers)
        assert refused.status_code == 401
    assert server.greedy([5, 6, 7], 1)


@pytest.mark.parametrize("mode", ["in_place", "staged"])
def test_a_trainer_that_dies_before_anything_is_installed(
    server: VllmServer, trainer: TrainerProcess, background: ThreadPoolExecutor, mode: str
) -> None:
    """Named within 5 s; the old weights serve on as if nothing had been."""
    plan = _connect(server, trainer)
    before = server.state()["weights"]
    trainer.signal(signal.SIGSTOP)
    pull = background.submit(_update, server, plan, _next_version(server), mode=mode)
    _wait_for(server, "pulling", phase="pull")
    trainer.signal(signal.SIGKILL)
    died = time.monotonic()
    answer = pull.result(30)
    assert time.monotonic() - died < 5
    assert answer.status_code == 503, answer.text
    problem = answer.json()
    assert (problem["code"], problem["state"]) == ("peer_lost", "serving")
    assert f"trainer-{trainer.process.pid}-" in problem["detail"]
    assert server.state()["weights"] == before
    assert OLD.wrong_answers(server.greedy) == []


def test_a_trainer_that_is_dead_already(server: VllmServer, trainer: TrainerProcess) -> None:
    """Killed between connect and update."""
    plan = _connect(server, trainer)
    trainer.signal(signal.SIGKILL)
    asked = time.monotonic()
    answer = _update(server, plan, _next_version(server))
    assert time.monotonic() - asked < 5
    assert (answer.status_code, answer.json()["code"]) == (503, "peer_lost")
    assert f"trainer-{trainer.process.pid}-" in answer.json()["detail"]
    assert server.state()["state"] == "serving"
    assert OLD.wrong_answers(server.greedy) == []


def test_a_trainer_that_dies_half_way_fences_the_engine(
    server: VllmServer, trainer: TrainerProcess, steps: Path, background: ThreadPoolExecutor
) -> None:
    """No half-new answer: held and queued requests end, new ones get 503, resume is 409.

    A repeat of the version lifts the fence; an older one may not.
    """
    plan = _connect(server, trainer)
    version = _next_version(server) + 1
    hold = _held(server, steps, rank=0)
    update = background.submit(_update, server, plan, version)
    _wait_for(server, "installing", phase="install")
    queued = background.submit(server.complete, OLD.prompts()[0])
    time.sleep(0.3)
    trainer.signal(signal.SIGKILL)
    hold.unlink()
    answer = update.result(30)
    assert answer.status_code == 503, answer.text
    assert (answer.json()["code"], answer.json()["state"]) == ("peer_lost", "fenced")
    assert f"trainer-{trainer.process.pid}-" in answer.json()["detail"]
    _check_fenced(server, version)
    assert queued.result(30).status_code == 503, queued.result().text

    with trainer_process(NEW.folder, UCX_TLS="tcp") as another:
        plan = _connect(server, another)
        stale = _update(server, plan, version - 1)
        assert (stale.status_code, stale.json()["code"]) == (409, "stale_version")
        _check_fenced(server, version)
        lifted = _update(server, plan, version)
        assert lifted.status_code == 200, lifted.text
    state = server.state()
    assert (state["state"], state["fence"]) == ("serving", None)
    assert state["weights"]["version"] == version
    assert NEW.wrong_answers(server.greedy) == []


def _check_fenced(server: VllmServer, version: int) -> None:
    for _ in range(4):
        state = server.state()
        assert state["state"] == "fenced"
        assert f"version {version}" in state["fence"]["detail"]
        assert state["weights"]["version"] is None, "no version names a mixture"
        resumed = server.admin.post("/resume")
        assert (resumed.status_code, resumed.json()["state"]) == (409, "fenced")
        refused = server.complete(OLD.prompts()[0])
        assert refused.status_code == 503, refused.text
        assert "fenced" in refused.text
        streamed = server.http.post(
            "/v1/completions", json={"prompt": [5, 6], "max_tokens": 4, "stream": True}
        )
        assert streamed.status_code == 503, "refused before the stream opens"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", [1, HALF_WAY])
def test_a_failure_on_one_rank_alone(
    server: VllmServer, trainer: TrainerProcess, steps: Path, rank: int, at: int
) -> None:
    """The other rank is well, and yet nothing half-new serves; the next update is right.

    No answer of one call is taken for that of the next.
    """
    plan = _connect(server, trainer)
    version = _next_version(server)
    (steps / f"fail-{rank}-{at}").touch()
    failed = _update(server, plan, version, request_id=f"fails-{rank}-{at}")
    assert failed.status_code == 500, failed.text
    problem = failed.json()
    assert problem["code"] == "engine_call_failed"
    assert f"rank {rank}" in problem["detail"]
    assert "the other 1 ranks are well" in problem["detail"]
    _check_fenced(server, version)
    again = _update(server, plan, version, request_id=f"fails-{rank}-{at}")
    assert again.status_code == 500, "a repeated request_id is answered as before"
    assert again.json()["detail"] == problem["detail"]
    lifted = _update(server, plan, version)
    assert lifted.status_code == 200, lifted.text
    assert NEW.wrong_answers(server.greedy) == []
    assert [each["tp_rank"] for each in lifted.json()["ranks"]] == [0, 1]


def test_a_deadline_that_passes_half_way(
    server: VllmServer, trainer: TrainerProcess, steps: Path, background: ThreadPoolExecutor
) -> None:
    """timeout_s: 504 that names the rank and how far it came, and a fence."""
    plan = _connect(server, trainer)
    version = _next_version(server)
    hold = _held(server, steps, rank=1)
    update: Future[httpx.Response] = background.submit(
        _update, server, plan, version, timeout_s=1.0
    )
    _wait_for(server, "installing", phase="install")
    time.sleep(4.0)
    hold.unlink()
    answer = update.result(30)
    assert (answer.status_code, answer.json()["code"]) == (504, "transfer_timeout"), answer.text
    assert "rank" in answer.json()["detail"]
    _check_fenced(server, version)


def test_a_stopped_trainer_is_named_when_the_deadline_passes(
    server: VllmServer, trainer: TrainerProcess
) -> None:
    """NIXL would wait for ever; ours gives up, names the peer and the tensors, and serves on."""
    plan = _connect(server, trainer)
    trainer.signal(signal.SIGSTOP)
    asked = time.monotonic()
    answer = _update(server, plan, _next_version(server), timeout_s=3.0)
    assert time.monotonic() - asked < 10
    assert (answer.status_code, answer.json()["code"]) == (504, "transfer_timeout")
    detail = answer.json()["detail"]
    assert f"trainer-{trainer.process.pid}-" in detail or "rank" in detail
    assert server.state()["state"] == "serving"
    assert OLD.wrong_answers(server.greedy) == []


def test_sources_plans_and_answers_are_known_to_both_api_servers(server: VllmServer) -> None:
    """Each call may meet another process; ten updates with a call each never miss."""
    with offered(server.admin, NEW.tensors()) as offer:
        for _ in range(10):
            version = _next_version(server)
            done = offer.update(version, request_id=f"repeat-{version}")
            assert done.status_code == 200, done.text
            plan = done.json()["plan_id"]
            again = [
                offer.update_from(plan, version, request_id=f"repeat-{version}").json()
                for _ in range(4)
            ]
            assert again == [done.json()] * 4
            assert {server.state()["weights"]["version"] for _ in range(6)} == {version}
    assert NEW.wrong_answers(server.greedy) == []
