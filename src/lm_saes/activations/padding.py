"""Which rows of different lengths go through the language model together, so that next to no padding is computed.

Rows that run together are computed up to the longest of them. Starting a forward costs time as well, as much as some positions; so rows
are put together where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

POSITIONS_PER_FORWARD = {"cpu": 64}
"""How many positions could be computed in the time that a forward takes to start (benchmarks/README.md, Around the step)."""
POSITIONS_PER_FORWARD_ELSEWHERE = 4096
"""The same for devices that are told each operation by the CPU: not measured, the order of 5 ms at a million positions a second."""


def forward_cost(device: torch.device) -> int:
    """The cost of starting a forward, in positions."""
    return POSITIONS_PER_FORWARD.get(device.type, POSITIONS_PER_FORWARD_ELSEWHERE)


def groups_by_length(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Rows (their places in `lengths`) in groups, the longest first, with the least total of (rows * longest row + cost) over the groups.

    Rows without a token are in no group.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    least, begins = [0.0], [0]  # for the first n rows in that order: the least total, and where the last group of it begins
    for end in range(1, len(order) + 1):
        starts = (start for start in range(end) if start == 0 or lengths[order[start]] != lengths[order[start - 1]])  # equal rows stay together
        total, begin = min((least[start] + (end - start) * lengths[order[start]] + cost, start) for start in starts)
        least.append(total)
        begins.append(begin)
    groups, end = list[list[int]](), len(order)
    while end:
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1]
