"""Which images make up a step: a pure function of (seed, step).

Shares are met by counting, not by drawing. A cycle of slots holds each choice as often as its weight says, spread evenly;
a position's slot says which choice it has, and how many earlier positions had the same. So the n-th image of a source
is known without walking there, and it is the n-th of seeded permutations, one an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from liftkit.data.source import Size

SLOTS = 10_000
# Purposes of random streams: SeedSequence((seed, purpose, ...)).
PERMUTATION, DROPOUT, MIRROR = 101, 102, 103


def stream(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """The random stream of a purpose at a place."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, *place))))


@lru_cache(maxsize=16)
def chances(seed: int, purpose: int, step: int, count: int) -> tuple[float, ...]:
    """Uniform numbers in [0, 1) for the rows of a step; all rows ask, and they are drawn once."""
    return tuple(stream(seed, purpose, step).random(count).tolist())


class Mixture:
    """Choices in proportion to weights.

    Args:
        weights: positive, one per choice.
        slots: of a cycle, about; shares are exact to one slot, and each choice has at least one.
    """

    def __init__(self, weights: Sequence[float], slots: int = SLOTS) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * (slots if len(weights) > 1 else 1)
        counts = np.floor(shares).astype(int)
        rest = round(shares.sum()) - counts.sum()
        counts[np.argsort(counts - shares, kind="stable")[:rest]] += 1
        self.counts = np.maximum(counts, 1)
        ranks = [np.arange(count) for count in self.counts]
        places = np.concatenate([(rank + 0.5) / count for rank, count in zip(ranks, self.counts)])
        order = np.argsort(places, kind="stable")
        self.choices = np.repeat(np.arange(len(self.counts)), self.counts)[order]
        self.ranks = np.concatenate(ranks)[order]

    def at(self, position: int) -> tuple[int, int]:
        """The choice of a position, and how many earlier positions have the same."""
        cycle, slot = divmod(position, len(self.choices))
        choice = int(self.choices[slot])
        return choice, int(cycle * self.counts[choice] + self.ranks[slot])


class Order:
    """Steps of one kind of image each, of sources mixed by weight.

    Args:
        groups: image indices by kind and source number; a kind begins with height and width, see :attr:`Picture.group`.
        weights: of the sources.
        batch_size: images a step.
        seed: of the permutations.
    """

    def __init__(
        self,
        groups: Mapping[tuple[int, ...], Mapping[int, Sequence[int]]],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
    ) -> None:
        totals = [sum(len(group.get(source, ())) for group in groups.values()) for source in range(len(weights))]
        self.groups = {size: {source: list(found) for source, found in group.items()} for size, group in groups.items()}
        self.sizes = sorted(self.groups)
        # A source's weight falls to its sizes by their shares of its images.
        shares = {
            size: {source: weights[source] * len(found) / totals[source] for source, found in sorted(group.items())}
            for size, group in self.groups.items()
        }
        self.batch_size, self.seed = batch_size, seed
        self._steps = Mixture([sum(shares[size].values()) for size in self.sizes])
        self._rows = {size: (list(share), Mixture(list(share.values()))) for size, share in shares.items()}
        self._permutation = lru_cache(maxsize=8 + 2 * sum(map(len, groups.values())))(self._permute)

    def size(self, step: int) -> Size:
        """Height and width of a step's images."""
        height, width, *_ = self.sizes[self._steps.at(step)[0]]
        return height, width

    def row(self, step: int, row: int) -> tuple[int, int]:
        """Source number and image index of one row of a step."""
        choice, earlier = self._steps.at(step)
        size = self.sizes[choice]
        sources, mixture = self._rows[size]
        chosen, count = mixture.at(earlier * self.batch_size + row)
        source = sources[chosen]
        group = self.groups[size][source]
        epoch, place = divmod(count, len(group))
        return source, group[self._permutation(size, source, epoch)[place]]

    def after(self, size: tuple[int, ...], source: int, index: int) -> list[int]:
        """The other images of the same kind and source, beginning behind one."""
        group = self.groups[size][source]
        place = group.index(index)
        return group[place + 1 :] + group[:place]

    def _permute(self, size: tuple[int, ...], source: int, epoch: int) -> NDArray[np.int64]:
        group = self.groups[size][source]
        return stream(self.seed, PERMUTATION, source, *size, epoch).permutation(len(group))
