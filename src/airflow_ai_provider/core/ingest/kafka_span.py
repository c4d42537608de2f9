"""Rules about the offsets of a topic: pure, without a client.

Invariants: an offset that is gone, or was never there, is an error that names it; no rule moves a bound silently.
"""

from __future__ import annotations

from collections.abc import Mapping

from airflow_ai_provider.errors import SourceError

Bounds = dict[int, tuple[int, int]]
"""Topic partition → first offset and one past the last."""


def cap(bounds: Mapping[int, tuple[int, int]], row_limit: int) -> Bounds:
    """Cut bounds to so many offsets in all, evenly: no topic partition waits until the others are empty."""
    left, capped = row_limit, {}
    by_size = sorted(bounds.items(), key=lambda item: (item[1][1] - item[1][0], item[0]))
    for index, (partition, (first, end)) in enumerate(by_size):
        share = -(-left // (len(by_size) - index))
        taken = min(end - first, share, left)
        left -= taken
        if taken:
            capped[partition] = (first, first + taken)
    return capped


def demand_kept(
    topic: str, bootstrap: str, low: Mapping[int, int], first: Mapping[int, int], *, is_claimed: bool = False
) -> None:
    """Refuse a start below the first record that is still there.

    :param low: first offset that the broker keeps, per topic partition.
    :param first: first offset wanted.
    :param is_claimed: whether a run holds them already, and must give them up before another can take the rest.
    :raises SourceError: naming the missing offsets (``missing``); a retry does not help.
    """
    lost = {p: (at, low[p]) for p, at in first.items() if low[p] > at}
    if lost:
        named = ", ".join(f"{topic}/{p} offsets {at} to {to - 1}" for p, (at, to) in sorted(lost.items()))
        released = "release this run's claim ('airflow ai claims release') and " if is_claimed else ""
        raise SourceError(
            f"records that were not taken yet are deleted at {bootstrap}: {named}. Nothing was landed. Keep records "
            f"longer (retention.ms); to go on without them, {released}backfill the time that is still there.",
            missing=lost,
        )


def demand_reached(topic: str, bootstrap: str, high: Mapping[int, int], first: Mapping[int, int]) -> None:
    """Refuse a topic that ends before what was taken from it.

    :param high: one past the last offset written, per topic partition.
    :param first: first offset wanted.
    :raises SourceError: naming the topic partitions (``beyond``); a retry does not help.
    """
    beyond = {p: (at, high[p]) for p, at in first.items() if at > high[p]}
    if beyond:
        named = ", ".join(f"{topic}/{p}: taken to {at}, ends at {to}" for p, (at, to) in sorted(beyond.items()))
        raise SourceError(
            f"the topic at {bootstrap} ends before what was taken from it: {named}. It was cut, or restored from an "
            "older copy. Find out which records changed before going on.",
            beyond=beyond,
        )


def demand_same(topic: str, bootstrap: str, claimed: str, found: str) -> None:
    """Refuse a topic that was deleted and made anew since the rows were claimed.

    :raises SourceError: a retry does not help.
    """
    if found != claimed:
        raise SourceError(
            f"topic {topic} at {bootstrap} was deleted and made anew: its id was {claimed!r} when the rows were "
            f"claimed and is {found!r}. Those rows are gone. Release this run's claim, and the next run takes the new "
            "topic from its first record.",
            claimed=claimed,
            found=found,
        )
