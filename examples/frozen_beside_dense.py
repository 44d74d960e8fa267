"""Freeze a compressed model for inference, and measure it beside the dense one, which is frozen, too.

    python examples/frozen_beside_dense.py --model torchvision:resnet18 --batch 8

`tnc.freeze` measures how each layer runs best, folds BatchNorm, packs weights and returns the fastest of the
models that it made. `tnc.bench` runs all variants in turns, so that what else the machine does hits all of
them alike. Weights do not change speed: they are random here, and there is no accuracy to look at.
"""

import argparse

import torch

import tncompress as tnc


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="torchvision:resnet18", help="or zoo:NAME, FILE.py:FACTORY")
    parser.add_argument("--format", default="tucker", help="svd, tucker, mps or cp")
    parser.add_argument("--ratio", type=float, default=0.25, help="parameters that each kernel keeps")
    parser.add_argument("--input", default="3x224x224", help="the shape of one image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the table")
    asked = parser.parse_args(arguments)

    torch.manual_seed(0)
    x = torch.randn(asked.batch, *map(int, asked.input.split("x")))
    model = tnc.build_model(asked.model).eval()
    spec = {"default": {"format": asked.format, "rank": {"params_ratio": asked.ratio}}}
    small = tnc.compress(model, spec, example_inputs=x[:1])
    print(small.tncompress_plan)

    fast = tnc.freeze(small, x, seconds=asked.seconds)  # to be used like the model: fast(x)
    print(f"frozen: {fast.way}; outputs off by {fast.rel_error:.1e}")
    for layer in fast.layers:
        print(f"  {layer.name}: {'dense again' if layer.contraction == 'kernel' else layer.contraction}")
    print(tnc.bench(model, small, example_inputs=x, ways=["eager", "frozen"], seconds=asked.seconds))


if __name__ == "__main__":
    main()
