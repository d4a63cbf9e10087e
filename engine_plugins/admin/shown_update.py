"""What the shared state shows of an update under way: its phase, its bytes, the mark of new KV."""

from __future__ import annotations

import msgspec

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState, UpdateProgress, moved
from engine_plugins.admin.update_record import UpdateRecord

__all__ = ["ShownUpdate"]


class ShownUpdate:
    """One update, as `GET /state` shows it. The caller holds the operation lock.

    Args:
        shared: the state that every process sees.
        record: of the update.
    """

    def __init__(self, shared: SharedState, record: UpdateRecord) -> None:
        self._shared = shared
        self._bytes_total = record.plan.bytes_to_move
        self._body = record.body

    def phase(self, name: str, bytes_done: int | None) -> None:
        """Say what is done now; without a number of bytes the last one stays."""

        def change(state: EngineState) -> EngineState:
            done = state.update.bytes_done if bytes_done is None and state.update else bytes_done
            progress = UpdateProgress(
                request_id=self._body.request_id,
                version=self._body.version,
                phase=name,
                bytes_done=done or 0,
                bytes_total=self._bytes_total,
            )
            if state.state == "updating":
                return msgspec.structs.replace(state, update=progress)
            return moved(state, "updating", update=progress)

        self._shared.change(change)

    def mark_new_kv(self) -> None:
        """From here on no request may use KV of the weights before."""

        def change(state: EngineState) -> EngineState:
            # Counted, because the same version may come again with other weights.
            count = int((state.kv_generation or ".0").rpartition(".")[2]) + 1
            mark = f"weights-{self._body.version}.{count}"
            return msgspec.structs.replace(state, kv_generation=mark)

        self._shared.change(change)
