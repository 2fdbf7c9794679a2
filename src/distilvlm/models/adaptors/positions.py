"""Behind which layers of a host others are inserted."""

from __future__ import annotations

from collections.abc import Sequence

PUBLISHED_DEPTH = 32
PUBLISHED = {"iaa-14": (0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31)}
"""The method's own lists, for a host of 32 layers (specification §1.4). That of its variant with 8 is not published."""


def resolve(wanted: int | str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Positions in a host of `depth` layers, from 0, ascending.

    Args:
        wanted: a number N: evenly spaced, the last layer among them, floor((k + 1) · depth / N) − 1 for k < N, which is
            ours (8 of 32: 3, 7, ..., 31); 'iaa-14': the published list; or the positions themselves.

    Raises:
        ValueError: more than there are layers, none, out of range or order, or a published list of another depth.
    """
    if isinstance(wanted, str):
        if wanted not in PUBLISHED:
            raise ValueError(f"no published positions are called '{wanted}': there is {', '.join(PUBLISHED)}")
        if depth != PUBLISHED_DEPTH:
            raise ValueError(
                f"'{wanted}' is for a host of {PUBLISHED_DEPTH} layers, this one has {depth}: give a number of layers, "
                "evenly spaced, or their positions"
            )
        return PUBLISHED[wanted]
    if isinstance(wanted, int):
        if not 1 <= wanted <= depth:
            raise ValueError(f"{wanted} layers cannot be inserted behind {depth}: give a number from 1 to {depth}")
        return tuple((k + 1) * depth // wanted - 1 for k in range(wanted))
    chosen = tuple(wanted)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(
            f"positions {list(chosen)} do not fit a host of {depth} layers: give numbers from 0 to {depth - 1}, each "
            "once, in ascending order"
        )
    return chosen
