"""Models and reports for tests of pages, and what reads a page as a browser would."""

from html.parser import HTMLParser

import torch
from torch import nn

import tncompress as tnc

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "{{ 7*7 }}",
    "%{x} [bold]&amp;",
    "\"'--><!--",
)
HISTORY = {
    "config": {"epochs": 2, "lr": 0.1},
    "accuracy_dense": 0.95,
    "accuracy_start": 0.5,
    "epochs": [
        {"loss": 1.0, "accuracy": 0.8, "seconds": 2.0},
        {"loss": 0.5, "accuracy": 0.94, "seconds": 2.0},
    ],
    "control": [{"loss": 0.2, "accuracy": 0.94}, {"loss": 0.1, "accuracy": 0.96}],
    "steps": [{"name": "truncated", "accuracy": 0.4, "images": 400}, {"name": "repaired", "accuracy": 0.5}],
}


def report_of(model, *, spec=None, channels=6, **told):
    """Return the report of a model and its compression, each layer cut once, at rank 2."""
    torch.manual_seed(0)
    spec = spec or {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": ["classifier"]}
    small = tnc.compress(model, spec)
    x = torch.randn(2, channels, 6, 6)
    return tnc.report(model, small, example_inputs=x, seconds=0.01, **told)


def one_layer():
    return report_of(nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 3)))


def deep(layers=200):
    """A model of so many layers, with everything told of it that can be."""
    torch.manual_seed(0)
    body = [nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(10))) for _ in range((layers - 1) // 10)]
    more = [nn.Conv2d(6, 6, 3, padding=1) for _ in range((layers - 1) % 10)]
    model = nn.Sequential(*body, *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return report_of(model, atlas=tnc.atlas(model), history=HISTORY)


def hostile():
    """A model whose layers have names that try to be more than names."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Conv2d(6, 6, 3, padding=1) for name in HOSTILE})
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            for part in self.parts.values():
                x = part(x)
            return self.last(x)

    model = Net()
    history = HISTORY | {"steps": [{"name": HOSTILE[0], "accuracy": 0.4}], "config": {HOSTILE[1]: HOSTILE[0]}}
    return report_of(model, atlas=tnc.atlas(model), history=history, source={"source": HOSTILE[1]})


class Checker(HTMLParser):
    """Sees to it that tags are closed in order, and gathers what a page links to, its ids, tags and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.text = [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
