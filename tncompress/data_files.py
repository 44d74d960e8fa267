"""The files of data sets by name: where they are looked for, how they are read, unpacked and downloaded."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor

from tncompress.storage import cache_folder

SYSTEM_FOLDER = Path("/usr/share/datasets")  # where Debian's dataset-* packages put theirs
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer

Split = tuple[UInt8[Tensor, "_ c h w"], Int64[Tensor, " _"]]


def digits(places: list[Path]) -> tuple[Split, Split]:
    """Return scikit-learn's digits at 32x32; every fourth of a class is for testing."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = torch.from_numpy(bundle.target).long()
    images = torch.from_numpy(bundle.images).float()[:, None] * (255 / 16)
    pixels = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    nth_of_class = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    test = nth_of_class % 4 == 0
    return (pixels[~test], labels[~test]), (pixels[test], labels[test])


def fashion_mnist(places: list[Path]) -> tuple[Split, Split]:
    """Return Fashion-MNIST from the first of ``places`` that has it, packed or not, else downloaded."""
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
    return _made_whole(cache_folder() / f"fashion-mnist-{digest}", unpack)


def cifar(name: str, places: list[Path]) -> tuple[Split, Split]:
    """Return ``cifar10`` or ``cifar100`` from the first of ``places`` that has it, else downloaded."""
    import torchvision.datasets

    reader = getattr(torchvision.datasets, name.upper())
    for place in (place.absolute() for place in places):
        below = sorted(place.iterdir()) if place.is_dir() else []
        for root in (place.parent if place.name == reader.base_folder else place, *below):
            if (root / reader.base_folder).is_dir():
                return _read(reader, root, root)
    cache = _download(reader, reader.base_folder, places, "")
    return _read(reader, cache, cache)


def folders(data_dir: str | Path | None) -> list[Path]:
    """Return where the files of data sets are looked for, in this order."""
    named = (data_dir, os.environ.get("TNCOMPRESS_DATA"), SYSTEM_FOLDER, cache_folder())
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
        return _made_whole(cache_folder() / folder, fetch).parent
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
