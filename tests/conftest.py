"""What all tests share: checked shapes, one seed, one thread, and the grids over which the laws hold.

Shapes and types in the signatures of ``tncompress`` are enforced here and only here, by an import hook that
has to be in place before anything imports the package.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import config, install_import_hook
from torch import nn

install_import_hook("tncompress", "beartype.beartype")

from tncompress import machine, ranks  # noqa: E402 - after the hook
from tncompress.formats import CP, MPS, SVD, Format, Tucker  # noqa: E402

FRESH = "TNCOMPRESS_TEST_IN_FRESH_PROCESS"


def pytest_addoption(parser):
    parser.addoption("--zoo", action="store_true", help="run the whole model zoo, too: hours")
    parser.addoption("--minutes", type=float, default=math.inf, help="skip zoo tests after this time")
    parser.addoption("--largest", type=float, default=300, help="millions of parameters of a zoo run")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--zoo"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("zoo")])
        items[:] = [item for item in items if not item.get_closest_marker("zoo")]
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)  # autograd has no threads yet


STARTED = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that trains in forks in a new process where autograd has threads, which forks lose."""
    if pyfuncitem.get_closest_marker("forks") is None or FRESH in os.environ or _forks_can_train():
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    ran = subprocess.run(
        [*command, f"--rootdir={pyfuncitem.config.rootpath}", pyfuncitem.nodeid],
        env=mine | {FRESH: "1"},
        cwd=pyfuncitem.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    return True


def _forks_can_train() -> bool:
    """Try it, after a backward pass here: the first one starts the threads, if there are to be any."""
    torch.ones(1, requires_grad=True).sum().backward()
    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if item.get_closest_marker("zoo") and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"after {minutes:g} minutes")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tensors this small gain nothing from threads, and wait for them where the machine is busy."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever tests ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_fitted_machine(monkeypatch, tmp_path):
    """The built-in cost model, whatever was fitted to the machine that runs the tests."""
    monkeypatch.setattr(machine, "machines_file", lambda: tmp_path / "no-machines.json")


@pytest.fixture(autouse=True)
def _tensorly_on_numpy():
    """Put back tensorly's backend, which the first import of tltorch in a test switches for everybody."""
    yield
    if "tensorly" in sys.modules:
        sys.modules["tensorly"].set_backend("numpy")


@pytest.fixture
def unchecked(monkeypatch):
    """Signatures as users have them, unchecked: for errors of our own on a wrong type, and for compilers."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command line in a folder of the test's own; the exit code is checked."""
    from typer.testing import CliRunner

    from tncompress.cli import app

    monkeypatch.chdir(tmp_path)

    def call(line, code=0):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == code, result.output + result.stderr
        return result

    return call


@pytest.fixture
def quick_cp(monkeypatch):
    """Few sweeps and restarts of CP, where a test does not ask how good the fit is."""
    monkeypatch.setattr("tncompress.formats.cp.SWEEPS", 20)
    monkeypatch.setattr("tncompress.formats.cp.RESTARTS", 1)


def choose(kernel, settings, *, allow_larger=False):
    """Return what is chosen for a kernel of one group."""
    limit = math.inf if allow_larger else kernel.numel() - 1
    return ranks.choose(kernel[None], settings, limit=limit)


@dataclass(frozen=True)
class Geometry:
    """A layer to be built, the shape of an input, and the shape of its kernel (that of one group)."""

    make: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]

    def layer(self, dtype=torch.float64) -> nn.Module:
        return self.make(dtype=dtype)

    def input(self, dtype=torch.float64) -> torch.Tensor:
        return torch.randn(self.input_shape, dtype=dtype)


def _conv(ndim, channels, kernel, lengths, *, batch=(2,), transposed=False, **options):
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    turned = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[ndim]
    kernel = (kernel,) * ndim if isinstance(kernel, int) else kernel
    inward, out = (count // options.get("groups", 1) for count in channels)

    def make(dtype):
        return (turned if transposed else plain)(*channels, kernel, dtype=dtype, **options)

    return Geometry(make, (*batch, channels[0], *lengths), (out, inward, *kernel))


def _linear(features, *, batch=(3,), **options):
    return Geometry(
        lambda dtype: nn.Linear(*features, dtype=dtype, **options), (*batch, features[0]), features[::-1]
    )


GEOMETRIES: dict[str, Geometry] = {
    "linear": _linear((12, 10)),
    "linear-nobias-4d": _linear((7, 12), batch=(2, 3, 2), bias=False),
    "linear-unbatched": _linear((12, 7), batch=()),
    "1d": _conv(1, (6, 8), 5, (12,), padding=2),
    "1d-even-stride-nobias": _conv(1, (8, 6), 4, (13,), stride=2, padding=1, bias=False),
    "1d-same-even-circular": _conv(1, (5, 7), 4, (9,), padding="same", padding_mode="circular"),
    "1d-unbatched": _conv(1, (6, 8), 3, (12,), batch=()),
    "2d": _conv(2, (6, 8), 3, (7, 9), padding=1),
    "2d-nobias-valid": _conv(2, (8, 6), 3, (7, 6), padding="valid", bias=False),
    "2d-stride": _conv(2, (6, 8), 3, (9, 8), stride=2, padding=1),
    "2d-stride-anisotropic": _conv(2, (6, 8), (3, 2), (8, 9), stride=(3, 1), padding=(0, 2)),
    "2d-same": _conv(2, (6, 8), (3, 5), (6, 7), padding="same"),
    "2d-same-even": _conv(2, (6, 8), (4, 2), (6, 7), padding="same"),
    "2d-same-even-dilated": _conv(2, (5, 7), (2, 4), (8, 9), padding="same", dilation=(3, 1)),
    "2d-dilated": _conv(2, (6, 8), 3, (9, 11), padding=2, dilation=(1, 2)),
    "2d-reflect": _conv(2, (6, 8), 3, (7, 8), padding=(1, 2), padding_mode="reflect", stride=(2, 1)),
    "2d-reflect-same-even": _conv(2, (5, 6), (4, 3), (7, 8), padding="same", padding_mode="reflect"),
    "2d-replicate": _conv(2, (6, 8), 3, (7, 8), padding=(3, 1), padding_mode="replicate", dilation=(2, 1)),
    "2d-circular": _conv(2, (6, 8), 3, (7, 8), padding=(1, 2), padding_mode="circular", stride=(1, 2)),
    "2d-1x1": _conv(2, (8, 10), 1, (5, 6)),
    "2d-1x1-stride-padding": _conv(2, (8, 10), 1, (5, 6), stride=2, padding=1),
    "2d-1x5": _conv(2, (6, 8), (1, 5), (6, 9), stride=(2, 2), padding=(1, 2), padding_mode="replicate"),
    "2d-3x1": _conv(2, (8, 6), (3, 1), (7, 6), padding="same", dilation=(2, 5)),
    "2d-one-in": _conv(2, (1, 9), 3, (7, 7), padding=1),
    "2d-one-out": _conv(2, (9, 1), (3, 2), (7, 7), padding=1),
    "2d-unbatched": _conv(2, (6, 8), 3, (7, 9), batch=(), stride=2, padding=1),
    "2d-reflect-unbatched": _conv(2, (6, 8), 3, (7, 9), batch=(), padding=1, padding_mode="reflect"),
    "3d": _conv(3, (4, 6), 3, (5, 4, 5), padding=1),
    "3d-anisotropic": _conv(3, (5, 4), (2, 3, 1), (5, 7, 4), stride=(1, 2, 3), padding=(1, 0, 2), bias=False),
    "3d-same-even-replicate": _conv(
        3, (3, 5), (2, 3, 4), (5, 5, 6), padding="same", padding_mode="replicate"
    ),
    "3d-unbatched": _conv(3, (4, 5), (3, 1, 2), (4, 5, 4), batch=(), dilation=(1, 2, 2)),
    "1d-grouped": _conv(1, (6, 9), 4, (12,), groups=3, padding="same", bias=False),
    "2d-grouped": _conv(2, (8, 12), 3, (7, 9), groups=2, padding=(1, 2), stride=(2, 1), dilation=(1, 2)),
    "2d-grouped-reflect": _conv(2, (9, 6), (3, 2), (7, 8), groups=3, padding=1, padding_mode="reflect"),
    "2d-grouped-1x1": _conv(2, (8, 12), 1, (5, 6), groups=4),
    "2d-depthwise": _conv(2, (6, 6), (3, 4), (7, 8), groups=6, padding=1),
    "2d-depthwise-multiplied": _conv(
        2, (4, 12), 3, (7, 8), groups=4, stride=2, padding_mode="circular", padding=1
    ),
    "3d-grouped": _conv(3, (4, 6), (2, 3, 1), (5, 6, 4), groups=2, padding=(1, 0, 2), bias=False),
    "1d-transposed": _conv(1, (6, 5), 4, (9,), transposed=True, stride=3, padding=1, output_padding=2),
    "2d-transposed": _conv(2, (6, 8), 3, (5, 6), transposed=True, stride=2, padding=1, output_padding=1),
    "2d-transposed-anisotropic": _conv(
        2, (8, 6), (2, 3), (6, 5), transposed=True, stride=(3, 1), padding=(0, 2), dilation=(1, 2), bias=False
    ),
    "2d-transposed-1x1": _conv(2, (7, 5), 1, (4, 5), transposed=True, stride=2, output_padding=(1, 0)),
    "2d-transposed-1x3": _conv(2, (5, 7), (1, 3), (4, 5), transposed=True, stride=(2, 2), padding=(0, 1)),
    "2d-transposed-grouped": _conv(
        2, (6, 9), (4, 2), (4, 5), transposed=True, groups=3, stride=2, padding=(1, 0), output_padding=(0, 1)
    ),
    "2d-transposed-depthwise": _conv(2, (4, 4), 4, (5, 4), transposed=True, groups=4, stride=2, padding=1),
    "2d-transposed-unbatched": _conv(2, (5, 4), 3, (5, 6), transposed=True, batch=(), stride=(1, 2)),
    "3d-transposed": _conv(
        3,
        (4, 3),
        (3, 2, 2),
        (3, 4, 3),
        transposed=True,
        stride=(1, 2, 2),
        padding=(1, 0, 1),
        dilation=(2, 1, 1),
    ),
}
"""Layers of every kind, by name; small, and with no two sizes alike where that could hide a mistake."""

SHAPES = {
    "linear": (9, 7),
    "linear-wide": (5, 11),
    "1d": (6, 5, 4),
    "2d": (6, 7, 3, 3),
    "2d-rectangular": (7, 5, 2, 4),
    "2d-1x1": (7, 8, 1, 1),
    "2d-thin": (6, 7, 1, 3),
    "2d-one-in": (9, 1, 3, 3),
    "2d-one-out": (1, 9, 3, 2),
    "3d": (5, 4, 2, 3, 2),
    "3d-thin": (4, 5, 3, 1, 2),
}
"""Kernels of every kind: a fit knows nothing of stride or padding."""

FORMATS: dict[str, Format] = {
    "svd": SVD(),
    "svd-in": SVD("in|rest"),
    "svd-separable": SVD("out kw|in kh"),
    "svd-kw": SVD("kw|rest"),
    "svd-channels": SVD("out in|rest"),
    "mps": MPS(),
    "mps-out-first": MPS("out in spatial"),
    "mps-spatial-first": MPS("spatial in out"),
    "mps-mixed": MPS("kw in kd kh out"),
    "mps-reversed": MPS("kh out kw kd in"),
    "tucker": Tucker(),
    "tucker-all": Tucker("all"),
    "cp": CP(),
    "cp-merged": CP(merged=True),
}


def applies(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether the format ``name`` of the grid can cut a kernel of this shape, in plain words."""
    if name == "svd-separable":
        return len(shape) < 5  # it says nothing of kd
    if name == "svd-kw":
        return len(shape) > 2 and shape[-1] > 1
    if name == "svd-channels":
        return any(size > 1 for size in shape[2:])
    return True


every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def _pairs(wanted: bool):
    pairs = [
        pytest.param(format, geometry, id=f"{name}-{kind}")
        for name, format in FORMATS.items()
        for kind, geometry in GEOMETRIES.items()
        if applies(name, geometry.kernel_shape) is wanted
    ]
    return pytest.mark.parametrize(("format", "geometry"), pairs)


every_format_and_geometry = _pairs(True)
every_misfit = _pairs(False)


def _format_and_shape(wanted):
    return pytest.mark.parametrize(
        ("format", "shape"),
        [
            pytest.param(format, shape, id=f"{name}-{kind}")
            for name, format in FORMATS.items()
            for kind, shape in SHAPES.items()
            if applies(name, shape) and wanted(format)
        ],
    )


every_format_and_shape = _format_and_shape(lambda format: True)
every_tree_and_shape = _format_and_shape(lambda format: not isinstance(format, CP))
"""The formats whose bonds are cuts: all but CP, whose one bond is shared by all factors."""
