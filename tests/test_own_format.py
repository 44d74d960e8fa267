"""A format from a package of one's own: found by its name, and held to the laws of the built-in ones."""

import json
import shutil
import subprocess
import sys
import tomllib
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import test_formats as formats
import test_interop as interop
import test_strip as stripping
import torch
from conftest import GEOMETRIES, SHAPES, every_geometry
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.formats import FORMATS, Format, all_contenders, make_format, register_format
from tncompress.gauge import balanced_factors
from tncompress.ranks import RankPath
from tncompress.spec import Settings

PACKAGE = Path(__file__).parents[1] / "examples" / "own_format"
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with the package installed in it, as pip would, on the path; nothing of it is imported."""
    folder = tmp_path / "site"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("pyproject.toml", "__pycache__"))
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in found.items())
        for group, found in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(points))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    FORMATS.pop("ring", None)
    sys.modules.pop("tensor_ring", None)


@pytest.fixture
def ring(site):
    return make_format("ring")


# --- the registry -------------------------------------------------------------------------------------------


def test_a_format_is_found_by_its_name_alone(site):
    assert "tensor_ring" not in sys.modules
    with pytest.raises(ValueError, match="the formats are cp, mps, ring, svd, tucker"):
        make_format("wring")
    assert "tensor_ring" not in sys.modules
    spec = tnc.Spec.parse({"default": {"format": {"name": "ring", "sweeps": 3}}})
    assert str(spec.default.format) == "ring(3)"
    assert tnc.Spec.parse(spec.to_dict()) == spec


def test_where_the_format_is_open_it_competes(site):
    assert "ring" in {format.name for format in all_contenders()}


BROKEN = {
    "no module": ("ring = nowhere:Ring", "'ring' of tensor-ring can't be loaded: No module named 'nowhere'"),
    "no class": ("ring = json:Circle", "'ring' of tensor-ring can't be loaded: .*Circle"),
    "no format": ("ring = math:pi", "'ring' of tensor-ring is no subclass of Format: math:pi"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_one_line_and_harms_no_other_format(site, kind):
    line, words = BROKEN[kind]
    (points,) = site.glob("*.dist-info/entry_points.txt")
    points.write_text(f"[tncompress.formats]\n{line}\n")
    with pytest.raises(ValueError, match=words) as caught:
        make_format("ring")
    assert "\n" not in str(caught.value)
    assert make_format("mps") == tnc.MPS()
    with pytest.warns(UserWarning, match=words):
        assert {format.name for format in all_contenders()} == {"svd", "mps", "tucker", "cp"}


def test_a_package_can_not_take_the_place_of_a_built_in_format(site):
    (points,) = site.glob("*.dist-info/entry_points.txt")
    points.write_text("[tncompress.formats]\nmps = tensor_ring:TensorRing\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_format("mps") == tnc.MPS()
        assert len(all_contenders()) == 5
    with pytest.raises(ValueError, match=r"'mps' is taken by tncompress\.formats\.mps\.MPS"):
        register_format("mps")(tnc.SVD)
    with pytest.raises(TypeError, match="is a frozen dataclass"):
        register_format("plain")(type("Plain", (Format,), {}))


# --- laws ---------------------------------------------------------------------------------------------------

LAYER_LAWS = (
    formats.test_below_full_ranks_the_layer_is_the_dense_layer_of_its_kernel,
    formats.test_macs_are_those_that_torch_counts,
    formats.test_the_macs_ratio_is_that_of_a_large_input,
    formats.test_every_axis_is_padded_and_strided_by_one_stage,
    formats.test_a_layer_takes_the_memory_format_of_its_kind,
    formats.test_tensors_of_a_layer_are_those_it_was_made_of,
)
KERNEL_LAWS = (
    formats.test_factors_have_the_shapes_the_network_says,
    formats.test_the_kernel_is_the_contraction_of_the_network,
    formats.test_full_ranks_are_exact_on_a_kernel_of_many_magnitudes,
    formats.test_a_zero_kernel_is_fitted_without_error,
    formats.test_wrong_ranks_are_an_error_that_names_the_kernel,
)
FORMAT_LAWS = (
    formats.test_the_same_kernel_gives_the_same_factors_whatever_was_drawn_before,
    formats.test_a_fit_follows_neither_the_default_device_nor_the_default_dtype,
    formats.test_a_kernel_of_lower_rank_than_the_bonds_gives_harmless_factors,
    formats.test_a_format_is_what_its_dictionary_says,
)


@every_geometry
@formats.every_dtype
def test_a_ring_at_full_ranks_is_the_dense_layer(ring, geometry, dtype):
    formats.test_at_full_ranks_the_layer_is_the_dense_layer(ring, geometry, dtype)


@every_geometry
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_a_layer_of_rings_keeps_the_laws(ring, law, geometry):
    law(ring, geometry)


@every_shape
@pytest.mark.parametrize("law", KERNEL_LAWS, ids=lambda law: law.__name__)
def test_a_ring_keeps_the_laws(ring, law, shape):
    law(ring, shape)


@pytest.mark.parametrize("law", FORMAT_LAWS, ids=lambda law: law.__name__)
def test_a_ring_keeps_the_laws_of_formats(ring, law):
    law(ring)


@every_shape
@formats.every_dtype
def test_the_error_of_a_ring_is_the_measured_one(ring, shape, dtype):
    formats.test_the_predicted_error_is_the_measured_one(ring, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_ring_keeps_the_dtype(ring, dtype):
    formats.test_a_fit_keeps_the_dtype_and_leaves_the_kernel_alone(ring, dtype)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_error_of_a_ring_does_not_depend_on_the_scale(ring, scale):
    formats.test_the_relative_error_does_not_depend_on_the_scale(ring, scale)


@every_shape
def test_the_error_of_a_ring_falls_along_the_path_of_its_ranks(ring, shape):
    """Least squares may end in a local minimum: 1 %, as of CP."""
    kernel = torch.randn(shape, dtype=torch.float64)
    path = RankPath(kernel[None], Settings(format=ring))
    errors = [ring.fit(kernel, path[i]).rel_error for i in range(len(path))]
    assert path[len(path) - 1] == ring.max_ranks(shape)
    assert errors[-1] < 1e-12
    assert all(later <= 1.01 * before + 1e-12 for before, later in pairwise(errors))


@every_shape
def test_sweeps_lower_the_error_of_a_ring(ring, shape):
    kernel = torch.randn(shape, dtype=torch.float64)
    start = type(ring)(sweeps=0)
    for ranks in formats.some_ranks(ring, shape):
        assert ring.fit(kernel, ranks).rel_error <= start.fit(kernel, ranks).rel_error * (1 + 1e-12)
    if shape == SHAPES["2d"]:
        ranks = (2, 3, 3, 2)
        assert ring.fit(kernel, ranks).rel_error < 0.99 * start.fit(kernel, ranks).rel_error


@every_shape
def test_ranks_that_a_ring_can_not_have_are_lowered(ring, shape):
    top = ring.max_ranks(shape)
    assert ring.feasible(shape, top) == top
    for i in range(len(top)):
        asked = tuple(rank if j == i else 1 for j, rank in enumerate(top))
        ranks = ring.feasible(shape, asked)
        assert all(got <= wanted for got, wanted in zip(ranks, asked, strict=True))
        assert ring.feasible(shape, ranks) == ranks
        fit = ring.fit(torch.randn(shape), asked)
        assert [tuple(f.shape) for f in fit.factors] == list(ring.factor_shapes(shape, ranks))


def test_a_loop_beats_the_chain_on_a_kernel_that_is_a_ring(ring):
    """A chain of more parameters is further from it, though least squares do not find the ring itself."""
    shape, ranks, chain = (12, 16, 3, 3), (3, 3, 3, 3), (6, 6, 6)
    kernel = ring.to_dense(formats.random_factors(ring, shape, ranks), shape)
    assert tnc.MPS().num_params(shape, chain) > ring.num_params(shape, ranks)
    found = type(ring)(sweeps=100).fit(kernel, ranks).rel_error
    assert found < 0.8 * tnc.MPS().fit(kernel, chain).rel_error


@every_geometry
def test_a_stripped_ring_computes_the_same(ring, geometry):
    stripping.test_the_outputs_and_gradients_are_the_same(ring, geometry, None)


@every_geometry
def test_a_ring_goes_to_other_libraries_and_back(ring, geometry):
    interop.test_tensornetwork_contracts_to_the_kernel_and_comes_back(ring, geometry, None)
    interop.test_quimb_contracts_to_the_kernel_and_comes_back(ring, geometry, None)
    interop.test_the_einsum_gives_the_kernels_and_of_an_input_the_output(ring, geometry, None)


def test_a_ring_has_no_balanced_gauge_and_is_left_alone(ring):
    factors = formats.random_factors(ring, (6, 8, 3, 3), (2, 3, 3, 2))
    assert balanced_factors(ring.network((6, 8, 3, 3)), factors) is None


# --- the whole way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rank", [{"params_ratio": 0.3}, {"rel_error": 0.5}, {"energy": 0.8}, {"fixed": 3}, {"rank_fraction": 0.4}]
)
def test_every_policy_but_those_on_spectra_chooses_ranks(ring, rank):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(4, 4))
    spec = {"default": {"format": "ring", "rank": rank}, "keep_dense": [], "allow_larger": True}
    (layer, *_) = tnc.make_plan(model, spec).compressed
    assert layer.format == ring
    limits = {"rel_error": 0.5, "energy": 0.2**0.5}
    assert layer.rel_error <= limits.get(next(iter(rank)), 1.0)
    assert "params_ratio" not in rank or layer.params <= 0.3 * layer.params_dense


@pytest.mark.parametrize("rank", [{"entropy": 1.0}, {"evbmf": 1.0}])
def test_policies_on_spectra_are_refused_in_one_line(ring, rank):
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    with pytest.raises(ValueError, match=r"goes by the spectrum of each bond, and those of ring have none"):
        tnc.make_plan(model, {"default": {"format": "ring", "rank": rank}, "keep_dense": []})


def test_data_lower_the_error_of_a_rings_output(ring):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)).eval()
    batches = [torch.randn(8, 3, 12, 12).cumsum(-1) for _ in range(2)]
    spec = {"default": {"format": "ring", "rank": {"fixed": 2}}, "keep_dense": ["stem"]}
    plain, fitted = tnc.compress(model, spec), tnc.compress(model, spec, calibration=batches)
    x = torch.cat(batches)
    gaps = [(small(x) - model(x)).norm() / model(x).norm() for small in (plain, fitted)]
    assert gaps[1] < 0.9 * gaps[0]


def test_a_budget_is_shared_out_over_rings(ring):
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 12, 3, padding=1))
    spec = {"default": {"format": "ring"}, "budget": {"params": 0.5}, "keep_dense": ["stem"]}
    plan = tnc.make_plan(model, spec)
    assert plan.params <= 0.5 * plan.params_model
    assert {layer.format.name for layer in plan.compressed} == {"ring"}


@pytest.mark.parametrize("kind", ["2d", "1d", "linear", "3d", "2d-grouped", "2d-transposed-grouped"])
def test_a_saved_ring_comes_back_bit_by_bit(ring, tmp_path, kind):
    geometry = GEOMETRIES[kind]
    model = nn.Sequential(geometry.layer()).eval()
    spec = {"default": {"format": "ring", "rank": {"fixed": 2}}, "keep_dense": [], "allow_larger": True}
    small = tnc.compress(model, spec)
    tnc.save(small, tmp_path / "m")
    x = geometry.input()
    assert torch.equal(tnc.load(tmp_path / "m", model)(x), small(x))


def test_the_commands_know_a_ring_like_any_other_format(site, run, tmp_path, unchecked):
    (tmp_path / "spec.yaml").write_text("default: {format: ring, rank: {params_ratio: 0.25}}\n")
    torch.manual_seed(0)
    tnc.save_weights(tnc.build_model("zoo:cnn4"), tmp_path / "w.safetensors")
    model = "--model zoo:cnn4 --weights w.safetensors --spec spec.yaml --input 1x28x28"
    assert "ring" in run(f"plan {model}").stdout
    run(f"compress {model} --out small")
    found = json.loads(run("info small --json").stdout)
    assert {layer["format"] for layer in found["layers"]} == {"ring"}
    assert json.loads(run("export small --to strip --json").stdout)["relative_difference"] < 1e-5
    x = torch.randn(2, 1, 28, 28)
    plain = torch.load(tmp_path / "small" / "stripped.pt", weights_only=False)
    assert_close(plain(x), tnc.load(tmp_path / "small")(x))


def test_without_the_package_its_models_are_refused_in_one_line(ring, tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 12, 3)).eval()
    spec = {"default": {"format": "ring", "rank": {"fixed": 2}}, "keep_dense": []}
    tnc.save(tnc.compress(model, spec), tmp_path / "m")
    code = "import tncompress as tnc, torch, sys\n"
    code += "print(tnc.read_saved(sys.argv[1]).layers[0].format)\n"
    code += "tnc.load(sys.argv[1], torch.nn.Sequential(torch.nn.Conv2d(8, 12, 3)))"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert found.stdout == "ring (not installed here)\n"
    assert "unknown format 'ring'; the formats are cp, mps, svd, tucker" in found.stderr.splitlines()[-1]
