"""Real data sets by name, as loaders of normalised batches.

The small sets (digits, Fashion-MNIST, CIFAR) are held in memory as uint8 and indexed by whole batches, so
that two CPU cores are enough to feed a training loop. Their mean and standard deviation are those of the
train split, measured when it is loaded; a folder of images is normalised with ImageNet's, as published with
torchvision's pretrained weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from tncompress.data_files import Split, cifar, digits, fashion_mnist, folders
from tncompress.factories import call_factory, split_factory
from tncompress.image_batches import Images, InFolder, InMemory, Shuffled, generator, loader_of

__all__ = ["NAMES", "DataSet", "load_data"]

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder:PATH", "FILE.py:FACTORY")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    train: Images = field(repr=False)
    test: Images = field(repr=False)

    def train_loader(
        self, batch_size: int = 128, *, seed: int = 0, augment: bool = True, num_workers: int = 0
    ) -> DataLoader:
        """Return the shuffled, augmented train split; the last batch may be smaller."""
        images = replace(self.train, seed=seed) if augment else self.train
        return loader_of(images, Shuffled(len(images), seed), batch_size, num_workers)

    def test_loader(self, batch_size: int = 512, *, num_workers: int = 0) -> DataLoader:
        """Return the whole test split in its own order."""
        return loader_of(self.test, range(len(self.test)), batch_size, num_workers)

    def calibration_loader(
        self, images: int = 1024, batch_size: int = 128, seed: int = 0, *, num_workers: int = 0
    ) -> DataLoader:
        """Return ``images`` of the train split (all, where it has fewer), not augmented, always the same."""
        if images < 1:
            raise ValueError(f"calibration needs at least 1 image, got images={images}")
        chosen = torch.randperm(len(self.train), generator=generator(seed, 2))[:images]
        few = self.train.take(chosen.tolist())
        return loader_of(few, range(len(few)), batch_size, num_workers)

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
    train, test = recipe.read(folders(data_dir))
    mean, std = _mean_std(train[0])
    images = InMemory(*train, mean, std, recipe.padding, recipe.flip)
    _, channels, height, width = images.pixels.shape
    held_out = replace(images, pixels=test[0], labels=test[1])
    return DataSet(name, recipe.num_classes, (channels, height, width), images, held_out)


def _mean_std(pixels: UInt8[Tensor, "n c h w"]) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share * (levels - mean[:, None]).square()).sum(1).sqrt().clamp_min(1.0)  # one grey level
    return mean.float()[:, None, None], std.float()[:, None, None]


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
    splits = (InFolder(files, plain, augmented) for files in (train, test))
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
    splits = (InFolder(files, _own_image, _own_image) for files in (train, test))
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
    "digits": _Recipe(10, 2, False, digits),
    "fashion-mnist": _Recipe(10, 2, True, fashion_mnist),
    "cifar10": _Recipe(10, 4, True, partial(cifar, "cifar10")),
    "cifar100": _Recipe(100, 4, True, partial(cifar, "cifar100")),
}
