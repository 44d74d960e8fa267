"""Fine-tune a compressed model in a training loop of your own, and beside it by `tnc.finetune`.

    python examples/train_in_your_loop.py --ratio 0.05 --epochs 3

A compressed model is an ordinary module, its factors are ordinary parameters: any loop that trains the dense
model trains it, too. Leave factors out of weight decay, which pulls at them and not at the kernel that they
stand for. What `tnc.finetune` adds: a warm-up and a cosine, the dense network trained as long for comparison,
runs that go on after a kill, several GPUs. The network is a small CNN on the digits of scikit-learn.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

import tncompress as tnc
from tncompress.data import load_data


def my_loop(small: nn.Module, teacher: nn.Module, loader, epochs: int, lr: float) -> nn.Module:
    """Return a trained copy of the compressed model, which learns from labels and from the dense one."""
    small = copy.deepcopy(small).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=lr, momentum=0.9, nesterov=True)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for x, y in loader:
            with torch.no_grad():
                wanted = teacher(x).softmax(1)
            answers = small(x)
            loss = F.cross_entropy(answers, y) + F.cross_entropy(answers, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        print(f"my loop, epoch {epoch}: loss {total / len(loader):.4f}")
    return small.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=0.05, help="parameters that each kernel keeps")
    parser.add_argument("--epochs", type=int, default=3, help="of each of the two ways")
    parser.add_argument("--dense-epochs", type=int, default=5, help="to train the dense network")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of both")
    asked = parser.parse_args(arguments)

    data = load_data("digits")
    torch.manual_seed(0)
    model = tnc.build_model("zoo:cnn4", num_classes=data.num_classes, in_channels=1)
    tnc.train_(model, data.train_loader(seed=0), {"epochs": asked.dense_epochs, "lr": 0.1})
    model.eval()
    spec = {"default": {"format": "tucker", "rank": {"params_ratio": asked.ratio}}}
    small = tnc.compress(model, spec)

    mine = my_loop(small, model, data.train_loader(seed=1), asked.epochs, asked.lr)
    settings = {"epochs": asked.epochs, "lr": asked.lr}
    history = tnc.finetune(
        small, data.train_loader(seed=1), settings, teacher=model, val_loader=data.test_loader()
    )
    print(history)
    networks = {"dense": model, "compressed": small, "my loop": mine, "tnc.finetune": history.model}
    for name, network in networks.items():
        found = tnc.evaluate(network, data.test_loader())
        print(f"{name:>12}: {found.accuracy:.2%} of {found.samples} images right")


if __name__ == "__main__":
    main()
