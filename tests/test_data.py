import gzip
import hashlib
import pickle
import shutil
from dataclasses import replace
from itertools import chain, islice, product
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image
from torch.testing import assert_close

from tncompress import data_files
from tncompress.data import load_data

FASHION_COUNTS = {"train": 40, "t10k": 12}
CIFAR_LAYOUTS = {
    "cifar10": ("labels", "label_names", {f"data_batch_{i}": 10 for i in range(1, 6)} | {"test_batch": 12}),
    "cifar100": ("fine_labels", "fine_label_names", {"train": 50, "test": 12}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and wait for them where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """No data anywhere: an empty system folder, an empty cache, and a network that is down."""

    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(data_files, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TNCOMPRESS_DATA", raising=False)
    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def write_fashion(folder, packed=True, seed=0):
    """Random pictures in Fashion-MNIST's own files, and the pixels that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, pixels = np.random.default_rng(seed), {}
    for split, count in FASHION_COUNTS.items():
        pixels[split] = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        contents = {"images-idx3": pixels[split], "labels-idx1": np.arange(count, dtype=np.uint8) % 10}
        for kind, array in contents.items():
            header = (2048 + array.ndim).to_bytes(4, "big") + b"".join(
                n.to_bytes(4, "big") for n in array.shape
            )
            name = f"{split}-{kind}-ubyte"
            with gzip.open(folder / f"{name}.gz", "wb") if packed else (folder / name).open("wb") as file:
                file.write(header + array.tobytes())
    return pixels


def write_cifar(name, root, monkeypatch):
    """Random pictures in CIFAR's own files, whose md5 sums torchvision is told."""
    reader = getattr(torchvision.datasets, name.upper())
    labels_key, names_key, counts = CIFAR_LAYOUTS[name]
    folder, rng, sums = root / reader.base_folder, np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    contents = {reader.meta["filename"]: {names_key: [f"class {i}" for i in range(10)]}}
    for file, count in counts.items():
        pixels = rng.integers(256, size=(count, 3072), dtype=np.uint8)
        contents[file] = {"data": pixels, labels_key: [i % 10 for i in range(count)]}
    for file, content in contents.items():
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        sums[file] = hashlib.md5(raw).hexdigest()
    for lists in ("train_list", "test_list"):
        monkeypatch.setattr(reader, lists, [[file, sums[file]] for file, _ in getattr(reader, lists)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
    return contents


def write_images(root, splits=("train", "val"), classes=("cat", "dog"), count=3):
    rng = np.random.default_rng(0)
    for split in splits:
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / split / label / f"{i}.png")


@pytest.fixture(params=["digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder"])
def dataset(request, tmp_path, monkeypatch):
    name, root = request.param, tmp_path / "given"
    if name == "fashion-mnist":
        write_fashion(root)
    elif name.startswith("cifar"):
        write_cifar(name, root, monkeypatch)
    elif name == "imagefolder":
        write_images(root)
        return load_data(f"imagefolder:{root}", image_size=14)
    return load_data(name, data_dir=root)


def some(dataset):
    """A batch size that gives a few batches, the last of them smaller."""
    return len(dataset.train) // 3


def epoch(loader):
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


# --- laws of every data set ---------------------------------------------------------------------------------


def test_loaders_yield_normalised_batches_of_the_stated_shape(dataset):
    for split, loader in (
        (dataset.train, dataset.train_loader(some(dataset))),
        (dataset.test, dataset.test_loader(5)),
        (dataset.train, dataset.calibration_loader(10**6, some(dataset))),
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert len(loader.dataset) == len(split) == sum(len(y) for _, y in batches)
        for x, y in batches:
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
            assert x.shape == (len(y), *dataset.input_shape)
            assert x.is_contiguous()
            assert 0 <= y.min() <= y.max() < dataset.num_classes
    assert isinstance(batches[0], tuple)


def test_train_split_has_mean_zero_and_deviation_one(dataset):
    if dataset.name.startswith("imagefolder"):
        pytest.skip("normalised with ImageNet's constants")
    x, _ = epoch(dataset.train_loader(augment=False))
    assert_close(x.mean((0, 2, 3)), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
    assert_close(x.std((0, 2, 3)), torch.ones(x.shape[1]), atol=1e-3, rtol=0)


def test_each_epoch_holds_every_image_once_and_in_another_order(dataset):
    loader = dataset.train_loader(some(dataset), augment=False)
    whole, labels = dataset.train.__getitems__(range(len(dataset.train)))
    orders = []
    for _ in range(2):
        x, y = epoch(loader)
        order = torch.cdist(x.flatten(1), whole.flatten(1)).argmin(1)
        assert_close(x, whole[order])
        assert_close(y, labels[order])
        assert len(set(order.tolist())) >= len(whole) - 1  # the digits hold two equal images
        orders.append(order)
    assert not torch.equal(*orders)


def test_epochs_follow_from_the_seed_alone(dataset):
    torch.manual_seed(1)
    loader = dataset.train_loader(some(dataset), seed=3)
    epochs = [epoch(loader)[0] for _ in range(2)]
    torch.manual_seed(2)
    again = dataset.train_loader(some(dataset), seed=3)
    next(iter(again))  # an epoch that stops early
    assert_close(epoch(again)[0], epochs[1], rtol=0, atol=0)
    assert not torch.equal(*epochs)
    assert not torch.equal(epoch(dataset.train_loader(some(dataset), seed=4))[0], epochs[0])


def test_loaders_leave_the_global_random_state(dataset):
    before = torch.get_rng_state()
    for loader in (dataset.train_loader(some(dataset)), dataset.test_loader(), dataset.calibration_loader(5)):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_test_split_is_in_its_own_order(dataset):
    x, y = epoch(dataset.test_loader(5))
    one, label = dataset.test[1]
    assert torch.equal(one, x[1])
    assert label == y[1]
    whole, labels = dataset.test.__getitems__(range(len(dataset.test)))
    assert_close(x, whole, rtol=0, atol=0)
    assert_close(y, labels)
    assert_close(dataset.example_input(3), whole[:3])
    assert_close(dataset.example_input(len(whole) + 1), torch.cat([whole, whole[:1]]))


def test_calibration_takes_plain_train_images_always_the_same(dataset):
    loader = dataset.calibration_loader(5, 2, seed=1)
    x, y = epoch(loader)
    whole, labels = dataset.train.__getitems__(range(len(dataset.train)))
    nearest = torch.cdist(x.flatten(1), whole.flatten(1)).argmin(1)
    assert len(loader) == 3
    assert len(loader.dataset) == 5
    assert_close(x, whole[nearest])
    assert_close(y, labels[nearest])
    assert_close(epoch(loader)[0], x)
    assert not torch.equal(epoch(dataset.calibration_loader(5, 2, seed=2))[0], x)


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "padding", "flips"), [("digits", 2, 1), ("fashion-mnist", 2, 2), ("cifar10", 4, 2)]
)
def test_augmented_images_are_shifted_and_flipped_as_the_slow_way_does(
    name, padding, flips, tmp_path, monkeypatch
):
    if name == "cifar10":
        write_cifar(name, tmp_path, monkeypatch)
    elif name == "fashion-mnist":
        write_fashion(tmp_path)
    data = load_data(name, data_dir=tmp_path)
    data = replace(data, train=data.train.take(range(40)))
    loader, seen = data.train_loader(20), []
    for x, y in chain(*(islice(loader, 2) for _ in range(4))):
        for image, label in zip(x * data.train.std + data.train.mean, y, strict=True):
            mine = data.train.pixels[data.train.labels == label].float()
            views = {
                (top, left, flip): F.pad(side, (padding,) * 4)[:, :, top:, left:][
                    ..., : x.shape[2], : x.shape[3]
                ]
                for flip, side in enumerate([mine, mine.flip(3)][:flips])
                for top, left in product(range(2 * padding + 1), repeat=2)
            }
            found = [key for key, view in views.items() if (view - image).abs().amax((1, 2, 3)).min() < 1e-2]
            assert found
            seen += found
    assert {flip for *_, flip in seen} == set(range(flips))
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(2 * padding + 1))


def test_worker_processes_give_the_same_batches(digits):
    expected = epoch(digits.train_loader(500, seed=5))
    assert_close(epoch(digits.train_loader(500, seed=5, num_workers=2)), expected, rtol=0, atol=0)


def test_accelerate_prepares_the_loader_unchanged(digits):
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(digits.train_loader(500, seed=5))
    assert len(loader) == 3
    assert_close(epoch(loader), epoch(digits.train_loader(500, seed=5)), rtol=0, atol=0)


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_are_split_three_to_one_in_every_class(digits):
    train, test = (torch.bincount(split.labels) for split in (digits.train, digits.test))
    assert (train.sum() + test.sum()).item() == 1797
    assert torch.equal(test, (train + test) // 4)
    rows = {split.numpy().tobytes() for split in digits.train.pixels}
    assert sum(image.numpy().tobytes() in rows for image in digits.test.pixels) <= 1


def test_digits_keep_their_brightness(digits):
    assert digits.train.pixels.max() == 255
    small = F.avg_pool2d(digits.train.pixels.float(), 4).mean()
    from sklearn.datasets import load_digits

    assert_close(small.item(), load_digits().images.mean() * 255 / 16, rtol=0.02, atol=0)


# --- Fashion-MNIST ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_in_each_layout(packed, below, places):
    pixels = write_fashion(places / "given" / below, packed)
    data = load_data("fashion-mnist", data_dir=places / "given")
    assert torch.equal(data.train.pixels[:, 0], torch.from_numpy(pixels["train"]))
    assert torch.equal(data.test.pixels[:, 0], torch.from_numpy(pixels["t10k"]))
    assert data.test.labels.tolist() == [i % 10 for i in range(12)]


def test_places_are_tried_in_order(places, monkeypatch):
    monkeypatch.setenv("TNCOMPRESS_DATA", str(places / "env"))
    folders = ["cache/tncompress", "system", "env", "given"]  # each hides those before it
    for seed, folder in enumerate(folders):
        pixels = write_fashion(places / folder / "FashionMNIST" / "raw", packed=False, seed=seed)
        data = load_data("fashion-mnist", data_dir=places / "given")
        assert torch.equal(data.train.pixels[:, 0], torch.from_numpy(pixels["train"]))


def test_changed_files_are_unpacked_anew(places):
    write_fashion(places / "given", seed=0)
    load_data("fashion-mnist", data_dir=places / "given")
    pixels = write_fashion(places / "given", seed=1)
    data = load_data("fashion-mnist", data_dir=places / "given")
    assert torch.equal(data.train.pixels[:, 0], torch.from_numpy(pixels["train"]))


def test_a_damaged_archive_leaves_nothing_half_done(places):
    write_fashion(places / "given")
    archive = places / "given" / "train-images-idx3-ubyte.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        OSError, match=r"^.*train-images-idx3-ubyte.gz is damaged \(.*\): put a whole copy.*$"
    ):
        load_data("fashion-mnist", data_dir=places / "given")
    assert list((places / "cache" / "tncompress").iterdir()) == []
    archive.write_bytes(whole)
    assert len(load_data("fashion-mnist", data_dir=places / "given").train) == 40


@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_the_folder_of_a_truncated_file_is_named(below, places):
    write_fashion(places / "given" / below, packed=False)
    file = places / "given" / below / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"^the FashionMNIST files in .*given.* are damaged .* whole copies.*$"):
        load_data("fashion-mnist", data_dir=places / "given")


def test_absent_fashion_mnist_says_where_it_looked_and_what_to_do(places):
    with pytest.raises(FileNotFoundError) as caught:
        load_data("fashion-mnist", data_dir=places / "given")
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        *map(str, (places / "given", places / "system", places / "cache" / "tncompress")),
        "apt-get install dataset-fashion-mnist",
        "--data-dir",
        "TNCOMPRESS_DATA",
    ):
        assert words in message
    assert list((places / "cache" / "tncompress").iterdir()) == []


def test_a_download_lands_whole_in_the_cache_and_stdout_stays_clean(places, monkeypatch, capsys):
    source = places / "source"
    write_fashion(source, packed=False)

    def fetch(url, download_root, filename, md5):
        print(f"Downloading {url}")
        name = filename.removesuffix(".gz")
        shutil.copy(source / name, download_root)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    assert len(load_data("fashion-mnist").train) == 40
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "cache"))
    monkeypatch.setattr(data_files, "SYSTEM_FOLDER", places / "system")
    assert len(load_data("fashion-mnist").train) == 40  # from the cache: the download works no more
    assert [path.name for path in (places / "cache" / "tncompress").iterdir()] == ["FashionMNIST"]


def test_of_two_processes_the_first_wins(places):
    folder = places / "cache" / "made"

    def fill(made):
        for place, word in ((folder, "theirs"), (made, "mine")):
            place.mkdir(parents=True)
            (place / "file").write_text(word)

    assert data_files._made_whole(folder, fill) == folder
    assert (folder / "file").read_text() == "theirs"
    assert [path.name for path in folder.parent.iterdir()] == ["made"]


def test_real_fashion_mnist(monkeypatch):
    monkeypatch.undo()
    try:
        monkeypatch.setattr(data_files, "_download", lambda *args: pytest.skip("no Fashion-MNIST files here"))
        data = load_data("fashion-mnist")
    finally:
        monkeypatch.undo()
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert_close(
        (data.train.mean.item() / 255, data.train.std.item() / 255), (0.2860, 0.3530), atol=1e-4, rtol=0
    )
    assert data.input_shape == (1, 28, 28)


# --- CIFAR --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("given", ["base", "base/below/..", "base/inside"])
def test_cifar_is_found_there_and_one_folder_below(name, given, places, monkeypatch):
    contents = write_cifar(name, places / "base" / "inside", monkeypatch)
    (places / "base" / "below").mkdir()
    data = load_data(name, data_dir=places / given)
    last = list(contents.values())[-1]["data"]
    assert data.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert torch.equal(data.test.pixels, torch.from_numpy(last).view(-1, 3, 32, 32))


def test_cifar_folder_itself_may_be_given(places, monkeypatch):
    write_cifar("cifar10", places / "base", monkeypatch)
    assert len(load_data("cifar10", data_dir=places / "base" / "cifar-10-batches-py").train) == 50


def test_damaged_cifar_is_refused_in_one_line(places, monkeypatch):
    write_cifar("cifar10", places, monkeypatch)
    (places / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    with pytest.raises(OSError, match=r"^the CIFAR10 files in .* are damaged .* corrupted\): put whole .*$"):
        load_data("cifar10", data_dir=places)


def test_absent_cifar_says_what_to_do(places):
    with pytest.raises(FileNotFoundError, match=r"^no CIFAR100 files in .*no route to host.*--data-dir.*$"):
        load_data("cifar100")


# --- folders of images --------------------------------------------------------------------------------------


def test_imagefolder_reads_val_or_test(places):
    write_images(places / "a", ("train", "test"))
    data = load_data(f"imagefolder:{places / 'a'}")
    assert data.input_shape == (3, 224, 224)
    assert (data.num_classes, len(data.train), len(data.test)) == (2, 6, 6)
    assert [label.item() for _, label in data.test] == [0, 0, 0, 1, 1, 1]


def test_imagefolder_pixels_are_imagenet_normalised(places):
    for split in ("train", "val"):
        (places / split / "grey").mkdir(parents=True)
        Image.new("RGB", (16, 16), (51, 102, 204)).save(places / split / "grey" / "1.png")
    data = load_data(f"imagefolder:{places}", image_size=8)
    expected = (torch.tensor([0.2, 0.4, 0.8]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert_close(data.example_input(), expected.view(1, 3, 1, 1).expand(1, 3, 8, 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("splits", [("train",), ("val",), ("train", "eval")])
def test_imagefolder_without_both_splits_is_refused(splits, places):
    write_images(places, splits)
    with pytest.raises(FileNotFoundError, match=r"must hold train/ and val/ \(or test/\)"):
        load_data(f"imagefolder:{places}")


def test_imagefolder_with_other_classes_in_val_is_refused(places):
    write_images(places, ("train",))
    write_images(places, ("val",), ("cat", "cow"))
    with pytest.raises(ValueError, match=r"differ in the class folders \['cow', 'dog'\]"):
        load_data(f"imagefolder:{places}")


# --- of one's own -------------------------------------------------------------------------------------------

OWN = """
import torch
from torch.utils.data import TensorDataset

def images(count, size=6):
    return TensorDataset(torch.randn(count, 2, size, size), torch.arange(count) % 3)

def splits():
    torch.manual_seed(0)
    return images(10), images(4), 3

def classes():
    train, test = images(10), images(4)
    train.classes = ["a", "b", "c"]
    return train, test

def uncounted(): return images(10), images(4)
def one(): return images(10)
def empty(): return images(10), images(0), 3
def unlabelled(): return [torch.randn(2, 6, 6)], images(4), 3
def bytes_(): return [(torch.zeros(2, 6, 6, dtype=torch.uint8), 0)], images(4), 3
def pictures(): return [("photo.jpg", 0)], images(4), 3
"""


@pytest.fixture
def own_file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_data_set_of_ones_own_is_read_by_batches(own_file):
    data = load_data(f"{own_file}:splits")
    assert (data.num_classes, data.input_shape, len(data.train), len(data.test)) == (3, (2, 6, 6), 10, 4)
    x, y = next(iter(data.test_loader()))
    assert_close(x, torch.stack([image for image, _ in data.test]))
    assert (x.shape, y.tolist()) == ((4, 2, 6, 6), [0, 1, 2, 0])
    seen = torch.cat([y for _, y in data.train_loader(4)])
    assert seen.bincount().tolist() == [4, 3, 3]
    assert load_data(f"{own_file}:classes").num_classes == 3


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("uncounted", "does not say how many classes there are: return train, test, 10"),
        ("one", "must return two torch data sets with a length, train and test, got TensorDataset"),
        ("empty", "returned an empty data set: train has 10 images, test 0"),
        ("unlabelled", r"must return data sets of \(image, label\), got a Tensor"),
        ("bytes_", r"wanted images as float tensors \(C, H, W\).* got torch.uint8 \(2, 6, 6\)"),
        ("pictures", "wanted images as float tensors .* got str"),
        ("absent", "own.py has no factory 'absent'"),
    ],
)
def test_what_is_no_data_set_says_what_is_wanted(factory, words, own_file):
    with pytest.raises((TypeError, ValueError), match=words):
        load_data(f"{own_file}:{factory}")


def test_an_absent_data_file_is_called_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no data file .*absent.py$"):
        load_data(f"{tmp_path}/absent.py:splits")


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "", "imagefolder", "imagefolder:", "digits:x"])
def test_unknown_names_list_the_known(name):
    with pytest.raises(
        ValueError,
        match=r"^unknown data set .*: .* digits, .* imagefolder:PATH, FILE.py:FACTORY$",
    ):
        load_data(name)


def test_arguments_out_of_range_are_refused(digits, places):
    with pytest.raises(ValueError, match="image_size is for imagefolder"):
        load_data("digits", image_size=64)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_data(f"imagefolder:{places}", image_size=0)
    with pytest.raises(ValueError, match="batch_size"):
        digits.train_loader(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        digits.example_input(0)
    with pytest.raises(ValueError, match="at least 1 image, got images=0"):
        digits.calibration_loader(0)
    with pytest.raises(IndexError, match="index 445 is out of range for 445 images"):
        digits.test[445]  # else iterating over a split would never end
