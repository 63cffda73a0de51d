"""A bounded queue that is fair over owners: each gets its turn, however many items another has queued.

It knows nothing of calls or time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item", bound=Hashable)


class FairQueue(Generic[Owner, Item]):
    """Items in order of arrival per owner; owners take turns.

    Args:
        bound: items held over all owners.

    Attributes:
        bound: the same; it may be changed.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._lanes: OrderedDict[Owner, OrderedDict[Item, None]] = OrderedDict()
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        """Yield all items, owner by owner."""
        return (item for lane in self._lanes.values() for item in lane)

    @property
    def is_full(self) -> bool:
        """Whether another item would exceed the bound."""
        return self.count >= self.bound

    def push(self, owner: Owner, item: Item) -> None:
        """Append an item; the caller has checked `is_full`."""
        assert not self.is_full, self.count
        self._lane(owner)[item] = None
        self.count += 1

    def push_front(self, owner: Owner, item: Item) -> None:
        """Put an item back that was popped, ahead of all others; it may exceed the bound."""
        lane = self._lane(owner)
        lane[item] = None
        lane.move_to_end(item, last=False)
        self._lanes.move_to_end(owner, last=False)
        self.count += 1

    def pop(self) -> Item | None:
        """Remove and return the next item, or None."""
        if not self._lanes:
            return None
        owner, lane = next(iter(self._lanes.items()))
        item, _ = lane.popitem(last=False)
        self.count -= 1
        if lane:
            self._lanes.move_to_end(owner)
        else:
            del self._lanes[owner]
        return item

    def remove(self, owner: Owner, item: Item) -> None:
        """Remove an item that is queued."""
        lane = self._lanes[owner]
        del lane[item]
        self.count -= 1
        if not lane:
            del self._lanes[owner]

    def displaceable(self, owner: Owner) -> Item | None:
        """Return the item that a full queue gives up for one of `owner`, or None where that would not be fair.

        It is the newest of who has most queued, and at least as many as `owner` would have then. A queue that holds
        more than its bound gives nothing up: one item less would not make room.
        """
        longest: OrderedDict[Item, None] = max(self._lanes.values(), key=len, default=OrderedDict())
        if self.count > self.bound or len(longest) < len(self._lanes.get(owner, ())) + 2:
            return None
        return next(reversed(longest))

    def drain(self) -> list[Item]:
        """Remove and return everything, in the order `pop` would have."""
        items: list[Item] = []
        while (item := self.pop()) is not None:
            items.append(item)
        return items

    def _lane(self, owner: Owner) -> OrderedDict[Item, None]:
        lane = self._lanes.get(owner)
        if lane is None:
            lane = self._lanes[owner] = OrderedDict()
        return lane
