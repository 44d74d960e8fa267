"""Real data sets by name, as loaders of normalised batches.

The small sets (digits, Fashion-MNIST, CIFAR) are held in memory as uint8 and indexed by whole batches, so
that two CPU cores are enough to feed a training loop. Their mean and standard deviation are those of the
train split, measured when it is loaded; a folder of images is normalised with ImageNet's, as published with
torchvision's pretrained weights.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import shutil
import socket
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tncompress.factories import call_factory, split_factory

__all__ = ["NAMES", "DataSet", "load_data"]

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder:PATH", "FILE.py:FACTORY")
SYSTEM_FOLDER = Path("/usr/share/datasets")  # where Debian's dataset-* packages put theirs
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer

Batch = tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]
Split = tuple[UInt8[Tensor, "_ c h w"], Int64[Tensor, " _"]]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A train and a test split of labelled images, and the loaders over them.

    Every loader yields ``(x, y)``: normalised float32 images ``(N, C, H, W)`` and their int64 labels. Shuffle
    and augmentation follow from ``seed`` and the number of the epoch alone (each ``iter`` of a loader is one
    more epoch); torch's global random state is neither read nor moved.

    ``train`` and ``test`` are ordinary torch data sets of single images, read here by whole batches.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    train: "_Images" = field(repr=False)
    test: "_Images" = field(repr=False)

    def train_loader(
        self, batch_size: int = 128, *, seed: int = 0, augment: bool = True, num_workers: int = 0
    ) -> DataLoader:
        """Return the shuffled, augmented train split; the last batch may be smaller."""
        images = replace(self.train, seed=seed) if augment else self.train
        return _loader(images, _Shuffled(len(images), seed), batch_size, num_workers)

    def test_loader(self, batch_size: int = 512, *, num_workers: int = 0) -> DataLoader:
        """Return the whole test split in its own order."""
        return _loader(self.test, range(len(self.test)), batch_size, num_workers)

    def calibration_loader(
        self, images: int = 1024, batch_size: int = 128, seed: int = 0, *, num_workers: int = 0
    ) -> DataLoader:
        """Return ``images`` of the train split (all, where it has fewer), not augmented, always the same."""
        if images < 1:
            raise ValueError(f"calibration needs at least 1 image, got images={images}")
        chosen = torch.randperm(len(self.train), generator=_generator(seed, 2))[:images]
        few = self.train.take(chosen.tolist())
        return _loader(few, range(len(few)), batch_size, num_workers)

    def example_input(self, batch_size: int = 1) -> Float[Tensor, "n c h w"]:
        """Return the first ``batch_size`` test images (from the start again, where there are fewer)."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return self.test.__getitems__(range(batch_size))[0]


def load_data(name: str, *, data_dir: str | Path | None = None, image_size: int | None = None) -> DataSet:
    """Return the data set called ``name``, one of ``NAMES``.

    Files are looked for in ``data_dir``, ``$TNCOMPRESS_DATA``, ``/usr/share/datasets`` and the user's cache,
    and are downloaded into the cache where none of these has them; ``digits`` comes with scikit-learn.
    ``imagefolder:PATH`` reads ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*`` (or ``test``), resized and cut
    to squares of ``image_size`` (224) pixels. A function ``FACTORY`` of your own in ``FILE.py`` returns two
    torch data sets of ``(image, label)``, ``train, test`` (and the number of classes, ``train, test, 10``,
    where the first has no ``classes``); images are float32 ``(C, H, W)``, as your network takes them, and
    augmenting them is left to your data set. Raises ``ValueError`` for an unknown name, ``OSError`` for
    absent or damaged files, ``TypeError`` for a data set of another kind.

    >>> data = load_data("digits")
    >>> data
    DataSet(name='digits', num_classes=10, input_shape=(1, 32, 32))
    >>> x, y = next(iter(data.train_loader(batch_size=64)))
    >>> x.shape, y.shape
    (torch.Size([64, 1, 32, 32]), torch.Size([64]))
    """
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return _image_folder(name, Path(path).expanduser(), 224 if image_size is None else image_size)
    if image_size is None and (own := split_factory(name)):
        return _own(name, call_factory(*own, "data"))
    if name not in _IN_MEMORY:
        raise ValueError(f"unknown data set {name!r}: the names are {', '.join(NAMES)}")
    if image_size is not None:
        raise ValueError(f"image_size is for imagefolder:PATH, got image_size={image_size} with {name!r}")
    recipe = _IN_MEMORY[name]
    train, test = recipe.read(_places(data_dir))
    mean, std = _mean_std(train[0])
    images = _InMemory(*train, mean, std, recipe.padding, recipe.flip)
    _, channels, height, width = images.pixels.shape
    held_out = replace(images, pixels=test[0], labels=test[1])
    return DataSet(name, recipe.num_classes, (channels, height, width), images, held_out)


# --- batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _Images(Dataset, ABC):
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
    def take(self, indices: Sequence[int]) -> "_Images": ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


@dataclass(frozen=True, eq=False)
class _InMemory(_Images):
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
            pixels = self._augmented(pixels, _generator(self.seed, 1, indices[0]))
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

    def take(self, indices: Sequence[int]) -> "_InMemory":
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


@dataclass(frozen=True, eq=False)
class _InFolder(_Images):
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

    def take(self, indices: Sequence[int]) -> "_InFolder":
        return replace(self, files=Subset(self.files, indices))


class _Shuffled(Sampler[int]):
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
        order = torch.randperm(self.count, generator=_generator(self.seed, 0, self.epoch))
        return iter((order + self.epoch * self.count).tolist())


def _loader(images: _Images, order: Any, batch_size: int, num_workers: int) -> DataLoader:
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


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*key))


def _mean_std(pixels: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share * (levels - mean[:, None]).square()).sum(1).sqrt().clamp_min(1.0)  # one grey level
    return mean.float()[:, None, None], std.float()[:, None, None]


# --- the sets -----------------------------------------------------------------------------------------------


def _digits(places: list[Path]) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = torch.from_numpy(bundle.target).long()
    images = torch.from_numpy(bundle.images).float()[:, None] * (255 / 16)
    pixels = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    nth_of_class = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    test = nth_of_class % 4 == 0
    return (pixels[~test], labels[~test]), (pixels[test], labels[test])


def _fashion_mnist(places: list[Path]) -> tuple[Split, Split]:
    from torchvision.datasets import FashionMNIST

    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    for place in places:
        for folder in (place, place / "fashion-mnist", place / "FashionMNIST" / "raw"):
            if root := _fashion_root(folder.absolute(), names):
                return _read(FashionMNIST, root, folder)
    hint = "apt-get install dataset-fashion-mnist, or "
    cache = _download(FashionMNIST, "FashionMNIST", places, hint)
    return _read(FashionMNIST, cache, cache)


def _fashion_root(folder: Path, names: list[str]) -> Path | None:
    """Return the folder that torchvision can read ``folder``'s files from, unpacked where they must be."""
    plain = [folder / name for name in names]
    files = [file if file.is_file() else file.with_name(f"{file.name}.gz") for file in plain]
    if not all(file.is_file() for file in files):
        return None
    if files == plain and folder.parts[-2:] == ("FashionMNIST", "raw"):
        return folder.parents[1]

    def unpack(root: Path) -> None:
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, file in zip(names, files, strict=True):
            reader = gzip.open if file.suffix == ".gz" else open
            try:
                with reader(file, "rb") as source, (raw / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise OSError(f"{file} is damaged ({error}): put a whole copy in its place") from error

    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
    return _made_whole(_cache() / f"fashion-mnist-{digest}", unpack)


def _cifar(name: str, places: list[Path]) -> tuple[Split, Split]:
    import torchvision.datasets

    reader = getattr(torchvision.datasets, name.upper())
    for place in (place.absolute() for place in places):
        below = sorted(place.iterdir()) if place.is_dir() else []
        for root in (place.parent if place.name == reader.base_folder else place, *below):
            if (root / reader.base_folder).is_dir():
                return _read(reader, root, root)
    cache = _download(reader, reader.base_folder, places, "")
    return _read(reader, cache, cache)


def _image_folder(name: str, path: Path, size: int) -> DataSet:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if size < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    tests = [folder for folder in (path / "val", path / "test") if folder.is_dir()]
    if not ((path / "train").is_dir() and tests):
        raise FileNotFoundError(
            f"imagefolder: {path} must hold train/ and val/ (or test/) folders of classes"
        )
    train, test = ImageFolder(path / "train"), ImageFolder(tests[0])
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(
            f"imagefolder: {path / 'train'} and {tests[0]} differ in the class folders {odd[:4]}"
        )
    to_float = v2.ToDtype(torch.float32, scale=True)
    end = [v2.ToImage(), to_float, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    plain = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *end])
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end])
    splits = (_InFolder(files, plain, augmented) for files in (train, test))
    return DataSet(name, len(train.classes), (3, size, size), *splits)


def _own(name: str, made: Any) -> DataSet:
    """Return the data set of the user's own that a factory called ``name`` made."""
    parts = tuple(made) if isinstance(made, tuple | list) else (made,)
    sized = [hasattr(part, "__len__") and hasattr(part, "__getitem__") for part in parts[:2]]
    if len(parts) not in (2, 3) or not all(sized):
        came = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{name} must return two torch data sets with a length, train and test, got {came}")
    train, test = parts[:2]
    if not (len(train) and len(test)):
        raise ValueError(
            f"{name} returned an empty data set: train has {len(train)} images, test {len(test)}"
        )
    classes = parts[2] if len(parts) == 3 else len(getattr(train, "classes", ()))
    if not isinstance(classes, int) or classes < 1:
        raise TypeError(f"{name} does not say how many classes there are: return train, test, 10")
    item = train[0]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TypeError(f"{name} must return data sets of (image, label), got a {type(item).__name__}")
    channels, height, width = _own_image(item[0]).shape
    splits = (_InFolder(files, _own_image, _own_image) for files in (train, test))
    return DataSet(name, classes, (channels, height, width), *splits)


def _own_image(image: Any) -> Float[Tensor, "c h w"]:
    if isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point():
        return image
    came = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise TypeError(f"wanted images as float tensors (C, H, W), as the network takes them, got {came}")


class _Recipe(NamedTuple):
    num_classes: int
    padding: int
    flip: bool
    read: Callable[[list[Path]], tuple[Split, Split]]


_IN_MEMORY = {
    "digits": _Recipe(10, 2, False, _digits),
    "fashion-mnist": _Recipe(10, 2, True, _fashion_mnist),
    "cifar10": _Recipe(10, 4, True, partial(_cifar, "cifar10")),
    "cifar100": _Recipe(100, 4, True, partial(_cifar, "cifar100")),
}


# --- files --------------------------------------------------------------------------------------------------


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tncompress"


def _places(data_dir: str | Path | None) -> list[Path]:
    named = (data_dir, os.environ.get("TNCOMPRESS_DATA"), SYSTEM_FOLDER, _cache())
    return [Path(place).expanduser() for place in named if place]


def _read(reader: Any, root: Path, source: Path) -> tuple[Split, Split]:
    """Return both splits of torchvision's class ``reader`` from ``root``, which was made of ``source``."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            sets = [reader(root, train=train) for train in (True, False)]
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        reason = _first_line(error).partition(". ")[0]  # without torchvision's own advice
        raise OSError(
            f"the {reader.__name__} files in {source} are damaged or of another kind ({reason}): "
            "put whole copies in their place, or remove them"
        ) from error
    train, test = (_as_split(each) for each in sets)
    return train, test


def _as_split(images: Any) -> Split:
    pixels = torch.as_tensor(images.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(images.targets, dtype=torch.int64)


def _download(reader: Any, folder: str, places: list[Path], hint: str) -> Path:
    """Return the user's cache after torchvision has put ``folder`` there."""

    def fetch(made: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            reader(made.parent, download=True)

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return _made_whole(_cache() / folder, fetch).parent
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"no {reader.__name__} files in {', '.join(map(str, places))}, and their download failed "
            f"({_first_line(error)}): {hint}name their folder with --data-dir or TNCOMPRESS_DATA"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _made_whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return ``folder``; where absent, ``fill`` makes it beside its place and it is renamed when complete."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as place:
        made = Path(place) / folder.name
        fill(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first: its copy is as good
                raise
    return folder


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
