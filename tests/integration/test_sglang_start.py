"""Starting a server with our flags, and the starts that are refused."""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from engine_plugins.admin.engine_processes import has_ended
from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.admin.shared_state import create_runtime_dir
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import AdminAnswerError
from engine_plugins.sleep.process_identity import ProcessIdentity
from sglang_ext.roll_call import absences, report_present
from sglang_ext.server_flags import prepare_server_args, refuse_unsupported, take_flags
from sglang_ext.versions import SGLANG
from tests.chaos_update.processes import Processes, held
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.live_models import LiveModel
from tests.support.looked_into import FOLDER, look_into
from tests.support.sglang_server import sglang_server
from tests.support.waiting import until

OURS = "ENGINE_PLUGINS_"


@pytest.fixture(autouse=True)
def _settings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags end up in the environment; none is there before a test, or after it."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if OURS not in k})


def test_flags_are_taken_out_and_handed_on() -> None:
    """SGLang sees its own, other processes see ours."""
    rest = take_flags(
        [
            *("--model-path", "m", "--engine-plugins-stall-timeout-s", "7.5"),
            *("--engine-plugins-staging-bytes=1024", "--tp", "2", "--engine-plugins-enable"),
        ]
    )
    assert rest == ["--model-path", "m", "--tp", "2"]
    assert os.environ["ENGINE_PLUGINS_STALL_TIMEOUT_S"] == "7.5"
    assert os.environ["ENGINE_PLUGINS_STAGING_BYTES"] == "1024"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--engine-plugins-stall-timeout-s", "soon"], "STALL_TIMEOUT_S: 'soon' is not float"),
        (["--engine-plugins-stall-timeout-s", "-1"], "STALL_TIMEOUT_S must be positive"),
        (["--engine-plugins-staging-bytes"], "expected one argument"),
        (["--engine-plugins-speed", "9"], "there is no flag --engine-plugins-speed"),
        (["--engine-plugins-admin-token", "x"], "there is no flag --engine-plugins-admin-token"),
        (["--engine-plugins-admin-token=x"], "ENGINE_PLUGINS_ADMIN_TOKEN or ENGINE"),
        (["--engine-plugins-enable=yes"], "ignored explicit argument"),
        (["--engine-plugins-prefill-gate", "maybe"], "PREFILL_GATE must be one of"),
        (["--engine-plugins-prefill-margin-bytes", "-1"], "PREFILL_MARGIN_BYTES must"),
    ],
)
def test_a_bad_flag_ends_the_start_with_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded, and without a traceback."""
    with pytest.raises(SystemExit) as ended:
        take_flags(argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not any(name.startswith(OURS) for name in os.environ)


@pytest.mark.parametrize(
    "argv",
    [
        ["--engine-plugins-admin-token", "s3cret"],
        ["--engine-plugins-admin-token=s3cret"],
        ["--engine-plugins-admin-tok=s3cret"],
        ["--engine_plugins_admin_token=s3cret"],
        ["--engine-plugins-enable", "--engine-plugins-token=s3cret"],
    ],
)
def test_a_token_on_the_command_line_is_refused_and_not_repeated(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Output is kept in logs."""
    with pytest.raises(SystemExit):
        take_flags(argv)
    said = capsys.readouterr()
    assert "there is no flag --engine-plugins-" in said.err
    assert "s3cret" not in said.err + said.out


@pytest.mark.filterwarnings("ignore::UserWarning")  # of SGLang's import, without a GPU
def test_a_cap_above_the_machine_ends_the_start_with_one_line() -> None:
    """The gate would let in what cannot fit."""
    argv = ["--engine-plugins-prefill-cap-bytes", str(1 << 60)]
    arguments = SimpleNamespace(device="cpu", enable_memory_saver=False)
    with pytest.raises(SystemExit, match=r"PREFILL_CAP_BYTES is .* above the machine's memory"):
        prepare_server_args(lambda rest: arguments, argv)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"pp_size": 2}, "--pp-size 2: pipeline parallelism is not supported yet"),
        ({"dp_size": 2}, "--dp-size 2: data parallelism in one server"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
        (
            {"checkpoint_engine_wait_weights_before_ready": True},
            "a server that waits for its first weights by SGLang's own routes",
        ),
        ({"enable_lmcache": True}, "--enable-lmcache True: a cache that may give back"),
        ({"enable_flexkv": True}, "--enable-flexkv True: a cache that may give back"),
        ({"enable_mm_global_cache": True}, "--enable-mm-global-cache True: a cache that may"),
        ({"radix_cache_backend": "mine"}, "--radix-cache-backend mine: a cache that may give"),
        ({"language_only": True}, "--language-only True: taking embeddings from an encoder"),
        ({"grpc_port": 50051}, "--grpc-port 50051: the gRPC server is not supported yet"),
    ],
)
def test_a_server_that_our_hooks_were_not_probed_with_is_refused(
    setting: dict[str, object], said: str
) -> None:
    """Rather than answered by some of its ranks."""
    with pytest.raises(SystemExit) as ended:
        refuse_unsupported(argparse.Namespace(**setting))
    assert said in str(ended.value)


@pytest.mark.parametrize(
    ("name", "value"), [("SGLANG_GRPC_PORT", "50051"), ("SGLANG_RUST_SERVER", "1")]
)
def test_servers_without_our_routes_are_refused_by_variable_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """They would pause and update the engine without a token."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name}.* server is not supported yet"):
        refuse_unsupported(argparse.Namespace())


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """In front of SGLang's own."""
    assert take_flags(["--engine-plugins-enable", "--help"]) == ["--help"]
    said = capsys.readouterr().out
    for flag in ("--engine-plugins-enable", "--engine-plugins-admin-token-file"):
        assert flag in said


def test_a_rank_that_is_absent_or_incomplete_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number, with what it lacks."""
    create_runtime_dir(tmp_path)
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    report_present(0, [])
    assert absences(1) == []
    report_present(1, ["sglang.a.b"])
    incomplete, absent = absences(3)
    assert "did not take the hooks on sglang.a.b in scheduler rank 1" in incomplete
    assert "scheduler rank 2 runs without engine-plugins" in absent


@pytest.mark.engine
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            "wanted:weight updates:sglang.srt.utils.auth:add_api_key_middleware(app, keys)",
            "has sglang.srt.utils.auth.add_api_key_middleware(app, *, api_key, admin_api_key), not "
            "(app, keys)",
        ),
        (
            "unhookable:sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
            "did not take the hooks on sglang.srt.managers.tokenizer_manager",
        ),
        (
            "unhookable:sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
            "scheduler rank 0 runs without engine-plugins",
        ),
    ],
)
def test_a_server_without_all_hooks_does_not_start(tmp_path: Path, broken: str, said: str) -> None:
    """It says which is missing, and the release that has it."""
    with pytest.raises(RuntimeError, match="did not come up"), _broken(tmp_path, broken):
        pass
    log = (tmp_path / "log").read_text()
    reason = next(line for line in log.splitlines() if "engine-plugins: error" in line)
    assert said in reason
    assert "0.5.23" in reason


@pytest.mark.engine
@pytest.mark.parametrize(
    ("broken", "said", "told"),
    [
        (
            "wanted:the prefill gate:sglang.srt.mem_cache.common:release_kv_cache(req, cache)",
            "has sglang.srt.mem_cache.common.release_kv_cache",
            True,
        ),
        (
            "unhookable:sglang.srt.managers.scheduler.Scheduler.run_batch",
            "did not take the hooks on sglang.srt.managers.scheduler.Scheduler.run_batch",
            False,  # nobody had tried
        ),
    ],
)
def test_what_the_gate_alone_lacks_leaves_a_server_without_one(
    tmp_path: Path, broken: str, said: str, told: bool
) -> None:
    """It serves, its State tells what is known, and who turns the gate on is told why not."""
    with _broken(tmp_path, broken) as server:
        assert len(server.greedy([5, 6, 7], 2)) == 2
        absent = server.admin.get("/state").json()["absent"]
        assert [each["part"] for each in absent] == (["prefill_gate"] if told else [])
        assert all(said in each["reason"] for each in absent)
        with AdminClient(server.url, token=TOKEN) as client:
            assert client.prefill_gate().settings.mode == "off"
            with pytest.raises(AdminAnswerError, match=said):
                client.set_prefill_gate(mode="observe")
            assert client.reset_prefill_gate().settings.mode == "off"
        assert len(server.greedy([5, 6, 7], 2)) == 2


@pytest.mark.engine
def test_a_server_in_a_process_of_its_own_is_ours_by_the_environment(tmp_path: Path) -> None:
    """Its arguments come from no command line; its directory is its own, and goes with it.

    Its schedulers have no hook of the prefill gate until that is turned on, while they serve.
    """
    steps = {"run_batch", "_get_new_batch_prefill_raw", "_add_request_to_queue", "_pull_raw_reqs"}

    def hooked() -> set[str]:
        told = look_into(server.pid, tmp_path, sorted(SGLANG.hooked))
        return {name.rpartition(".")[2] for each in told.values() for name in each["hooked"]}

    with sglang_server(
        LiveModel(kind="qwen3_live", version=0).copy_to(tmp_path / "model"),
        tmp_path / "log",
        environment={"ENGINE_PLUGINS_ENABLE": "1", FOLDER: str(tmp_path)},
        launcher="tests.support.launching_sglang",
        preload=True,
    ) as server:
        state = server.admin.get("/state").json()
        assert (state["state"], state["absent"]) == ("serving", [])
        assert len(state["workers"]) == 1
        (owner,) = tmp_path.glob("engine-plugins-*/owner")
        noted = msgspec.json.decode(owner.read_bytes(), type=ProcessIdentity)
        assert noted.pid in [each.pid for each in psutil.Process(server.pid).children()]
        assert "handle_generate_request" in hooked()
        assert not steps & hooked()
        server.admin.patch("/prefill-gate", json={"mode": "observe"}).raise_for_status()
        assert len(server.greedy([5, 6, 7], 2)) == 2
        assert steps <= hooked()
        gate = server.admin.get("/prefill-gate").json()
        assert sum(gate["decisions"].values()) >= 1


@pytest.mark.engine
def test_a_server_of_two_api_processes_ends_with_its_detokenizer(tmp_path: Path) -> None:
    """Stopped, it is named and requests are refused; dead, it leaves no server that says it serves.

    SGLang itself does not see its death where the API processes are others than the first.
    """
    with sglang_server(
        LiveModel(kind="qwen3_live", version=0).copy_to(tmp_path / "model"),
        tmp_path / "log",
        api_servers=2,
        arguments=["--engine-plugins-enable"],
        preload=True,
    ) as server:
        processes = Processes(server, 2)
        pid = processes.detokenizer
        with held([pid]):
            until(lambda: server.state()["state"] == "fenced", otherwise=server.state, within_s=15)
            fence = server.state()["fence"]
            assert fence["code"] == "process_stopped"
            assert f"detokenizer (pid {pid}) is stopped" in fence["detail"]
            assert server.complete([5, 6, 7], 2).status_code == 503
        until(lambda: server.state()["state"] == "serving", otherwise=server.state)
        everyone = [*processes.apis, *processes.workers, server.pid]
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: all(has_ended(each, None) for each in everyone),
            within_s=10,
            otherwise=server.log_tail,
        )
    assert not list(tmp_path.glob("engine-plugins-*"))


def _broken(folder: Path, broken: str) -> AbstractContextManager[EngineServer]:
    return sglang_server(
        LiveModel(kind="qwen3_live", version=0).copy_to(folder / "model"),
        folder / "log",
        arguments=["--engine-plugins-enable"],
        environment={"BROKEN_SGLANG": broken},
        launcher="tests.support.broken_sglang",
        preload=True,
    )
