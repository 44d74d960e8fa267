"""Take a compressed model elsewhere, as ONNX and as a module of torch's own layers, and compare them.

    python examples/export_and_compare.py --out exported

The ONNX file has a free batch size, merged cores and folded BatchNorm. The stripped module pickles and loads
where this library is not installed. The network is a small CNN, trained for a few epochs on the digits that
come with scikit-learn.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

import tncompress as tnc
from tncompress.data import load_data


def onnx_answers(path: Path, x: torch.Tensor) -> torch.Tensor:
    """Return what onnxruntime makes of a batch: nothing of torch runs."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@torch.no_grad()
def compare(out: Path, small: torch.nn.Module, x: torch.Tensor) -> None:
    """Print for each file its size, and how far its outputs are from those of the compressed model."""
    wanted = small(x)
    plain = torch.load(out / "stripped.pt", weights_only=False)
    found = {
        "small.onnx": onnx_answers(out / "small.onnx", x),
        "stripped.pt": plain(x),
        "small/model.safetensors": tnc.load(out / "small")(x),
    }
    for name, answers in found.items():
        size = (out / name).stat().st_size
        off = float((answers - wanted).abs().max() / wanted.abs().max())
        same = float((answers.argmax(1) == wanted.argmax(1)).float().mean())
        print(f"{name:>24}: {size / 1e3:6.0f} kB, off by {off:.0e}, {same:.1%} of the answers the same")
    dense = (out / "dense.safetensors").stat().st_size
    print(f"{'dense.safetensors':>24}: {dense / 1e3:6.0f} kB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("exported"), help="a folder for the files")
    parser.add_argument("--ratio", type=float, default=0.15, help="parameters that each kernel keeps")
    parser.add_argument("--epochs", type=int, default=4, help="to train the dense network")
    asked = parser.parse_args(arguments)

    data = load_data("digits")
    torch.manual_seed(0)
    source = {"source": "zoo:cnn4", "num_classes": data.num_classes, "in_channels": 1}
    model = tnc.build_model(**source)
    tnc.train_(model, data.train_loader(seed=0), {"epochs": asked.epochs, "lr": 0.1})
    small = tnc.compress(model, {"default": {"format": "tucker", "rank": {"params_ratio": asked.ratio}}})
    small = tnc.repair(small, model, data.calibration_loader(256)).eval()

    asked.out.mkdir(parents=True, exist_ok=True)
    tnc.save_weights(model, asked.out / "dense.safetensors")
    tnc.save(small, asked.out / "small", source=source, overwrite=True)  # for this library
    torch.save(tnc.strip(small), asked.out / "stripped.pt")
    tnc.export_onnx(small, asked.out / "small.onnx", data.example_input(), fused=True, fold_batchnorm=True)
    compare(asked.out, small, data.example_input(256))


if __name__ == "__main__":
    main()
