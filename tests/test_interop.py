"""Layers go to other tensor-network libraries and come back: the same kernel, the same numbers, no traces."""

import copy
import functools
import itertools
import subprocess
import sys
import warnings

import pytest
import tensorly
import tensornetwork
import torch
from conftest import FORMATS, GEOMETRIES, every_format_and_geometry
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress import CP, MPS, SVD, Tucker
from tncompress.contraction import chain_macs, dense_macs
from tncompress.layers import TNConv


def compressed(format, geometry, dtype=torch.float64):
    return copy.deepcopy(_compressed(format, geometry, dtype))


@functools.cache
def _compressed(format, geometry, dtype):
    torch.manual_seed(0)
    ranks = tuple(-(-most // 2) for most in format.max_ranks(geometry.kernel_shape))
    feasible = format.feasible(geometry.kernel_shape, ranks)
    return TNConv.from_dense(geometry.layer(dtype), format, feasible)


def conv(format=None, ranks=(6, 12, 10), **options):
    return TNConv.from_dense(nn.Conv2d(8, 16, 3, dtype=torch.float64, **options), format or MPS(), ranks)


def kernels(layer):
    """The kernel of each group, from the dense weight."""
    return layer.geometry.kernels(layer.weight.detach())


def legs(layer):
    ndim = len(layer.geometry.kernel_shape)
    return ("out", "in", *("kd", "kh", "kw")[5 - ndim :])


def each_group(layer):
    return [None] if layer.geometry.groups == 1 else list(range(layer.geometry.groups))


def whole(networks):
    """A network, or one for each group, as the way back wants them."""
    return networks[0] if len(networks) == 1 else networks


def same(new, old):
    """The same layer down to the last bit, but not the same memory."""
    assert (new.format, new.geometry, new.ranks) == (old.format, old.geometry, old.ranks)
    assert (new.rel_error, new.training) == (old.rel_error, old.training)
    assert new.state_dict().keys() == old.state_dict().keys()
    for (name, a), (_, b) in zip(new.named_parameters(), old.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (a.dtype, a.device, a.requires_grad) == (b.dtype, b.device, b.requires_grad)
        assert a.data_ptr() != b.data_ptr()
    return True


# --- tensornetwork ------------------------------------------------------------------------------------------


@every_format_and_geometry
def test_tensornetwork_contracts_to_the_kernel_and_comes_back(format, geometry, quick_cp):
    layer = compressed(format, geometry).eval()
    assert same(tnc.from_tensornetwork(whole(list(_nodes(layer))), layer), layer)
    for network, kernel in zip(_nodes(layer), kernels(layer), strict=True):
        assert tuple(edge.name for edge in network.edges) == legs(layer)
        assert all(edge.is_dangling() for edge in network.edges)
        assert {node.backend.name for node in network.nodes} == {"pytorch"}
        made = tensornetwork.contractors.auto(network.nodes, output_edge_order=network.edges)
        assert_close(made.tensor.detach(), kernel, atol=1e-12, rtol=1e-12)


def _nodes(layer):
    return (tnc.to_tensornetwork(layer, group) for group in each_group(layer))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("contractor", ["greedy", "optimal", "branch"])
def test_every_contractor_gives_the_kernel(format, contractor, quick_cp):
    layer = compressed(format, GEOMETRIES["2d"])
    nodes, edges = tnc.to_tensornetwork(layer)
    made = getattr(tensornetwork.contractors, contractor)(nodes, output_edge_order=edges)
    assert_close(made.tensor, layer.weight, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_gradients_flow_through_tensornetwork(format, quick_cp):
    layer = compressed(format, GEOMETRIES["2d"])
    wanted = torch.autograd.grad(layer.weight.square().sum(), list(layer.factors))
    nodes, edges = tnc.to_tensornetwork(layer)
    made = tensornetwork.contractors.auto(nodes, output_edge_order=edges).tensor
    for got, gradient in zip(
        torch.autograd.grad(made.square().sum(), list(layer.factors)), wanted, strict=True
    ):
        assert_close(got, gradient, atol=1e-10, rtol=1e-10)


def test_a_bond_truncated_by_tensornetwork_is_the_best_there():
    layer = conv()
    nodes, edges = tnc.to_tensornetwork(layer)
    first, second, *others = nodes
    sides = [first["in"]], [second["kh"], second["r1"]]
    left, right, _ = tensornetwork.split_node(first @ second, *sides, max_singular_values=4)
    small = tnc.from_tensornetwork([right, *others, left], layer)  # in any order
    assert small.ranks == (4, 12, 10)
    assert small.rel_error is None
    assert torch.equal(small.bias, layer.bias)
    made = tensornetwork.contractors.auto([left, right, *others], output_edge_order=edges).tensor
    assert_close(small.weight, made)
    pair = torch.einsum("ai,bak->ibk", *(t.detach() for t in small.tensors()[:2]))
    before = torch.einsum("ai,bak->ibk", *(t.detach() for t in layer.tensors()[:2]))
    assert_close((pair - before).norm(), torch.linalg.svdvals(before.flatten(1))[4:].norm())


def test_nodes_of_a_cp_are_an_mps_with_diagonal_cores():
    layer = conv(CP(), (5,))
    nodes, _ = tnc.to_tensornetwork(layer)
    assert [node.shape for node in nodes] == [(5, 8), (5, 5, 3), (5, 5, 3), (16, 5)]
    dense = nn.Conv2d(8, 16, 3, dtype=torch.float64)
    as_mps = tnc.from_tensornetwork(nodes, dense, format=MPS())
    assert as_mps.ranks == (5, 5, 5)
    assert_close(as_mps.weight, layer.weight)
    assert torch.equal(as_mps.bias, dense.bias)
    error = (layer.weight - dense.weight).norm() / dense.weight.norm()
    assert as_mps.rel_error == pytest.approx(error.item())
    nodes[1].tensor = torch.randn(5, 5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not diagonal along its bonds, as cp needs: pass format=MPS\(\)"):
        tnc.from_tensornetwork(nodes, layer)


def _hidden(nodes):
    return nodes[1:]


def _extra(nodes):
    return [*nodes, tensornetwork.Node(torch.ones(2), name="more", backend="pytorch")]


def _loose(nodes):
    tensornetwork.disconnect(nodes[0]["r0"])
    return nodes


def _square(nodes):
    nodes[0].tensor = torch.randn(6, 9, dtype=torch.float64)
    return nodes


def _merged(nodes):
    return [nodes[0] @ nodes[1], *nodes[2:]]


def _mixed(nodes):
    nodes[0].tensor = nodes[0].tensor.float()
    return nodes


def _wide(nodes):
    nodes[0].tensor, nodes[1].tensor = torch.randn(9, 8), torch.randn(12, 9, 3)
    for node in nodes[2:]:
        node.tensor = node.tensor.float()
    return nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_hidden, r"edge 'r0' of node 'kh' leads to node 'in', which is not among the nodes"),
        (_extra, r"edge '.*' of node 'more' is dangling, and no leg of the kernel \(out, in, kh, kw\)"),
        (_loose, r"edge 'r0' of node 'in' is dangling, and no leg of the kernel"),
        (_square, r"node 'in' has dimension 9 on 'in', a kernel \(16, 8, 3, 3\) has 8"),
        (_merged, r"do not form the network of mps on a kernel \(16, 8, 3, 3\): wanted \(r0 in\), "),
        (_mixed, r"wanted floating-point tensors of one dtype on one device, got torch.float32 on cpu, torc"),
        (_wide, r"takes 3 rank\(s\) of at most \(8, 24, 16\), got \(9, 12, 10\)"),
        (lambda nodes: [], r"wanted one node with the kernel's leg 'out', got 0"),
    ],
)
def test_nodes_that_are_no_layer_are_refused_in_one_line(change, message):
    layer = conv()
    nodes = change(tnc.to_tensornetwork(layer).nodes)
    with pytest.raises(ValueError, match=message) as caught:
        tnc.from_tensornetwork(nodes, layer)
    assert "\n" not in str(caught.value)


def test_a_format_and_ranks_of_the_wrong_kind_are_refused_with_what_would_do(unchecked):
    layer, dense = conv(), nn.Conv2d(8, 16, 3)
    for call in (
        lambda: tnc.from_tensornetwork(tnc.to_tensornetwork(layer), dense, format="mps"),
        lambda: TNConv.from_dense(dense, "mps", (6, 12, 10)),
    ):
        with pytest.raises(TypeError, match=r"wanted a format, such as MPS\(\), got 'mps'"):
            call()
    with pytest.raises(TypeError, match=r"takes 3 rank\(s\) .* got 8: give one for each bond"):
        TNConv.from_dense(dense, MPS(), 8)


def test_groups_have_a_network_each(unchecked):
    layer = TNConv.from_dense(nn.Conv2d(8, 12, 3, groups=2), SVD(), (3,))
    with pytest.raises(ValueError, match="2 groups, a network each: pass group=0 to group=1"):
        tnc.to_tensornetwork(layer)
    with pytest.raises(ValueError, match="wanted a group from 0 to 1, got 2"):
        tnc.to_quimb(layer, group=2)
    networks = [tnc.to_tensornetwork(layer, group) for group in (0, 1)]
    with pytest.raises(ValueError, match="2 groups: wanted a network for each, got 1"):
        tnc.from_tensornetwork(networks[:1], layer)
    assert same(tnc.from_tensornetwork([network.nodes for network in networks], layer), layer)
    first, second = networks[1].nodes
    networks[1].nodes[0].tensor, networks[1].nodes[1].tensor = first.tensor[:2], second.tensor[:, :2]
    with pytest.raises(ValueError, match=r"same ranks, but factor 0 comes as \(3, 4, 3, 3\), \(2, 4, 3, 3\)"):
        tnc.from_tensornetwork(networks, layer)


def test_what_is_no_compressed_layer_is_refused(unchecked):
    dense = nn.Conv2d(8, 16, 3)
    for way in (tnc.to_tensornetwork, tnc.to_tltorch, tnc.to_quimb, tnc.to_einsum):
        with pytest.raises(TypeError, match=r"wanted a compressed layer \(TNConv\), got Conv2d: compress"):
            way(dense)
    nodes, _ = tnc.to_tensornetwork(conv())
    with pytest.raises(
        ValueError, match="a Conv2d does not say of which format the network is: pass format="
    ):
        tnc.from_tensornetwork(nodes, dense)
    with pytest.raises(TypeError, match="wanted nodes of tensornetwork, got a Tensor"):
        tnc.from_tensornetwork([torch.ones(2)], conv())
    with pytest.raises(TypeError, match="wanted a TensorNetwork of quimb, got a list"):
        tnc.from_quimb([], conv())


# --- quimb --------------------------------------------------------------------------------------------------


@every_format_and_geometry
def test_quimb_contracts_to_the_kernel_and_comes_back(format, geometry, quick_cp):
    pytest.importorskip("quimb")
    layer = compressed(format, geometry)
    networks = [tnc.to_quimb(layer, group) for group in each_group(layer)]
    assert same(tnc.from_quimb(whole(networks), layer), layer)
    for network, kernel in zip(networks, kernels(layer), strict=True):
        made = network.contract(output_inds=legs(layer))
        assert_close(made.data.detach(), kernel, atol=1e-12, rtol=1e-12)


def test_quimb_canonises_and_the_layer_computes_the_same():
    pytest.importorskip("quimb")
    layer = conv()
    network = tnc.to_quimb(layer)
    assert sorted(network.tags) == ["in", "kh", "kw", "mps", "out"]
    network.canonize_around_("kw")
    again = tnc.from_quimb(network, layer)
    assert again.ranks == layer.ranks
    assert_close(again.weight, layer.weight)
    isometry = again.tensors()[0].detach()
    assert_close(isometry @ isometry.mT, torch.eye(6, dtype=torch.float64))
    network.compress_all_(max_bond=5)
    assert max(tnc.from_quimb(network, layer).ranks) == 5
    assert not torch.allclose(layer.tensors()[0] @ layer.tensors()[0].mT, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", ["tensornetwork", "quimb"])
def test_arrays_in_float64_come_back_in_the_dtype_of_the_layer(library, dtype):
    pytest.importorskip(library)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).to(dtype)
    layer = TNConv.from_dense(model[0], MPS(), (6, 12, 10))
    if library == "quimb":
        network = tnc.to_quimb(layer)
        network.apply_to_arrays(lambda tensor: tensor.detach().double().numpy())
        back = [tnc.from_quimb(network, layer), tnc.from_quimb(network, model[0], format=MPS())]
    else:
        nodes, _ = tnc.to_tensornetwork(layer)
        for node in nodes:
            node.tensor = node.tensor.detach().double().numpy()
        back = [
            tnc.from_tensornetwork(nodes, layer),
            tnc.from_tensornetwork(nodes, model[0], format=MPS()),
        ]
    for number, found in enumerate(back):
        assert {p.dtype for p in found.parameters()} == {dtype}
        assert torch.equal(found.weight, layer.weight)
        if number == 0:
            assert same(found, layer)
        model[0] = found
        assert model(torch.randn(1, 8, 4, 4, dtype=dtype)).dtype == dtype


def test_complex_tensors_are_refused_with_what_to_pass():
    pytest.importorskip("quimb")
    network = tnc.to_quimb(conv())
    network.apply_to_arrays(lambda tensor: tensor.detach().to(torch.complex128))
    with pytest.raises(ValueError, match=r"got torch.complex128 on cpu: kernels are real, pass"):
        tnc.from_quimb(network, conv())


def test_bonds_of_quimb_may_have_any_names():
    pytest.importorskip("quimb")
    layer = conv(Tucker("all"), (6, 2, 2, 5))
    network = tnc.to_quimb(layer).reindex({"r0": "x", "r1": "r2", "r2": "r1", "r3": "yy"})
    assert same(tnc.from_quimb(network, layer), layer)


# --- einsum -------------------------------------------------------------------------------------------------


@every_format_and_geometry
def test_the_einsum_gives_the_kernels_and_of_an_input_the_output(format, geometry, quick_cp):
    layer = compressed(format, geometry)
    einsum = tnc.to_einsum(layer)
    made = einsum()
    assert_close(made if layer.geometry.groups > 1 else made[None], kernels(layer), atol=1e-12, rtol=1e-12)
    assert made.requires_grad
    assert_close(torch.einsum(einsum.equation, *einsum.operands), made)
    assert einsum.macs <= _macs_in_turn(einsum)
    _check_output(layer, geometry.input())


def _check_output(layer, x):
    groups, out = layer.geometry.groups, layer.geometry.kernel_shape[0]
    made = tnc.to_einsum(layer, x)().reshape(groups, -1, out)  # groups, pixels, out
    output = layer(x) if layer.bias is None else layer(x) - _on_channels(layer)
    if layer.geometry.ndim == 0:
        assert_close(made[0], output.reshape(-1, out), atol=1e-10, rtol=1e-10)
        return
    output = output if output.ndim > layer.geometry.ndim + 1 else output[None]
    wanted = output.unflatten(1, (groups, out)).movedim(0, 2).flatten(2).mT
    assert_close(made, wanted, atol=1e-10, rtol=1e-10)


def _on_channels(layer):
    return layer.bias.reshape(-1, *[1] * layer.geometry.ndim)


def test_the_einsum_of_an_input_costs_more_than_the_chain_that_shares_pixels():
    layer = conv()
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    einsum = tnc.to_einsum(layer, x)
    assert einsum.macs > chain_macs(layer.geometry, layer.stages, (12, 12), 2)
    assert einsum.macs <= dense_macs(layer.geometry, (12, 12), 2) + tnc.to_einsum(layer).macs


def _macs_in_turn(einsum):
    """What it takes to contract the operands from first to last."""
    terms, output = einsum.equation.split("->")
    size = {
        letter: n
        for term, operand in zip(terms.split(","), einsum.operands, strict=True)
        for letter, n in zip(term, operand.shape, strict=True)
    }
    first, *rest = (set(term) for term in terms.split(","))
    total = 0
    for place, term in enumerate(rest):
        joined = first | term
        product = 1
        for letter in joined:
            product *= size[letter]
        total += product
        first = joined & set(output).union(*rest[place + 1 :])
    return total


def test_the_path_is_the_cheapest_of_all():
    einsum = tnc.to_einsum(conv())
    costs = {
        16 * 10 * 12 * 3 + 6 * 8 * 12 * 3 + 8 * 3 * 12 * 16 * 3,
        6 * 8 * 36 + 8 * 3 * 12 * 30 + 16 * 10 * 72,
    }
    assert einsum.macs == min(costs)
    assert einsum.macs * 2 == pytest.approx(
        float(einsum.info.split("Optimized FLOP count:")[1].split()[0]), rel=1e-3
    )


# --- tltorch ------------------------------------------------------------------------------------------------


def pytorch_backend():
    """What a user of tltorch has: it runs on no other backend."""
    return tensorly.backend_context("pytorch", local_threadsafe=True)


def in_their_order(format, shape):
    legs = [leg for factor in format.network(shape) for leg in factor if not leg.startswith("r")]
    thin = {
        name for name, size in zip(("kd", "kh", "kw")[5 - len(shape) :], shape[2:], strict=True) if size == 1
    }
    ours = [leg for leg in legs if leg not in thin]
    return ours == [leg for leg in ("in", "kd", "kh", "kw", "out") if leg in ours]


def expressible(format, layer):
    geometry = layer.geometry
    own = (
        (isinstance(format, CP) and all(len(modes) == 1 for modes in format.modes(geometry.kernel_shape)[1:]))
        or isinstance(format, Tucker)
        or (isinstance(format, MPS) and in_their_order(format, geometry.kernel_shape))
    )
    plain = geometry.ndim and geometry.groups == 1 and not geometry.transposed
    return plain and own and geometry.padding_mode == "zeros" and all(a == b for a, b in geometry.padding)


@every_format_and_geometry
def test_tltorch_computes_the_same_and_comes_back_or_is_refused(format, geometry, quick_cp):
    layer, x = compressed(format, geometry), geometry.input()
    x = x if x.ndim > geometry.layer().weight.ndim - 1 else x[None]
    if not expressible(format, layer):
        with pytest.raises(ValueError, match=r"\Atltorch has no [^\n]*\Z"):
            tnc.to_tltorch(layer)
        return
    theirs = tnc.to_tltorch(layer)
    assert not any(
        a.data_ptr() == b.data_ptr() for a, b in itertools.product(theirs.parameters(), layer.parameters())
    )
    implementations = ["factorized", "reconstructed", *(["mobilenet"] if isinstance(format, CP) else [])]
    with pytorch_backend():
        for implementation in implementations:
            theirs = tnc.to_tltorch(layer, implementation=implementation)
            assert_close(theirs(x), layer(x), atol=1e-12, rtol=1e-12)
    back = tnc.from_tltorch(theirs)
    assert_close(back(x), layer(x), atol=1e-12, rtol=1e-12)
    if back.format == layer.format:
        layer.rel_error = None
        assert same(back, layer)


@pytest.mark.parametrize("name", ["cp", "tucker", "tucker-all", "mps"])
@pytest.mark.parametrize("kind", ["1d", "2d", "2d-stride-anisotropic", "2d-dilated", "2d-1x5", "3d"])
def test_the_way_to_tltorch_and_back_is_exact(name, kind, quick_cp):
    layer = compressed(FORMATS[name], GEOMETRIES[kind]) if kind != "2d-1x5" else conv_1x5(FORMATS[name])
    layer.requires_grad_(False).eval()
    back = tnc.from_tltorch(tnc.to_tltorch(layer))
    layer.rel_error = None
    assert same(back, layer)


def conv_1x5(format):
    dense = nn.Conv2d(6, 8, (1, 5), stride=2, dtype=torch.float64)
    ranks = tuple(-(-most // 2) for most in format.max_ranks((8, 6, 1, 5)))
    return TNConv.from_dense(dense, format, ranks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(8, 16), "has a spatial axis|this is a linear layer"),
        (lambda: nn.ConvTranspose2d(8, 16, 3), "it has no transposed convolutions"),
        (lambda: nn.Conv2d(8, 16, 3, groups=2), "it has no groups, this has 2"),
        (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), "this pads by 'reflect'"),
        (lambda: nn.Conv2d(8, 16, (4, 3), padding="same"), r"this pads \(\(1, 2\), \(1, 1\)\)"),
    ],
)
def test_what_tltorch_would_get_wrong_is_refused(make, message):
    layer = make()
    small = TNConv.from_dense(layer, Tucker(), (2,) if isinstance(layer, nn.Linear) else (2, 2))
    with pytest.raises(ValueError, match=f"tltorch has no such layer: .*({message}).*; keep it as it is"):
        tnc.to_tltorch(small)


def test_formats_that_tltorch_has_not_are_refused():
    for format, ranks in ((SVD(), (3,)), (CP(merged=True), (3,)), (MPS("out in spatial"), (3, 3, 3))):
        with pytest.raises(ValueError, match=r"no format like .* on a kernel \(16, 8, 3, 3\): it has CP"):
            tnc.to_tltorch(conv(format, ranks))
    with pytest.raises(ValueError, match="mobilenet is for CP, the layer is mps"):
        tnc.to_tltorch(conv(), implementation="mobilenet")
    with pytest.raises(ValueError, match="implementation factorized, reconstructed or mobilenet, got 'fast'"):
        tnc.to_tltorch(conv(), implementation="fast")


def tltorch_model():
    """A model of tltorch's own making, at ranks of its own choice, with what can't be converted beside it."""
    with pytorch_backend():
        import tltorch

        def made(factorization, *sizes, **options):
            layer = tltorch.FactorizedConv(*sizes, factorization=factorization, rank=0.7, **options)
            layer.reset_parameters(std=0.5)
            return layer

        model = nn.Sequential(
            made("cp", 3, 8, (3, 3), padding=1, stride=(1, 2), bias=True),
            made("tucker", 8, 10, (3, 2), dilation=(1, 2), implementation="reconstructed"),
            made("tt", 10, 12, (1, 3), padding=(0, 1), bias=True),
            made("tucker", 12, 12, (1, 1)),
            made("cp", 12, 12, (3, 1), padding=(1, 0)),
        )
    tensorly.set_backend("numpy")
    return model


def test_a_model_full_of_tltorch_is_converted():
    model = tltorch_model().eval()
    model[1].requires_grad_(False)
    model.append(model[4])
    ours, x = tnc.from_tltorch(model), torch.randn(2, 3, 9, 10)
    assert [str(layer.format) for layer in ours] == ["cp", "tucker(all)", "mps", "tucker", "cp", "cp"]
    assert ours[4] is ours[5]
    assert ours.tncompress_skipped == ()
    assert not ours.training
    assert [any(p.requires_grad for p in layer.factors) for layer in ours] == [True, False, *[True] * 4]
    with pytorch_backend():
        wanted = model(x)
    assert_close(ours(x), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    assert type(model[0]).__name__ == "FactorizedConv"
    for p in ours.parameters():
        p.data.zero_()
    assert all(p.abs().sum() > 0 for p in model[0].weight.parameters())


def test_layers_of_tltorch_that_stay_are_listed():
    model = tltorch_model()
    with pytorch_backend():
        import tltorch

        model.append(tltorch.FactorizedLinear((3, 4), (2, 5), rank=0.5))
        model.append(tltorch.FactorizedConv(4, 4, (3, 3), n_layers=2, rank=0.5))
        model.append(
            tltorch.FactorizedConv(4, 4, (3, 3), factorization="dense", implementation="reconstructed")
        )
        tltorch.tensor_dropout(model[2].weight, 0.5)
    tensorly.set_backend("numpy")
    with pytest.warns(UserWarning, match="4 layers of tltorch stay as they are: '2': its factors have hooks"):
        ours = tnc.from_tltorch(model)
    assert [(skip.name, skip.kind) for skip in ours.tncompress_skipped] == [
        ("2", "FactorizedConv"),
        ("5", "FactorizedLinear"),
        ("6", "FactorizedConv"),
        ("7", "FactorizedConv"),
    ]
    assert [isinstance(m, TNConv) for m in ours] == [True, True, False, True, True, False, False, False]
    reasons = " ".join(skip.reason for skip in ours.tncompress_skipped)
    assert "a FactorizedLinear is no plain FactorizedConv" in reasons
    assert "2 convolutions share its factors" in reasons
    assert "its factorization is DenseTensor" in reasons
    with pytest.raises(ValueError, match="can't be converted: its factors have hooks"):
        tnc.from_tltorch(model[2])
    with pytest.raises(ValueError, match="Sequential holds no layer of tltorch"):
        tnc.from_tltorch(nn.Sequential(nn.Conv2d(3, 3, 3)))


# --- dtypes and the state of the libraries ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["svd", "mps", "tucker", "tucker-all", "cp"])
def test_dtypes_are_kept_bit_by_bit(name, dtype, quick_cp):
    layer = compressed(FORMATS[name], GEOMETRIES["2d"], dtype)
    assert same(tnc.from_tensornetwork(tnc.to_tensornetwork(layer), layer), layer)
    assert tnc.to_einsum(layer)().dtype == dtype
    if name != "svd":
        error, layer.rel_error = layer.rel_error, None
        assert same(tnc.from_tltorch(tnc.to_tltorch(layer)), layer)
        layer.rel_error = error
    pytest.importorskip("quimb")
    assert same(tnc.from_quimb(tnc.to_quimb(layer), layer), layer)


STATE = """
import logging, sys, warnings
import numpy, tensorly, tensornetwork, torch
import tncompress as tnc
from torch import nn

def state():
    return [
        tensornetwork.backend_contextmanager.get_default_backend(), tensorly.get_backend(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),
        numpy.get_printoptions(), numpy.geterr(), list(warnings.filters),
        sys.getrecursionlimit(), logging.getLogger().level, list(logging.getLogger().handlers),
    ]

assert not {"tltorch", "quimb"} & set(sys.modules)
tensorly.set_backend(sys.argv[1])
layer = tnc.TNConv.from_dense(nn.Conv2d(8, 16, 3), tnc.MPS(), (3, 4, 5))
dense = nn.Sequential(nn.Conv2d(8, 16, 3))
before = state()
tnc.from_tensornetwork(tnc.to_tensornetwork(layer), layer)
tnc.to_einsum(layer)()
theirs = tnc.to_tltorch(layer)
tnc.from_tltorch(nn.Sequential(theirs))
try:
    tnc.from_tltorch(dense)
except ValueError:
    pass
try:
    tnc.from_quimb(tnc.to_quimb(layer), layer)
except ImportError:
    print("no quimb")
tnc.strip(nn.Sequential(layer))
for old, new in zip(before, state(), strict=True):
    assert old == new, (old, new)
import threading
seen = []
thread = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
thread.start()
thread.join()
assert seen == [sys.argv[1]], seen
"""


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
def test_no_library_finds_its_global_state_changed(backend):
    made = subprocess.run([sys.executable, "-c", STATE, backend], capture_output=True, text=True)
    assert not made.returncode, made.stderr


def test_quimb_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "quimb", None)
    monkeypatch.setitem(sys.modules, "quimb.tensor", None)
    with pytest.raises(ImportError, match=r"quimb is not installed: pip install 'tncompress\[quimb\]'"):
        tnc.to_quimb(conv())


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = conv()
        tnc.from_tensornetwork(tnc.to_tensornetwork(layer), layer)
        tnc.from_tltorch(tnc.to_tltorch(layer))
        tnc.to_einsum(layer)()
