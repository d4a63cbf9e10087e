"""The mark of the weights in a request's cache key."""

from __future__ import annotations

from engine_plugins.admin.kv_mark import marked


def test_before_the_first_update_a_key_is_the_requests_own() -> None:
    """Caches behave as the engine's own until there is something to keep apart."""
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
