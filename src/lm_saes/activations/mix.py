"""Several sources, mixed by tokens.

Next comes the source that is furthest behind: the one with the least (tokens given so far) / weight. After any number of items each
source's tokens are within one item of its share, whatever the length of its rows; nothing is drawn at random. A source that ends is said,
and the others share what it leaves in proportion to their weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from lm_saes.activations.stream import State, Stream, nested, part
from lm_saes.activations.tokens import Tokens

log = logging.getLogger("lm_saes")


class Source(NamedTuple):
    """A stream of rows with the name and the weight that belong to it."""

    name: str
    weight: float
    rows: Stream[Tokens]


class SourceTokens(NamedTuple):
    """Rows, and the position of their source in the configuration."""

    source: int
    tokens: Tokens


class Mix:
    """A stream over the rows of several sources; `ended` says which of them are used up."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.ended = [False] * len(self.sources)
        self._given = [0] * len(self.sources)  # tokens

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> SourceTokens:
        while live := [index for index, ended in enumerate(self.ended) if not ended]:
            index = min(live, key=lambda index: (self._given[index] / self.sources[index].weight, index))
            tokens = next(self.sources[index].rows, None)
            if tokens is not None:
                self._given[index] += int(tokens.attention_mask.sum())
                return SourceTokens(index, tokens)
            self.ended[index] = True
            remaining = [self.sources[other].name for other in live if other != index]
            goes_on = f"going on with {', '.join(remaining)}" if remaining else "the stream ends"
            log.info("dataset '%s' ended after %s tokens; %s", self.sources[index].name, f"{self._given[index]:,}", goes_on)
        raise StopIteration

    def state_dict(self) -> State:
        state: State = {"given": list(self._given), "ended": list(self.ended)}
        for index, source in enumerate(self.sources):
            state |= nested(f"sources.{index}", source.rows.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._given, self.ended = list(state["given"]), list(state["ended"])
        for index, source in enumerate(self.sources):
            source.rows.load_state_dict(part(f"sources.{index}", state))
