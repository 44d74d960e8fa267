"""Measure what a compressed model is worth elsewhere: sizes on disk, agreement, onnxruntime, loading.

    python examples/deployment.py                      # all of it: docs/deployment.jsonl, docs/deployment.md
    python examples/deployment.py --parts sizes load   # some of it
    python examples/deployment.py --small --results trial.jsonl --page trial.md

`sizes` writes a ResNet-18 whose stages are in four formats, and the dense one, in every form there is, and
compares the outputs, `formats` the same in each format by itself; `backbone` does so for the backbone of
torchvision's Faster R-CNN. `latency` times a ResNet-50 and its compressed form in onnxruntime, in turns;
`load` loads a saved model of 100 MB in a process of its own. Rows are appended; the page shows the last one
of each kind. Weights are random: neither sizes nor times depend on them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import deployment_page
import numpy as np
import torch

import tncompress as tnc
from tncompress.noise import device_name
from tncompress.onnx_export import session
from tncompress.programs import relative_error
from tncompress.targets import Wanted, export_to
from tncompress.timing import samples_in_turns

DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("sizes", "formats", "backbone", "latency", "load")
MIXED = {
    "default": {"format": "mps", "rank": {"params_ratio": 0.25}},
    "rules": [
        {"pattern": "*layer1.*", "format": "cp"},
        {"pattern": "*layer2.*", "format": {"name": "svd", "cut": "out kw|in kh"}},
        {"pattern": "*layer3.*", "format": "tucker"},
    ],
}
FORMATS = ("svd", "tucker", "mps", "cp")
BACKBONE = {
    "default": {"format": "tucker", "rank": {"params_ratio": 0.3}},
    "rules": [
        {"pattern": "*layer3.*", "format": "mps"},
        {"pattern": "fpn.*", "format": {"name": "svd", "cut": "out kw|in kh"}},
    ],
}
FRESH = """
import sys, torch, tncompress as tnc
torch.set_num_threads(int(sys.argv[2]))
onto, x = torch.load(sys.argv[1] + "/onto.pt", weights_only=False)
with torch.no_grad():
    torch.save(dict(y=tnc.load(sys.argv[1] + "/saved", onto)(x)), sys.argv[1] + "/y.pt")
"""
LOADING = """
import sys, time, json, torch, torchvision, tncompress as tnc
torch.set_num_threads(1)
tnc.build_model("zoo:cnn4")
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before, begun = peak(), time.perf_counter()
model = tnc.load(sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - begun, "memory": peak() - before}))
"""


def machine():
    """Return what the numbers were measured on."""
    import onnxruntime

    return {
        "date": str(date.today()),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": f"{device_name()}, {torch.get_num_threads()} threads",
    }


def with_statistics(model, x):
    """Return the model in eval mode, with BatchNorm statistics of random images: outputs of usual size."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def forms(model, example, folder, *, compressed, plain):
    """Yield every form that a model is written in: its name, bytes, and how far its output is off."""
    batches = [torch.randn_like(example) for _ in range(4)]
    asked = {
        "torch.export": ("torch-export", {}),
        "ONNX": ("onnx", {}),
        "ONNX, fused and folded": ("onnx", {"fused": compressed, "fold_batchnorm": True}),
        "ONNX, int8": (
            "onnx",
            {"fused": compressed, "fold_batchnorm": True, "int8": "static", "batches": batches},
        ),
    }
    if not plain:
        asked = {name: asked[name] for name in ("torch.export", "ONNX")}
    if compressed:
        asked = {"stripped": ("strip", {}), "merged": ("merged", {}), **asked}
    for name, (to, options) in asked.items():
        place, begun = folder / name.replace(" ", "-"), time.perf_counter()
        facts = export_to(to, Wanted(model, place, example, **options))
        off = facts.get("int8_difference", facts["relative_difference"])
        yield name, place.stat().st_size, off, time.perf_counter() - begun


def sizes(name, dense, spec, example, *, kind="compressed", source=None, plain=True):
    """Yield a row for each form of the dense model, unless a format is the kind, and of the compressed."""
    small = tnc.compress(dense, spec, example_inputs=example)
    models = {"dense": dense, kind: small} if kind == "compressed" else {kind: small}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for each, model in models.items():
            own = folder / each
            own.mkdir()
            if each == "dense":
                tnc.save_weights(model, own / "w.safetensors")
                yield row("sizes", name, each, "saved", (own / "w.safetensors").stat().st_size, 0.0, 0.0)
            else:
                begun = time.perf_counter()
                tnc.save(model, own / "saved", source=source, input_shape=tuple(example.shape[1:]))
                size = sum(path.stat().st_size for path in (own / "saved").iterdir())
                took = time.perf_counter() - begun
                yield row("sizes", name, each, "saved", size, loaded_off(own, model, dense, example), took)
            compressed = each != "dense"
            for form, size, off, took in forms(model, example, own, compressed=compressed, plain=plain):
                yield row("sizes", name, each, form, size, off, took)


def loaded_off(folder, model, dense, example):
    """Return how far a model is off that a fresh process loads: built there, or onto the dense one."""
    with torch.no_grad():
        wanted = model(example)
    onto = dense if tnc.read_saved(folder / "saved").source is None else None
    torch.save((onto, example), folder / "onto.pt")
    command = [sys.executable, "-c", FRESH, str(folder), str(torch.get_num_threads())]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    return relative_error(torch.load(folder / "y.pt")["y"], wanted)


def row(part, model, kind, form, size, off, took):
    """Return a row of sizes."""
    found = {
        "part": part,
        "model": model,
        "kind": kind,
        "form": form,
        "bytes": size,
        "difference": float(off),
    }
    return {**found, "seconds": round(took, 2), **machine()}


def latency(name, *, side, batch, times, rounds):
    """Return seconds of a forward pass in onnxruntime, dense and compressed, measured in turns."""
    x = torch.randn(batch, 3, side, side)
    dense = with_statistics(tnc.build_model(f"torchvision:{name}"), x)
    spec = {"default": {"format": "svd", "round_to": 16}, "budget": {"macs": 1 / times}}
    small = tnc.compress(dense, spec, example_inputs=x[:1])
    unrounded = tnc.compress(dense, spec | {"default": {"format": "svd"}}, example_inputs=x[:1])
    plan = small.tncompress_plan
    forms = {
        "dense": (dense, False),
        "chain": (small, False),
        "fused": (small, True),
        "chain, ranks not rounded": (unrounded, False),
    }
    runs, errors = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for form, (model, fused) in forms.items():
            path = Path(place) / f"{form}.onnx"
            errors[form] = tnc.export_onnx(model, path, x, fused=fused, fold_batchnorm=True)
            runs[form] = session(path, torch.get_num_threads())
        for form in ("dense", "fused"):
            path, own = Path(place) / f"{form}.onnx", f"{form}, int8"
            tnc.quantize_onnx(path, path.with_stem(own), [torch.randn_like(x) for _ in range(4)])
            runs[own] = session(path.with_stem(own), torch.get_num_threads())
            found, exact = (runs[name].run(None, {"input": x.numpy()})[0] for name in (own, form))
            errors[own] = float(relative_error(torch.from_numpy(found), torch.from_numpy(exact)))
        calls = [partial(run.run, None, {"input": x.numpy()}) for run in runs.values()]
        seconds = dict(zip(runs, samples_in_turns(calls, seconds=0.0, rounds=rounds), strict=True))
    quartiles = {form: np.percentile(found, (25, 50, 75)).tolist() for form, found in seconds.items()}
    return {
        "part": "latency",
        "model": name,
        "batch": batch,
        "side": side,
        "macs_times": plan.macs_dense / plan.macs,
        "least": {form: min(found) for form, found in seconds.items()},
        "quartiles": quartiles,
        "differences": errors,
        **machine(),
    }


def load(megabytes):
    """Return seconds and memory that it takes to load a saved VGG-16 of about so many megabytes."""
    model = tnc.build_model("torchvision:vgg16").eval()
    fixed = int(64 * megabytes / 100)
    rules = [
        {"pattern": "classifier.0", "format": "svd", "rank": {"fixed": 10 * fixed}},
        {"pattern": "classifier.3", "format": "svd", "rank": {"fixed": 2 * fixed}},
    ]
    spec = {"default": {"format": "svd", "rank": {"fixed": fixed}}, "rules": rules}
    small = tnc.compress(model, spec)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "m"
        tnc.save(small, folder, source={"source": "torchvision:vgg16"}, input_shape=(3, 224, 224))
        size = (folder / "model.safetensors").stat().st_size
        lines = [
            subprocess.run([sys.executable, "-c", LOADING, str(folder)], check=True, capture_output=True)
            for _ in range(3)
        ]
    found = [json.loads(line.stdout) for line in lines]
    seconds, memory = (sorted(each[key] for each in found) for key in ("seconds", "memory"))
    dense = 4 * sum(p.numel() for p in model.parameters())
    last = {"seconds": seconds[0], "slowest": seconds[-1], "memory": memory[-1], "times": memory[-1] / size}
    return {"part": "load", "model": "vgg16", "bytes": size, "dense_bytes": dense, **last, **machine()}


def backbone_of(small):
    """Return the backbone of a detection model of torchvision, and an input of it."""
    from torchvision.models import detection

    make = detection.fasterrcnn_mobilenet_v3_large_320_fpn if small else detection.fasterrcnn_resnet50_fpn
    torch.manual_seed(0)
    side = 64 if small else 256
    return make(weights=None, weights_backbone=None).backbone.eval(), torch.randn(2, 3, side, side)


def measure(part, small):
    """Yield the rows of one part."""
    torch.manual_seed(0)
    if part in ("sizes", "formats"):
        x = torch.randn(4, 3, 64 if small else 224, 64 if small else 224)
        source = {"source": "torchvision:resnet18"}
        dense = with_statistics(tnc.build_model(**source), x)
        kept = {"keep_dense": ["stem", "classifier", *(["layer[34].*"] if small else [])]}
        if part == "sizes":
            yield from sizes("resnet18", dense, MIXED | kept, x, source=source)
        for name in FORMATS if part == "formats" else ():
            spec = {"default": {"format": name, "rank": {"params_ratio": 0.25}}, **kept}
            yield from sizes("resnet18", dense, spec, x, kind=name, source=source, plain=False)
    elif part == "backbone":
        dense, x = backbone_of(small)
        yield from sizes("Faster R-CNN backbone", dense, BACKBONE if not small else {}, x, plain=False)
    elif part == "latency":
        how = {"side": 32, "batch": 2, "rounds": 2} if small else {"side": 224, "batch": 8, "rounds": 20}
        yield latency("resnet18" if small else "resnet50", times=3.4, **how)
    elif part == "load":
        yield load(20 if small else 100)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--small", action="store_true", help="small models and images: a trial")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=DOCS / "deployment.jsonl")
    parser.add_argument("--page", type=Path, default=DOCS / "deployment.md")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    for part in asked.parts:
        for found in measure(part, asked.small):
            with asked.results.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), file=sys.stderr)
    asked.page.write_text(deployment_page.page(asked.results))


if __name__ == "__main__":
    main()
