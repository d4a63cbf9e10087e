"""Who feeds whom: the tree's shape, and what becomes of engines whose feeder is gone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from engine_plugins.sender.fan_out import TRAINER, FanOutTree

SIZES = range(1, 21)
ARITIES = (1, 2, 3, 7)


def names(count: int) -> list[str]:
    return [f"engine-{place}" for place in range(count)]


class Simulation:
    """Carries a tree through, with engines that die after they installed or refuse to feed.

    A dead engine is noticed by the first that reads from it.
    """

    def __init__(
        self,
        count: int,
        arity: int,
        *,
        dead: Iterable[str] = (),
        refuse: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        self.engines = names(count)
        self.tree = FanOutTree(self.engines, arity)
        self.dead, self.refuse = set(dead), set(refuse)
        self.by_trainer: list[str] = []
        self.holds: list[str] = []
        self.most_at_a_time = 0
        self._random = random.Random(seed)
        self._reading: list[str] = []
        roots = self.engines[:1]
        while roots:
            for root in roots:
                self.tree.begin(root, TRAINER)
                self.by_trainer.append(root)
            self._reading += roots
            self._until_quiet()
            roots = self.tree.roots()

    def _until_quiet(self) -> None:
        """Feeds end in any order."""
        while self._reading:
            engine = self._reading.pop(self._random.randrange(len(self._reading)))
            self._end(engine, self.tree.fed_by[engine])
            while (feed := self.tree.next_feed()) is not None:
                self._reading.append(feed[0])
            feeders = Counter(self.tree.fed_by[engine] for engine in self._reading)
            feeders.pop(TRAINER, None)
            self.most_at_a_time = max([self.most_at_a_time, *feeders.values()])

    def _end(self, engine: str, feeder: str) -> None:
        if feeder in self.dead:
            self.tree.failed(feeder)
            self.tree.try_another(engine)
        elif feeder in self.refuse:
            self.tree.retire(feeder)
            self.tree.try_another(engine)
        else:
            self.tree.installed(engine)
            self.holds.append(engine)


@pytest.mark.parametrize("arity", ARITIES)
@pytest.mark.parametrize("count", SIZES)
def test_every_engine_is_fed_by_its_place(count: int, arity: int) -> None:
    """Whatever the order in which feeds end: the same tree, so that plans are kept."""
    done = Simulation(count, arity, seed=count)
    engines = done.engines
    expected = {engines[place]: engines[(place - 1) // arity] for place in range(1, count)}
    assert done.tree.fed_by == {engines[0]: TRAINER} | expected
    assert sorted(done.holds) == sorted(engines)
    assert done.by_trainer == engines[:1]


@pytest.mark.parametrize("arity", ARITIES)
@pytest.mark.parametrize("count", SIZES[1:])
def test_the_children_of_a_dead_engine_are_given_to_another(count: int, arity: int) -> None:
    """Each engine in turn; the trainer is read again only where no other engine has the version."""
    for dead in names(count):
        done = Simulation(count, arity, dead=[dead], seed=count)
        assert sorted({*done.holds, dead}) == sorted(done.engines)
        others = [engine for engine in done.engines if engine != dead]
        assert all(done.tree.fed_by[engine] != dead for engine in others)
        root_again = [others[0]] if dead == done.engines[0] else []
        assert done.by_trainer == [done.engines[0], *root_again]


def test_a_grandparent_comes_first() -> None:
    """Then engines in their order, as far as they have room."""
    done = Simulation(7, 2, dead=["engine-1"])
    assert done.tree.fed_by["engine-3"] in ("engine-2", "engine-0")
    chain = Simulation(4, 1, dead=["engine-1"])
    assert chain.tree.fed_by["engine-2"] == "engine-0"
    assert chain.tree.fed_by["engine-3"] == "engine-2"
    refuse = Simulation(4, 1, refuse=["engine-1"])
    assert list(refuse.tree.fed_by.values()) == [TRAINER, "engine-0", "engine-0", "engine-2"]


def test_no_engine_is_read_by_more_than_the_arity_at_a_time() -> None:
    """Also when many are gone, in any order."""
    for seed in range(200):
        chance = random.Random(seed)
        count, arity = chance.randint(1, 20), chance.randint(1, 4)
        dead = [engine for engine in names(count) if chance.random() < 0.3]
        done = Simulation(count, arity, dead=dead, seed=seed)
        assert done.most_at_a_time <= arity
        assert set(done.holds) | set(dead) == set(done.engines)


def test_where_no_engine_can_feed_the_trainer_feeds_all() -> None:
    """Engines that hold the version and cannot offer it: two rounds, not one for each engine."""
    done = Simulation(6, 2, refuse=names(6))
    assert done.by_trainer == done.engines
    assert set(done.tree.fed_by.values()) == {TRAINER}


def test_one_engine_that_cannot_feed_costs_the_trainer_nothing() -> None:
    done = Simulation(7, 2, refuse=["engine-1"])
    assert done.by_trainer == ["engine-0"]
    assert "engine-1" not in done.tree.fed_by.values()
