"""Plan, compress and run every model of torchvision, and one of each family of timm where it is installed.

    python examples/zoo_table.py                         # plans alone, on the meta device: a minute
    python examples/zoo_table.py --run results.jsonl     # also compresses and runs each model, in each format

Weights are random. A run takes hours for all models; it is resumed by the same command, takes small models
first, and stops after --minutes. The table goes to docs/zoo.md.
"""

import argparse
import json
import math
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import tncompress as tnc
from tncompress.discovery import find_layers
from tncompress.measure import num_params
from tncompress.report import environment
from tncompress.running import eval_mode
from tncompress.tables import count, markdown_table

FORMATS = ("svd", "mps", "tucker", "cp")
FAMILIES = ("classification", "segmentation", "detection", "video", "optical flow")
REASONS = {  # how a reason is shortened in the table
    "stem": r"^the stem",
    "classifier": r"^the classifier",
    "depthwise": r"^depthwise",
    "subclass": r"^a subclass of \w+ \(",
    "own forward": r"^a subclass of \w+ with",
    "parametrized": r"^its weight is parametrized",
    "too small": r"^the smallest ranks",
    "more MACs": r"x the (dense|present) MACs",
    "nothing to cut": r"nothing to cut|leaves one side",
    "shared": r"is shared with",
    "extra state": r"^it holds",
}


def spec_of(name, **changes):
    """Return the spec that the table is made with: a quarter of each layer's parameters."""
    return {"default": {"format": name, "rank": {"params_ratio": 0.25}}} | changes


def torchvision_models():
    """Return (family, name) of every model of torchvision but the quantized ones."""
    from torchvision import models

    rooms = (models, models.segmentation, models.detection, models.video, models.optical_flow)
    return [
        (family, name)
        for family, room in zip(FAMILIES, rooms, strict=True)
        for name in models.list_models(module=room)
    ]


def timm_models():
    """Return ("timm", name) of the first model of each of timm's families; none where it is not installed."""
    try:
        import timm
    except ImportError:
        return []
    return [
        ("timm", names[0]) for module in timm.list_modules() if (names := timm.list_models(module=module))
    ]


def label(family, name):
    """Return the name under which results are kept: timm and torchvision share some."""
    return f"timm/{name}" if family == "timm" else name


def build(family, name):
    """Return the model with random weights, in eval mode; detection models take images as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "timm":
            import timm

            return timm.create_model(name, pretrained=False).eval()
        from torchvision.models import get_model

        options = {"weights": None}
        if family in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if family == "detection" and not name.startswith("ssd"):
            options |= {"min_size": 256, "max_size": 320}
        return get_model(name, **options).eval()


def build_meta(family, name):
    """Return the model without weights, which are made and thrown away only where there is no other way."""
    try:
        with torch.device("meta"):
            return build(family, name)
    except (NotImplementedError, RuntimeError):  # some initialisations read what they wrote
        return build(family, name).to("meta")


def inputs(family, name, model, dtype=torch.float32):
    """Return example inputs, a tuple of arguments."""
    if family == "timm":
        return (torch.randn(1, *model.default_cfg["input_size"], dtype=dtype),)
    if family == "detection":
        return ([torch.rand(3, 256, 320, dtype=dtype)],)
    if family == "video":
        side = 112 if name.endswith("_18") else 224
        return (torch.randn(1, 3, 16, side, side, dtype=dtype),)
    if family == "optical flow":
        return tuple(torch.randn(1, 3, 128, 136, dtype=dtype) for _ in range(2))
    return (torch.randn(1, 3, 224, 224, dtype=dtype),)


def outputs(model, example):
    """Return the tensors that the model puts out."""
    with eval_mode(model):
        return [leaf for leaf in tree_leaves(model(*example)) if isinstance(leaf, torch.Tensor)]


def plans(model):
    """Return the plan in each format, and check that it speaks of every layer."""
    found = {name: tnc.make_plan(model, spec_of(name)) for name in FORMATS}
    dense = (nn.Linear, nn.modules.conv._ConvNd)
    names = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, dense)}
    for plan in found.values():
        assert {name for layer in plan.layers for name in layer.names} == names
        assert all(skip.reason for skip in plan.skipped)
    return found


def check_layers(small, dense):
    """Check each layer's promise against the dense weight; return the largest term of CP, in kernel norms."""
    largest = 0.0
    for planned in small.tncompress_plan.compressed:
        layer, weight = small.get_submodule(planned.name), dense.get_submodule(planned.name).weight.detach()
        assert layer.ranks == planned.ranks
        error = float((layer.weight.detach() - weight).norm() / weight.norm())
        assert abs(error - planned.rel_error) <= 1e-3 * planned.rel_error + 1e-5, (planned, error)
        for factor in layer.factors:
            assert bool(factor.isfinite().all()), planned
        if planned.format.name == "cp":
            largest = max(
                largest, largest_term(layer.format, layer.tensors(), layer.geometry.kernels(weight))
            )
    return largest


def largest_term(format, factors, kernels):
    """Return the norm of the largest product term of CP factors, in norms of the kernel it belongs to."""
    norms = torch.ones(1)
    for legs, factor in zip(format.network(tuple(kernels.shape[1:])), factors, strict=True):
        stacked = factor.detach().double().reshape(len(kernels), *factor.shape[-len(legs) :])
        norms = norms * stacked.movedim(1 + legs.index("r0"), 1).flatten(2).norm(dim=2)
    return float((norms / kernels.double().flatten(1).norm(dim=1, keepdim=True)).max())


def kernel_shapes(models):
    """Return (groups, out, in, *spatial) of every kernel with a window and channels to cut, each once."""
    found = set()
    for family, name in models:
        for layer in find_layers(build_meta(family, name)):
            groups, shape = layer.geometry.groups, layer.geometry.kernel_shape
            if max(shape[:2]) > 1 and max(shape[2:], default=1) > 1:
                found.add((groups, *shape))
    return sorted(found, key=math.prod)


def run(family, name, format):
    """Compress the model in one format and run it; return what the table says of it."""
    torch.manual_seed(0)
    model = build(family, name)
    example = inputs(family, name, model)
    start = time.perf_counter()
    small = tnc.compress(model, spec_of(format))
    seconds = time.perf_counter() - start
    assert num_params(small) == small.tncompress_plan.params
    term = check_layers(small, model)
    found = outputs(small, example)
    assert found
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    return {
        "seconds": round(seconds, 2),
        "layers": len(small.tncompress_plan.compressed),
        "largest_term": term,
    }


def run_all(models, formats, results, minutes):
    """Run what ``results`` does not hold yet, small models first; append to it as they end."""
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(row["model"], row["format"]): row for row in map(json.loads, lines)}
    sizes = {model: num_params(build_meta(*model)) for model in models}
    end = time.monotonic() + 60 * minutes
    for family, name in sorted(models, key=sizes.get):
        for format in formats:
            if (label(family, name), format) in done or time.monotonic() > end:
                continue
            row = {"model": label(family, name), "format": format}
            try:
                row |= run(family, name, format)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            done[row["model"], format] = row
            print(row, flush=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return done


def shortened(reason):
    """Return the table's word for a reason."""
    return next((word for word, pattern in REASONS.items() if re.search(pattern, reason)), reason)


def table_row(family, name, done):
    """Return the cells of one model."""
    found = plans(build_meta(family, name))
    plan = found["mps"]
    reasons = Counter(shortened(skip.reason) for skip in plan.skipped)
    why = ", ".join(f"{n} {word}" if n > 1 else word for word, n in reasons.most_common())
    ran = [format for format in FORMATS if "seconds" in done.get((label(family, name), format), {})]
    return (
        name,
        str(len(plan.layers)),
        " ".join(str(len(found[format].compressed)) for format in FORMATS),
        why,
        count(plan.params_model),
        " ".join(count(found[format].params).replace(" ", "") for format in FORMATS),
        "all" if len(ran) == len(FORMATS) else " ".join(ran),
    )


def page(models, done):
    """Return the documentation page."""
    head = ("model", "layers", "compressed", "left dense, and why (mps)", "parameters", "after", "run in")
    parts = []
    for family in (*FAMILIES, "timm"):
        rows = [table_row(*model, done) for model in models if model[0] == family]
        if rows:
            parts += [f"## {family.capitalize() if family != 'timm' else 'timm'}", markdown_table(head, rows)]
    terms = [row["largest_term"] for row in done.values() if row.get("largest_term")]
    trust = (
        f"The largest term of a CP layer has {max(terms):.2f} times the norm of its kernel." if terms else ""
    )
    versions = ", ".join(f"{key} {value}" for key, value in environment().items())
    return "\n\n".join(filter(None, [INTRODUCTION.strip(), trust, *parts, f"Made with {versions}."])) + "\n"


INTRODUCTION = """
# The model zoo

What `compress` does to every model of torchvision, and to one model of each family of timm, with
`{default: {format: F, rank: {params_ratio: 0.25}}}`: the number of convolutions and linear layers that it
sees, how many it compresses as svd, mps, tucker, cp (four numbers), why it leaves the others dense, and the
parameters of the whole model before and after (four numbers again). *Run in* names the formats in which the
model, with random weights, was also compressed and run, each layer's error checked against its plan. The page
is written by

```console
python examples/zoo_table.py --run results.jsonl
```

*stem*, *classifier*: the first and the last layer, kept dense by default. *depthwise*: no channels to cut
between; *subclass*: a subclass of torch's layer (both are compressed if `include` says so). *own forward*: a
subclass that computes something else. *too small*: even the smallest ranks hold more than a quarter of the
parameters. *more MACs*: the chain would need more multiply-accumulates than the dense layer.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, metavar="FILE", help="compress and run, results in FILE (.jsonl)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="formats to run in")
    parser.add_argument("--minutes", type=float, default=10_000, help="stop running models after this long")
    parser.add_argument("--only", default="", help="a regular expression on the models' names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "zoo.md")
    options = parser.parse_args()
    models = [m for m in torchvision_models() + timm_models() if re.search(options.only, m[1])]
    done = run_all(models, options.formats, options.run, options.minutes) if options.run else {}
    options.out.write_text(page(models, done))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
