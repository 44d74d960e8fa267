"""How long decompositions take, beside tensorly's of the same kernels at the same ranks.

    python examples/benchmarks/decomposition_speed.py --network vgg16
    python examples/benchmarks/decomposition_speed.py --network resnet50
    python examples/benchmarks/decomposition_speed.py --cp
    python examples/benchmarks/decomposition_speed.py --compress resnet50
    python examples/benchmarks/layers_speed.py page

Each convolution of a network (weights as torchvision initialises them, seed 0) is truncated across its seven
cuts and decomposed to an MPS (tensor train) and to Tucker-2, at a quarter of its parameters; the two sides
take turns layer by layer. tensorly runs on its numpy and on its PyTorch backend, and the faster counts.
Memory is the most that the process held resident during one of them beyond before, in a run of its own, in
which malloc hands back at once what is freed (MALLOC_MMAP_THRESHOLD_=1000000).
`--cp` does the same for CP at rank 256 of kernels with 512 channels, `--compress` plans and compresses a
network with a policy on the error.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from benchmark_rows import append, machine
from torch import nn

import tncompress as tnc
from tncompress.cuts import all_cuts
from tncompress.linalg import unfold
from tncompress.threads import side_by_side

CUT, CP_RANK = 4.0, 256


def kernels_of(network):
    """Return the kernels of all convolutions of a torchvision network."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, network)(weights=None)
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]


def tasks(shape):
    """Return what is made of a kernel: formats and their ranks at a quarter of its parameters."""
    found = []
    for format in [*(tnc.SVD(str(cut)) for cut in all_cuts(4)), tnc.MPS(), tnc.Tucker()]:
        try:
            tops = format.max_ranks(shape)
        except ValueError:  # a kernel of 1x1 has nothing to cut there
            continue
        ranks, share = (1,) * len(tops), 1.0
        for step in range(64):
            share = 1 - step / 64
            ranks = format.feasible(shape, tuple(max(1, round(share * top)) for top in tops))
            if format.num_params(shape, ranks) <= math.prod(shape) / CUT:
                break
        found.append((format, ranks))
    return found


def ours(kernel, made):
    """Return the relative errors of our fits."""
    return [format.fit(kernel, ranks).rel_error for format, ranks in made]


def theirs(kernel, made):
    """Return what tensorly makes of the kernel; the errors are computed later."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker, tensor_train
    from tensorly.tenalg import svd_interface

    x = tl.tensor(kernel.numpy()) if tl.get_backend() == "numpy" else kernel
    found = []
    for format, ranks in made:
        if isinstance(format, tnc.SVD):
            rows, columns = format.groups(tuple(kernel.shape))
            matrix = x.transpose(rows + columns) if tl.get_backend() == "numpy" else x.permute(rows + columns)
            size = math.prod(kernel.shape[mode] for mode in rows)
            found.append(
                svd_interface(matrix.reshape(size, -1), n_eigenvecs=ranks[0], method="truncated_svd")
            )
        elif isinstance(format, tnc.MPS):
            groups = format.groups(tuple(kernel.shape))  # legs of size 1 are no cores of their own
            order = sum(groups, ())
            moved = x.transpose(order) if tl.get_backend() == "numpy" else x.permute(order)
            sizes = [math.prod(kernel.shape[mode] for mode in group) for group in groups]
            found.append(tensor_train(moved.reshape(sizes), (1, *ranks, 1)))
        elif len(ranks) == 1:  # Tucker of a matrix
            matrix = x.reshape(x.shape[0], -1)
            found.append(svd_interface(matrix, n_eigenvecs=ranks[0], method="truncated_svd"))
        else:
            found.append(partial_tucker(x, rank=[ranks[1], ranks[0]], modes=[0, 1], init="svd")[0])
    return found


def errors_of(kernel, made, found):
    """Return the relative errors of what tensorly made, in float64."""
    import tensorly as tl

    errors = []
    for (format, ranks), value in zip(made, found, strict=True):
        if isinstance(format, tnc.SVD) or (len(ranks) == 1 and not isinstance(format, tnc.MPS)):
            u, s, vh = (torch.as_tensor(part).double() for part in value)
            rows = format.groups(tuple(kernel.shape))[0] if isinstance(format, tnc.SVD) else (0,)
            wanted, built = unfold(kernel.double(), rows), (u * s) @ vh
        elif isinstance(format, tnc.MPS):
            order = sum(format.groups(tuple(kernel.shape)), ())
            wanted = kernel.double().permute(order)
            built = torch.as_tensor(tl.tt_to_tensor(value)).double()
        else:
            core, (out, into) = (torch.as_tensor(value[0]).double(), value[1])
            out, into = torch.as_tensor(out).double(), torch.as_tensor(into).double()
            wanted, built = kernel.double(), torch.einsum("abhw,oa,ib->oihw", core, out, into)
        errors.append(float((wanted - built.reshape(wanted.shape)).norm() / wanted.norm()))
    return errors


def measure(network):
    """Return the seconds of both sides and how far apart their errors are."""
    import tensorly as tl

    kernels = kernels_of(network)
    work = [(kernel, tasks(tuple(kernel.shape))) for kernel in kernels]
    ours(*work[0])
    seconds = {"tensorly numpy": 0.0, "tensorly pytorch": 0.0, "in turn": 0.0}
    worst, by_format = 0.0, {}
    for kernel, made in work:
        begun = time.perf_counter()
        errors = ours(kernel, made)
        seconds["in turn"] += time.perf_counter() - begun
        for backend in ("numpy", "pytorch"):
            with tl.backend_context(backend):
                begun = time.perf_counter()
                found = theirs(kernel, made)
                seconds[f"tensorly {backend}"] += time.perf_counter() - begun
                other = errors_of(kernel, made, found) if backend == "numpy" else None
            for (format, _), mine, their in zip(made, errors, other or [], strict=False):
                gap = (mine - their) / max(their, 1e-12)
                worst = max(worst, gap)
                by_format.setdefault(format.name, []).append(gap)
    order = sorted(work, key=lambda each: -each[0].numel())
    begun = time.perf_counter()
    side_by_side(lambda each: ours(*each), order)
    seconds["ours"] = time.perf_counter() - begun
    return {
        "kind": "decomposition",
        "network": network,
        "layers": len(kernels),
        "seconds": seconds,
        "largest": max(k.numel() * 4 for k in kernels),
        "worst_excess": worst,
        "mean_excess": {name: sum(gaps) / len(gaps) for name, gaps in by_format.items()},
    }


def measure_memory(network):
    """Return the most bytes that any decomposition of a kernel takes beyond what was there before it."""
    kernels, most = kernels_of(network), 0
    small = torch.randn(256, 256, 3, 3)
    ours(small, tasks(tuple(small.shape)))  # what libraries take once
    for kernel in kernels:
        for task in tasks(tuple(kernel.shape)):
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
            before = resident("VmRSS")
            ours(kernel, [task])
            most = max(most, resident("VmHWM") - before)
    return most


def resident(field):
    """Return a field of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure_cp(sweeps=100):
    """Return seconds and errors of CP at one rank: ours, and tensorly's after the same number of sweeps."""
    import tensorly as tl
    from tensorly.decomposition import parafac

    torch.manual_seed(0)
    kernel = nn.Conv2d(512, 512, 3).weight.detach()
    begun = time.perf_counter()
    fit = tnc.CP().fit(kernel, (CP_RANK,))
    seconds, errors = {"ours": time.perf_counter() - begun}, {"ours": fit.rel_error}
    with tl.backend_context("pytorch"):
        for name, options in {
            "svd": {"init": "svd"},
            "random": {"init": "random", "random_state": 0},
        }.items():
            begun = time.perf_counter()
            found = parafac(kernel, CP_RANK, n_iter_max=sweeps, tol=1e-6, **options)
            seconds[f"tensorly {name}"] = time.perf_counter() - begun
            built = tl.cp_to_tensor(found)
            errors[f"tensorly {name}"] = float((kernel - built).norm() / kernel.norm())
    return {"kind": "cp", "rank": CP_RANK, "seconds": seconds, "errors": errors}


def measure_compress(network, rel_error):
    """Return the seconds of planning and of compressing a network with a policy on the error."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, network)(weights=None).eval()
    found = {}
    for format in ("svd", "tucker", "mps"):
        spec = {"default": {"format": format, "rank": {"rel_error": rel_error}}}
        begun = time.perf_counter()
        plan = tnc.make_plan(model, spec)
        planned = time.perf_counter()
        tnc.compress(model, plan)
        found[format] = {"plan": planned - begun, "compress": time.perf_counter() - planned}
    return {"kind": "compress", "network": network, "rel_error": rel_error, "seconds": found}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", help="one of torchvision's: its kernels across all cuts, MPS, Tucker-2")
    parser.add_argument("--cp", action="store_true")
    parser.add_argument("--compress", metavar="NETWORK")
    parser.add_argument("--rel-error", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry", action="store_true", help="print the rows only")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(options.memory))
        return
    rows = []
    if options.network:
        rows.append(measure(options.network))
        command = [sys.executable, __file__, "--memory", options.network, "--threads", str(options.threads)]
        freeing = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=freeing)
        rows[-1]["memory"] = int(done.stdout)
    if options.cp:
        rows.append(measure_cp())
    if options.compress:
        rows.append(measure_compress(options.compress, options.rel_error))
    for row in rows:
        print(json.dumps(row, indent=1))
        if not options.dry:
            append(row | {"machine": machine(options.threads)})


if __name__ == "__main__":
    main()
