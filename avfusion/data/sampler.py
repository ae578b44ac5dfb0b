"""Which clip comes when: a function of (seed, epoch), on any number of ranks, from any place of an epoch on."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def random_seed(*numbers: int) -> int:
    """64 bits that depend on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def order(count: int, seed: int, epoch: int, shards: list[int] | None = None, mix: int = 8) -> Tensor:
    """The permutation of `count` clips in an epoch.

    With the sizes of `shards`, whose clips follow each other, it stays local: the shards are shuffled, and then the
    clips within every `mix` of them. A reader over the network then needs few shards at a time.
    """
    generator = torch.Generator().manual_seed(random_seed(seed, epoch))
    if not shards:
        return torch.randperm(count, generator=generator)
    parts = torch.arange(count).split(shards)
    shuffled = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    groups = [torch.cat(shuffled[i : i + mix]) for i in range(0, len(shuffled), mix)]
    return torch.cat([group[torch.randperm(len(group), generator=generator)] for group in groups])


def balanced_order(classes: list[list[int]], count: int, seed: int, epoch: int) -> Tensor:
    """`count` draws with replacement: of a class, each as likely, and then of one of its clips."""
    generator = torch.Generator().manual_seed(random_seed(seed, epoch))
    sizes = torch.tensor([len(clips) for clips in classes])
    drawn = torch.randint(len(classes), (count,), generator=generator)
    within = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes[drawn]).long()
    return torch.tensor([clip for clips in classes for clip in clips])[(sizes.cumsum(0) - sizes)[drawn] + within]


class ClipSampler(Sampler):
    """Which clips a rank reads, as lists of (epoch, index), one a batch, from `consumed` clips of `epoch` on.

    Global batches are consecutive parts of the epoch's order, and rank r takes every `world_size`-th clip of them,
    beginning with the r-th. For training the order is shuffled and its last, incomplete global batch is left out, so
    that all ranks do the same number of steps: no clip comes twice in an epoch, and fewer than a global batch not at
    all. With `classes`, the clips of each, training draws by `balanced_order` instead, as many as there are clips. For
    evaluation the order is the table's and every clip comes exactly once, so ranks may differ by a clip.
    """

    def __init__(
        self, count: int, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
        shards: list[int] | None = None, classes: list[list[int]] | None = None,
    ):  # fmt: skip
        self.classes = classes
        self.count, self.batch_size, self.train, self.seed = count, batch_size, train, seed
        self.rank, self.world_size, self.shards = rank, world_size, shards
        self.epoch, self.consumed = 0, 0

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def rest(self, consumed: int) -> range:
        """Where the global batches of an epoch begin in its order, for a run that stands at `consumed`."""
        # A run that resumes with other ranks or another batch size goes on in its own batches from where it stands.
        left = self.count - consumed
        return range(consumed, consumed + (left - left % self.global_batch if self.train else left), self.global_batch)

    def __len__(self) -> int:
        return len(self.rest(0))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batches = self.epoch, self.rest(self.consumed)
        clips = torch.arange(self.count)
        if self.train and self.classes:
            clips = balanced_order(self.classes, self.count, self.seed, epoch)
        elif self.train:
            clips = order(self.count, self.seed, epoch, self.shards)
        for at in batches:
            mine = clips[at : at + self.global_batch][self.rank :: self.world_size]
            yield [(epoch, index) for index in mine.tolist()]
