"""Images by whole batches, in memory or in files, and loaders whose batches follow from seed and epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

Batch = tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Dataset, ABC):
    """Images that a loader takes by whole batches; augmented where ``seed`` is given.

    In ``__getitems__`` an index may be beyond the last: ``i + k * len(self)`` is image ``i`` in its ``k``-th
    random view, so that a batch is a function of the seed and its indices, whatever was read before.
    """

    seed: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch: ...

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Images:
        """Return some of the images, in the order of ``indices``."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


@dataclass(frozen=True, eq=False)
class InMemory(Images):
    """uint8 images in memory; augmenting shifts them by up to ``padding`` pixels and may flip them."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    mean: Float[Tensor, "c 1 1"]  # in the pixels' own unit, 0 to 255
    std: Float[Tensor, "c 1 1"]
    padding: int
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(list(indices)) % len(self)
        pixels = self.pixels[chosen]
        if self.seed is not None:
            pixels = self._augmented(pixels, generator(self.seed, 1, indices[0]))
        return pixels.float().sub_(self.mean).div_(self.std), self.labels[chosen]

    def _augmented(self, pixels: UInt8[Tensor, "b c h w"], generator: torch.Generator) -> Tensor:
        count, _, height, width = pixels.shape
        windows = F.pad(pixels, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        top, left = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        pixels = windows[torch.arange(count), :, top, left]
        if self.flip:
            flipped = torch.rand(count, generator=generator) < 0.5
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
        return pixels

    def take(self, indices: Sequence[int]) -> InMemory:
        """Return some of the images; pixels are copied."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


@dataclass(frozen=True, eq=False)
class InFolder(Images):
    """Images read when a batch wants them; ``files`` yields what the transforms take, and a label."""

    files: Any
    plain: Callable[[Any], Tensor]
    augmented: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        transform = self.plain if self.seed is None else self.augmented
        images, labels = [], []
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global state
            if self.seed is not None:
                torch.default_generator.manual_seed(_mixed(self.seed, 1, indices[0]))
            for index in indices:
                image, label = self.files[index % len(self)]
                images.append(transform(image))
                labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def take(self, indices: Sequence[int]) -> InFolder:
        """Return some of the images; no file is read."""
        return replace(self, files=Subset(self.files, indices))


class Shuffled(Sampler[int]):
    """Each ``iter`` is one more epoch, in an order of its own, with indices from ``epoch * count`` on."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, -1

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Have the next ``iter`` be epoch number ``epoch``, counted from 0."""
        self.epoch = epoch - 1

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = torch.randperm(self.count, generator=generator(self.seed, 0, self.epoch))
        return iter((order + self.epoch * self.count).tolist())


def loader_of(images: Images, order: Any, batch_size: int, num_workers: int) -> DataLoader:
    """Return a loader of batches in ``order``, which moves no global random state."""
    return DataLoader(
        images,
        batch_size,
        sampler=order,
        collate_fn=_as_it_is,  # __getitems__ has made the batch
        num_workers=num_workers,
        generator=torch.Generator(),  # without one, each epoch draws from the global state
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _mixed(*key: int) -> int:
    return int(np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1)[0])


def generator(*key: int) -> torch.Generator:
    """Return a random generator that all of ``key`` went into."""
    return torch.Generator().manual_seed(_mixed(*key))
