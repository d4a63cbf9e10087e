"""How engines come to know what every trainer rank offers: from the leading rank, or from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.fleet import Fleet
from engine_plugins.sender.offer import TrainerOffer
from engine_plugins.sender.rank_wire import Buffer
from engine_plugins.sender.ranks import TrainerRanks
from engine_plugins.sender.report import EngineFailure
from engine_plugins.sender.rounds import Offer, publish_to
from engine_plugins.weights.contract.manifest_batch import MAX_BATCH, pack_manifest

__all__ = ["Publish", "Publishing"]

Publish = Literal["leading_rank", "each_rank"]


class Publishing:
    """Every method is collective.

    Args:
        ranks: of the trainer.
        fleet: the engines.
        offer: what this rank offers.
        publish: who speaks with engines.
    """

    def __init__(
        self, ranks: TrainerRanks, fleet: Fleet, offer: TrainerOffer, publish: Publish
    ) -> None:
        self._ranks, self._fleet, self._mine = ranks, fleet, offer
        self._each_for_itself = publish == "each_rank"

    def outdate(self, places: Sequence[int]) -> None:
        """Note which ranks' memory has moved, by their places in the group."""
        for link in self._fleet.links.values():
            link.outdate(places)

    def offers(self, urls: Sequence[str]) -> list[Offer]:
        """Give engines the manifests that they have not got.

        Returns:
            On the leading rank what each rank has from them then.
        """
        links = [self._fleet.links[url] for url in urls if url in self._fleet.links]
        if self._each_for_itself:
            return self._ranks.agree("offering the weights", partial(self._own, links), Offer)
        return self._through_the_leading_rank(links)

    def _own(self, links: Sequence[EngineLink]) -> Offer:
        place = self._ranks.place
        failures = publish_to(
            links, {place: self._packed()}, whose=self._ranks.members[place : place + 1]
        )
        return _offer(links, place, failures)

    def _through_the_leading_rank(self, links: Sequence[EngineLink]) -> list[Offer]:
        places = range(self._ranks.count)
        failures: dict[str, EngineFailure] = {}

        def lacking() -> list[int]:
            return [place for place in places if any(link.lacks(place) for link in links)]

        wanted = self._ranks.lead("looking for what engines lack", lacking, list[int])
        if wanted:
            mine = self._ranks.place in wanted
            self._ranks.collect(
                "publishing the weights",
                lambda: self._packed() if mine else b"",
                partial(self._publish, links, failures),
                most=MAX_BATCH,
            )
            # Who was asked and gave nothing has nothing: a rank may hold no tensors.
            nothing = dict.fromkeys(wanted, b"")
            for link in links:
                if link.url not in failures:
                    link.publish(nothing)
        return [_offer(links, place, failures) for place in places] if links else []

    def _publish(
        self,
        links: Sequence[EngineLink],
        failures: dict[str, EngineFailure],
        packed: Mapping[int, Buffer],
    ) -> None:
        members = self._ranks.members
        able = [link for link in links if link.url not in failures]
        failures |= publish_to(able, packed, whose=[members[place] for place in packed])

    def _packed(self) -> bytes:
        source = self._mine.source
        return pack_manifest(source.manifest_bytes) if source.manifest.tensors.names else b""


def _offer(links: Sequence[EngineLink], place: int, failures: Mapping[str, EngineFailure]) -> Offer:
    ids = {link.url: link.source_id(place) for link in links if link.url not in failures}
    return Offer(
        source_ids={url: each for url, each in ids.items() if each is not None},
        failures=dict(failures),
    )
