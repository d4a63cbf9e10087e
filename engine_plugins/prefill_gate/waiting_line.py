"""Who waits for memory, and since when: first in, first out, with room for the small to pass."""

from __future__ import annotations

__all__ = ["WaitingLine"]

PATIENCE_S = 2.0
"""How long others may pass one who waits, if there is memory for them and not for it."""
FORGOTTEN_S = 10.0
"""After which one who was not asked for again is taken to have gone."""


class _Place:
    def __init__(self, now: float) -> None:
        self.since = self.asked = now


class WaitingLine:
    """Deferred requests in the order in which they came.

    Times are seconds of any clock that does not go back; where several ranks decide, all are given
    the same.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def waited(self, request_id: str, now: float) -> float:
        """Seconds since the request was first deferred; 0 if it was not."""
        place = self._places.get(request_id)
        if place is None:
            return 0.0
        place.asked = now
        return now - place.since

    def longest(self, now: float) -> float:
        """Seconds that the first in line has waited; 0 for an empty line."""
        first = self._first(now)
        return 0.0 if first is None else now - self._places[first].since

    def may_pass(self, request_id: str, now: float) -> bool:
        """Whether a request may go before those who are ahead of it."""
        if not self._places:
            return True
        first = self._first(now)
        if first is None or first == request_id:
            return True
        return now - self._places[first].since < PATIENCE_S

    def defer(self, request_id: str, now: float) -> None:
        """Put a request at the end of the line, or leave it where it stands."""
        if request_id not in self._places:
            self._places[request_id] = _Place(now)

    def leave(self, request_id: str) -> None:
        """Take a request out, because it runs, is refused or was given up."""
        self._places.pop(request_id, None)

    def clear(self) -> None:
        """Forget everybody."""
        self._places.clear()

    def _first(self, now: float) -> str | None:
        while self._places:
            request_id, place = next(iter(self._places.items()))
            if now - place.asked <= FORGOTTEN_S:
                return request_id
            del self._places[request_id]
        return None
