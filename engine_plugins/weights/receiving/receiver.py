"""The engine-side receiver of one rank: connect, bring an update in, install when told.

The engine's process calls short methods (`connect`, `start`, `poll`, `advance`, `finish`,
`abort`); a pull runs in a thread, so that the engine goes on meanwhile. Each module has one of
three ways in. *Direct*: its bytes land in the live parameters, while the engine stands still.
*Staged*: they wait in a registered arena and are copied from there to where the loader would put
them. *Through the loader*: the engine's own loader gets whole tensors from the arena. An arena that
holds one module and a little more bounds the memory (in place); one that holds all of them keeps
the old weights serving until everything is here (staged).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine_plugins.errors import ConflictError, UnknownIdError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.report import RankReport
from engine_plugins.weights.hardware.free_memory import surely_free_bytes
from engine_plugins.weights.hardware.peak_memory import PeakMemory
from engine_plugins.weights.hardware.queued_work import finish_queued_work
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.loader.needed import needed_boxes
from engine_plugins.weights.loader.weight_installer import WeightInstaller
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan_cache import PlanCache
from engine_plugins.weights.planning.plan_data import FetchPlan, Step
from engine_plugins.weights.planning.source_choice import Reader
from engine_plugins.weights.receiving.collector import collector_paused
from engine_plugins.weights.receiving.connection import (
    Connection,
    ConnectResult,
    Direction,
    other_dtypes,
    rank_plan,
)
from engine_plugins.weights.receiving.engine_model import EngineModel
from engine_plugins.weights.receiving.peer_source import PeerSource
from engine_plugins.weights.receiving.plan_memory import PlanMemory
from engine_plugins.weights.receiving.prepared_fetch import sources_of
from engine_plugins.weights.receiving.prepared_push import PreparedPush
from engine_plugins.weights.receiving.staging import StagingRoom
from engine_plugins.weights.receiving.step_install import install_step
from engine_plugins.weights.receiving.update_run import PreparedPlan, PullStatus, UpdateRun
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.quarantine import quarantined_bytes

__all__ = ["Aborted", "WeightReceiver"]


class WeightReceiver:
    """All updates of one engine rank. Called from one thread; the pull has its own.

    Args:
        installer: the engine's side of loading.
        transport: makes the agent of this process when the first plan needs it.
        tp_rank: this rank, as errors will name it.
        stall_timeout_s: a pull that moves no byte for so long is given up.
        direct_landing: whether bytes may land in live parameters at all.
        reader: how this rank chooses among sources that hold the same; evenly if not told.
        expected_link_gbps: gigabytes per second that the link to a source should give.
    """

    def __init__(
        self,
        installer: WeightInstaller,
        transport: Callable[[], Transport],
        *,
        tp_rank: int,
        stall_timeout_s: float,
        direct_landing: bool = True,
        reader: Reader | None = None,
        expected_link_gbps: float | None = None,
    ) -> None:
        self._installer = installer
        self._reader = reader or Reader(tp_rank=tp_rank)
        self._expected_link_gbps = expected_link_gbps
        self._cache = PlanCache()
        self._make_transport = transport
        self._memory = PlanMemory(transport)
        self._tp_rank = tp_rank
        self._stall_timeout_s = stall_timeout_s
        self._direct_landing = direct_landing
        self._connected: dict[str, Connection] = {}
        self._run: UpdateRun | None = None
        self._model = EngineModel(installer)
        self._lost = False
        self._peers: PeerSource | None = None

    def connect(
        self,
        plan_id: str,
        manifests: Sequence[SourceManifest],
        *,
        direction: Direction = "pull",
        tell_dtypes: bool = False,
    ) -> ConnectResult:
        """Plan what this rank gets from the sources, and meet them or say where they write.

        Args:
            plan_id: names the plan.
            manifests: of the sources.
            direction: who moves the bytes.
            tell_dtypes: make no plan of tensors in wrong dtypes, but say which they should have.

        Raises:
            WeightMismatchError: names, shapes or dtypes do not fit the engine's model.
            PlanError: the sources leave a gap or overlap.
            PeerError: a source cannot be met.
            UnsupportedError: a source speaks over another wire.
        """
        self._refuse_while_running()
        planning = time.perf_counter()
        with collector_paused():
            found = functools.partial(self._cache.finding, manifests)
            tensors = found("tensors", lambda: logical_tensors(manifests))
            trace = self._model.trace(tensors)
            self._look_again()
            partial = all(manifest.partial for manifest in manifests)
            if tell_dtypes:
                told = other_dtypes(
                    trace,
                    tensors,
                    self._installer,
                    tp_rank=self._tp_rank,
                    since=planning,
                    partial=partial,
                )
                if told is not None:
                    return told
            steps, unused = found(
                "steps of a part" if partial else "steps",
                lambda: engine_steps(trace, tensors, self._installer, partial=partial),
            )
            connected = Connection(
                direction=direction,
                manifests=manifests,
                steps=steps,
                needed=found("needed", lambda: needed_boxes(trace, tensors)),
                strided=trace.strided,
            )
            plan = self._plan(connected, direct=self._direct_landing)
        connecting = time.perf_counter()
        prepared = self._prepare(plan_id, connected, plan, staged=False)
        self._connected[plan_id] = connected
        if direction == "pull":
            read = [manifests[each] for each in sources_of(plan)]
            self._memory.peers.measure(read, expected_gbps=self._expected_link_gbps)
        return ConnectResult(
            plan=rank_plan(plan, trace, self._model.landing, self._tp_rank, prepared.arena_bytes),
            unused=unused,
            plan_s=connecting - planning,
            connect_s=time.perf_counter() - connecting,
            destination=(
                prepared.destination(self._tp_rank) if isinstance(prepared, PreparedPush) else None
            ),
        )

    def manifest(self, model: Mapping[str, str | int | bool], word: int) -> bytes:
        """What this rank's live parameters hold, as a source for other engines.

        Args:
            model: facts of the engine's HF config.
            word: the version word, until these parameters are written to.

        Raises:
            ConflictError: in the middle of an update, or see `peer_boxes`.
        """
        if self._peers is None:
            self._peers = PeerSource(
                self._peer_boxes, self._make_transport(), tp_rank=self._tp_rank, model=model
            )
        return self._peers.manifest_bytes(word)

    def drop(self, plan_id: str) -> None:
        """Forget a plan, its receive buffer, and sources that no other plan knows."""
        self._refuse_while_running()
        self._connected.pop(plan_id, None)
        if self._memory.of(plan_id) is not None:
            self._memory.release()
        known = {each.agent for held in self._connected.values() for each in held.manifests}
        self._memory.forget_peers(known)

    def staging_room(self, plan_id: str) -> StagingRoom:
        """What it would take to stage this plan's next update."""
        self._refuse_while_running()
        plan = self._pull_plan(self._connection(plan_id), staged=True)
        self._memory.reclaim()
        return StagingRoom(
            tp_rank=self._tp_rank,
            wanted_bytes=plan.total_bytes + plan.scratch_bytes,
            held_bytes=self._memory.held_bytes,
            free_bytes=surely_free_bytes(),
            quarantined_bytes=quarantined_bytes(),
        )

    @property
    def quarantined_bytes(self) -> int:
        """Memory of this process that broken updates have lost, until nothing can come into it."""
        return quarantined_bytes()

    def start(
        self,
        plan_id: str,
        *,
        staged: bool,
        timeout_s: float,
        word: int | None = None,
        tell: Callable[[PullStatus], None] = lambda status: None,
    ) -> PullStatus:
        """Begin to pull; of a push, make ready what the trainers write to.

        A pull leaves the engine's weights untouched until `advance`. A push into live parameters
        may write to them from here on: the engine must stand still.

        Args:
            plan_id: of a connection.
            staged: whether nothing is installed before every byte is here.
            timeout_s: seconds until the pull is given up.
            word: what the sources' version words must be; None takes what they are now.
            tell: see `UpdateRun`.
        """
        self._refuse_while_running()
        connected = self._connection(plan_id)
        if connected.direction == "pull":
            plan = self._pull_plan(connected, staged=staged)
            self._memory.keep(plan_id, plan, staged=staged)
            memory = PeakMemory.start(already_held=self._memory.held_bytes)
            prepared = self._prepare(plan_id, connected, plan, staged=staged, met=True)
        else:
            memory = PeakMemory.start(already_held=self._memory.held_bytes)
            prepared = self._push_of(plan_id)
        self._run = UpdateRun(
            prepared,
            memory,
            deadline=time.monotonic() + timeout_s,
            stall_timeout_s=self._stall_timeout_s,
            tp_rank=self._tp_rank,
            tell=tell,
            word=word,
        )
        if connected.direction == "pull":
            self._run.go()
        elif prepared.plan.direct_bytes:
            self._run.begin(self._begin)
        return self._run.status()

    def written(self) -> PullStatus:
        """Go on with a push: the trainers have written every byte of it."""
        run = self._current()
        if not isinstance(run.prepared, PreparedPush):
            raise ConflictError(
                f"rank {self._tp_rank} pulls, nobody writes to it", remedy="commit the update"
            )
        run.go()
        return run.status()

    def confirm(self) -> PullStatus:
        """See that no source has taken back what is here, before any of it is installed.

        Raises:
            SourceRevokedError: one has.
        """
        run = self._current()
        run.prepared.confirm()
        return run.status()

    def look(self) -> PullStatus:
        """See whether the trainers are there, while what is here waits for its commit.

        Raises:
            PeerLostError: one is gone.
            SourceRevokedError: one took its offer back.
        """
        run = self._current()
        run.prepared.look()
        return run.status()

    def poll(self) -> PullStatus:
        """Where the update stands; never blocks."""
        return self._current().status()

    def advance(self, *, budget_s: float) -> PullStatus:
        """Install what is here, waiting for more, for about `budget_s` seconds.

        Raises:
            EnginePluginError: the pull failed, or the engine refused to load a module.
        """
        run = self._current()
        until = time.monotonic() + budget_s
        run.begin(self._begin)
        while run.installed < run.total and time.monotonic() < until:
            ready = run.next_ready(until)
            if ready is None:
                break
            with run.installing():
                self._install(run.prepared, *ready)
        return run.status()

    def finish(self) -> RankReport:
        """End an update of which every step is installed.

        Raises:
            ConflictError: some are not; ending here would serve a mixture.
            SourceRevokedError: a source has taken its offer back.
        """
        run = self._current()
        if run.installed < run.total:
            raise ConflictError(
                f"rank {self._tp_rank} has {run.installed} of {run.total} modules installed",
                remedy="advance until all are installed, or abort",
            )
        run.prepared.confirm()
        with run.timed_install():
            # What was spread or copied by us went to streams that the engine's own know nothing of.
            finish_queued_work(self._model.landing.memory())
            self._installer.finish()
        self._run = None
        direct = run.prepared.plan.direct_bytes
        needed = sum(step.bytes_needed for step in run.prepared.plan.steps)
        return RankReport(
            tp_rank=self._tp_rank,
            pid=os.getpid(),
            bytes_moved=run.prepared.bytes_done,
            direct_bytes=direct,
            staged_bytes=run.staged_bytes,
            loader_bytes=needed - direct - run.staged_bytes,
            wire_s=run.prepared.wire_s,
            install_s=run.install_s,
            peak_extra_bytes=run.memory.peak_extra_bytes(),
        )

    def abort(self, *, writes_ended: bool | None = None) -> Aborted:
        """Stop the update under way, if any; say what may have become of live weights.

        Args:
            writes_ended: of a push, whether the trainers are known to write no more.
        """
        run, self._run = self._run, None
        if run is None:
            return Aborted(wrote=False, lost=self._lost)
        still_landing = not run.stop()
        if isinstance(run.prepared, PreparedPush):
            still_landing = still_landing or not writes_ended
        # First of all: whatever becomes of the engine, this memory must not be used again.
        if still_landing or run.lost_track_of_buffer:
            self._memory.quarantine(run.pulling)
        written_to = run.wrote and run.prepared.plan.direct_bytes > 0
        if run.lost_track_of_live or (still_landing and written_to):
            self._lost = True
        if run.wrote:
            self._installer.abandon()
        return Aborted(wrote=run.wrote, lost=self._lost)

    def let_go(self, *, lost: bool) -> None:
        """Give back the receive buffer, and hold on to no live parameter: its memory may go.

        Plans stay, but for pushes, whose trainers were told of memory. Peers are met again.

        Args:
            lost: the parameters' values will not come back.

        Raises:
            ConflictError: in the middle of an update.
        """
        self._refuse_while_running()
        self._deregister()
        self._memory.reclaim()
        self._memory.forget_peers()
        if lost:
            self._model.forget_values()
            self._forget_plans()

    def renew_agent(self) -> None:
        """End the agent and all that is registered with it; the next plan makes another.

        Raises:
            ConflictError: in the middle of an update.
        """
        self._refuse_while_running()
        self._deregister()
        self._memory.close()

    def close(self) -> None:
        """Release the arena, the live parameters and the agent."""
        self.abort()
        self._deregister()
        self._memory.close()

    def _begin(self) -> None:
        """From here on live parameters may be written: peers that read them must see that."""
        if self._peers is not None:
            self._peers.revoke()
        self._installer.begin()

    def _install(self, prepared: PreparedPlan, step: Step, index: int) -> None:
        self._current().staged_bytes += install_step(
            self._installer,
            self._model.landing,
            prepared,
            step,
            index,
            may_land=self._direct_landing,
        )

    def _pull_plan(self, connected: Connection, *, staged: bool) -> FetchPlan:
        """The plan as it is now: with the modules that have been proven."""
        self._look_again()
        return self._plan(connected, direct=self._direct_landing and not staged)

    def _plan(self, connected: Connection, *, direct: bool) -> FetchPlan:
        return connected.plan(self._model.landing, self._reader, self._cache, direct=direct)

    def _peer_boxes(self) -> list[SourceBox]:
        self._refuse_while_running()
        self._look_again()
        return self._model.peer_boxes()

    def _look_again(self) -> bool:
        """Drop every plan into live parameters that are no longer where they were."""
        moved = self._model.look_again()
        if moved:
            self._memory.release()
            self._forget_plans()
        return moved

    def _forget_plans(self) -> None:
        self._cache.clear()
        for connected in self._connected.values():
            connected.plans.clear()

    def _deregister(self) -> None:
        self._memory.release()
        if self._peers is not None:
            self._peers.close()
            self._peers = None
        if not self._lost:
            self._memory.deregister_live()

    def _push_of(self, plan_id: str) -> PreparedPlan:
        """The memory that the trainers were told of; nothing else will do."""
        moved, prepared = self._look_again(), self._memory.of(plan_id)
        if moved or prepared is None:
            raise UnknownIdError(
                f"rank {self._tp_rank} no longer holds the memory that plan {plan_id} told of",
                remedy="connect again",
            )
        return prepared

    def _refuse_while_running(self) -> None:
        if self._lost:
            raise ConflictError(
                f"rank {self._tp_rank} cannot tell whether bytes of a broken update still come "
                "into its live parameters",
                remedy="restart the engine",
            )
        if self._run is not None:
            raise ConflictError(
                f"rank {self._tp_rank} is in the middle of an update",
                remedy="wait for it, or abort it",
            )

    def _connection(self, plan_id: str) -> Connection:
        if plan_id not in self._connected:
            raise UnknownIdError(
                f"rank {self._tp_rank} holds no plan {plan_id}", remedy="connect again"
            )
        return self._connected[plan_id]

    def _prepare(
        self,
        plan_id: str,
        connected: Connection,
        plan: FetchPlan,
        *,
        staged: bool,
        met: bool = False,
    ) -> PreparedPlan:
        landing = self._model.landing
        return self._memory.prepare(plan_id, connected, plan, landing, staged=staged, met=met)

    def _current(self) -> UpdateRun:
        if self._run is None:
            raise ConflictError(
                f"rank {self._tp_rank} has no update under way", remedy="start one first"
            )
        return self._run


@dataclass(frozen=True, kw_only=True)
class Aborted:
    """What an update that was given up may have done to live weights."""

    wrote: bool
    lost: bool
    """Bytes may still come in, at any time: only a restart helps."""
