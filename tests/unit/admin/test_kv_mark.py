"""The mark of the weights in a request's cache key."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine_plugins.admin.kv_mark import marked
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir


def test_no_mark_repeats_in_another_life_of_the_server(tmp_path: Path) -> None:
    """A store of KV may outlive a server that was started with other weights, and updated alike."""
    seen: list[str | None] = []
    for life in ("first", "second"):
        create_runtime_dir(tmp_path / life)
        shared, other = SharedState(tmp_path / life), SharedState(tmp_path / life)
        seen.append(shared.read().kv_mark)
        shared.change(lambda state: msgspec.structs.replace(state, kv_generation="weights-1.1"))
        seen.append(shared.read().kv_mark)
        assert other.read().kv_mark == seen[-1]  # in every process of the server
        create_runtime_dir(tmp_path / life)  # laid out again by a process that finds it
        assert shared.read().kv_mark == seen[-1]
    assert None not in seen
    assert len(set(seen)) == 4


def test_without_a_mark_a_key_is_the_requests_own() -> None:
    assert marked(None, None) is None
    assert marked("tenant", None) == "tenant"


def test_a_client_cannot_mark_kv_for_weights_to_come() -> None:
    """Clients choose their keys, and a later update's mark can be guessed."""
    to_come = marked("tenant", "weights-1.1")
    assert marked(to_come, None) == "tenant"
    assert marked(marked(None, "weights-1.1"), None) is None
    nested = "\x00engine-plugins:a\x00\x00engine-plugins:weights-1.1\x00"
    assert marked(nested, None) is None
    assert marked(to_come, "weights-0.1") == marked("tenant", "weights-0.1")


def test_a_new_generation_takes_the_place_of_the_old_one() -> None:
    """A request that waits over two updates has the mark of the second, and its own key."""
    for own in (None, "tenant", "tenant|adapter-0123"):
        first, second = marked(own, "v1.1"), marked(own, "v2.2")
        assert first != second
        assert marked(first, "v2.2") == second


def test_requests_with_different_keys_stay_apart() -> None:
    """Under one generation too, and what an engine hung on at the end is kept."""
    assert marked("a", "v1.1") != marked("b", "v1.1")
    assert marked(f"{marked('a', 'v1.1')}adapter", "v2.2") == marked("aadapter", "v2.2")
