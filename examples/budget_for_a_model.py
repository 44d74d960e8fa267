"""Compress a model of torchvision or timm under a budget, and say what was left dense, and why.

    python examples/budget_for_a_model.py --model resnet18 --params 0.4 --macs 0.5
    python examples/budget_for_a_model.py --model timm:resnet26 --pretrained --params 0.3 --format tucker

The budget is a fraction of the whole model; how it is shared out between the layers is up to the plan. No
image is looked at, so that nothing is said of accuracy: `compress_on_photos.py` does the same with images.
Without `--pretrained` (which downloads) weights are random: sizes are then right, errors mean nothing.
"""

import argparse
from collections import defaultdict

import torch
from torch import nn

import tncompress as tnc


def build(name: str, pretrained: bool) -> nn.Module:
    """Return a model of torchvision, or of timm where the name begins so."""
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=pretrained).eval()
    import torchvision

    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None).eval()


def tell(plan: tnc.Plan) -> None:
    """Print what became of the layers: the compressed one by one, the others by their reason."""
    for layer in plan.compressed:
        ranks = " ".join(map(str, layer.ranks))
        print(f"{layer.name}: {layer.format} of ranks {ranks}, {layer.params / layer.params_dense:.0%} left")
    by_reason = defaultdict(list)
    for skip in plan.skipped:
        by_reason[skip.reason].append(skip)
    for reason, skips in by_reason.items():
        held = sum(skip.params_dense for skip in skips)
        print(f"\ndense, {held:,} parameters: {reason}")
        print("  " + ", ".join(skip.name for skip in skips))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="a name of torchvision's, or timm:NAME")
    parser.add_argument("--pretrained", action="store_true", help="with trained weights, downloaded")
    parser.add_argument("--params", type=float, help="how much of its parameters the model may keep")
    parser.add_argument("--macs", type=float, help="how much of its multiply-accumulates")
    parser.add_argument("--format", default="auto", help="svd, tucker, mps, cp, or auto for the best of them")
    parser.add_argument("--side", type=int, default=224, help="pixels of the images, on which MACs depend")
    asked = parser.parse_args(arguments)

    limits = {"params": asked.params, "macs": asked.macs}
    budget = {name: part for name, part in limits.items() if part is not None} or {"params": 0.5}
    model = build(asked.model, asked.pretrained)
    x = torch.randn(1, 3, asked.side, asked.side)

    spec = {"default": {"format": asked.format}, "budget": budget}
    plan = tnc.make_plan(model, spec, example_inputs=x, progress=True)
    tell(plan)
    small = tnc.compress(model, plan)  # a copy, of the class that the model has
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    print(f"\n{plan.budget}")
    print(f"{before:,} parameters became {after:,}; outputs have the shape {tuple(small(x).shape)}")


if __name__ == "__main__":
    main()
