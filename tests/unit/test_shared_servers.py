"""The order in which tests that share servers are run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.configurations import DENSE, DENSE_TP2
from tests.support.engines import IN_MEMORY, VLLM
from tests.support.shared_servers import in_order


class Item:
    """As much of a test as its order depends on."""

    def __init__(self, name: str, **params: Any) -> None:
        self.name = name
        if params:
            self.callspec = SimpleNamespace(params=params)


def test_each_server_is_asked_for_once_at_the_place_of_its_first_test() -> None:
    """Tests without a server, or with one of their own, stay where they were."""
    items: list[Any] = [
        Item("a"),
        Item("b", engine=IN_MEMORY, served=DENSE),
        Item("c", engine=VLLM, served=DENSE),
        Item("d", engine=VLLM, served=DENSE_TP2),
        Item("e", engine=VLLM),
        Item("f", engine=VLLM, served=DENSE),
        Item("g", engine=IN_MEMORY, served=DENSE),
    ]
    assert [item.name for item in in_order(items)] == ["a", "b", "g", "c", "f", "d", "e"]
