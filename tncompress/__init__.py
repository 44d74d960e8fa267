"""Tensor-network compression of convolutional PyTorch models.

>>> import tncompress as tnc
>>> model = tnc.build_model("zoo:cnn4")
>>> spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.25}}}
>>> small = tnc.compress(model, spec)
>>> sum(p.numel() for p in small.parameters()) < 0.27 * sum(p.numel() for p in model.parameters())
True
"""

from tncompress.formats import CP, MPS, SVD, Format, Tucker, register_format
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.planner import make_plan
from tncompress.spec import Energy, FixedRank, ParamsRatio, RelError, Rule, Settings, Spec
from tncompress.surgery import compress, merge
from tncompress.zoo import build_model

__all__ = [
    "CP",
    "MPS",
    "SVD",
    "ConvGeometry",
    "Energy",
    "FixedRank",
    "Format",
    "LayerPlan",
    "ParamsRatio",
    "Plan",
    "RelError",
    "Rule",
    "Settings",
    "Skip",
    "Spec",
    "TNConv",
    "Tucker",
    "build_model",
    "compress",
    "make_plan",
    "merge",
    "register_format",
]
