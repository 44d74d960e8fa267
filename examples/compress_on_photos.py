"""Compress a network for images of your own: calibrate, share out a budget, repair. Nothing is trained.

    python examples/compress_on_photos.py photos --weights photos.safetensors --out photos-small

In `photos` lie train/ and val/, and in each of them a folder of images for each class. The weights are those
of a network that knows these classes (docs/howto/own-images.md trains one). Calibration and repair look at
images without their labels; labels are there to measure accuracies.
"""

import argparse
from pathlib import Path

import tncompress as tnc
from tncompress.data import load_data


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="the folder of images")
    parser.add_argument("--model", default="torchvision:resnet18", help="or FILE.py:FACTORY")
    parser.add_argument("--weights", type=Path, required=True, help=".safetensors, or a state dict in .pth")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the compressed model")
    parser.add_argument("--params", type=float, default=0.4, help="how much of its parameters may stay")
    parser.add_argument("--macs", type=float, default=0.5, help="how much of its multiply-accumulates")
    parser.add_argument("--images", type=int, default=512, help="how many to calibrate and repair on")
    parser.add_argument("--side", type=int, default=224, help="pixels that images are cut to")
    asked = parser.parse_args(arguments)

    data = load_data(f"imagefolder:{asked.photos}", image_size=asked.side)
    source = {"source": asked.model, "num_classes": data.num_classes}
    model = tnc.build_model(**source).eval()
    tnc.load_weights(model, asked.weights)

    images = [x for x, _ in data.calibration_loader(asked.images, batch_size=32)]
    moments = tnc.calibrate(model, images)  # what each layer is given: errors are those of its outputs
    spec = {"default": {"format": "auto"}, "budget": {"params": asked.params, "macs": asked.macs}}
    small = tnc.compress(model, spec, calibration=moments, example_inputs=data.example_input())
    print(small.tncompress_plan)

    repaired = tnc.repair(small, model, images)
    print(repaired.tncompress_repair)
    for name, network in {"dense": model, "truncated": small, "repaired": repaired}.items():
        found = tnc.evaluate(network, data.test_loader(32))
        print(f"{name:>10}: {found.accuracy:.2%} of {found.samples} images right")

    tnc.save(repaired, asked.out, source=source, dense_weights=asked.weights, input_shape=data.input_shape)
    print(f"saved; more of it: tncompress report {asked.out} --data imagefolder:{asked.photos}")


if __name__ == "__main__":
    main()
