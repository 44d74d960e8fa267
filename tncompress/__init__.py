"""Tensor-network compression of convolutional PyTorch models.

>>> import tncompress as tnc
>>> model = tnc.build_model("zoo:cnn4")
>>> spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.25}}}
>>> small = tnc.compress(model, spec)
>>> sum(p.numel() for p in small.parameters()) < 0.27 * sum(p.numel() for p in model.parameters())
True
"""

from tncompress.allocator import keep_memory
from tncompress.atlas import CutAtlas, CutRow, atlas
from tncompress.bench_table import Bench, Timing
from tncompress.benching import bench
from tncompress.calibrate import Calibration, calibrate
from tncompress.cost_model import choose_contractions_
from tncompress.cuts import Cut
from tncompress.cutting import AchievedCut, Truncation, truncate
from tncompress.diagram import Diagram, diagram_svg, draw
from tncompress.export import load, save
from tncompress.finetune import FinetuneConfig, History, finetune, train_
from tncompress.formats import CP, MPS, SVD, Format, Tucker, register_format
from tncompress.freezing import Frozen, freeze
from tncompress.geometry import ConvGeometry
from tncompress.hub import from_pretrained, push_to_hub
from tncompress.interop import (
    Einsum,
    KernelNodes,
    from_quimb,
    from_tensornetwork,
    from_tltorch,
    to_einsum,
    to_quimb,
    to_tensornetwork,
    to_tltorch,
)
from tncompress.layers import TNConv, checkpoint_activations_
from tncompress.machine import Machine
from tncompress.machine_fit import calibrate_machine
from tncompress.measure import activation_bytes, evaluate
from tncompress.onnx_export import export_onnx, quantize_onnx
from tncompress.packaged import export_aoti
from tncompress.plan import BudgetReport, LayerPlan, Plan, Skip
from tncompress.planner import make_plan
from tncompress.policies import EVBMF, Energy, Entropy, FixedRank, ParamsRatio, RankFraction, RelError
from tncompress.programs import export_program
from tncompress.progressive import progressive
from tncompress.repair import RepairReport, repair
from tncompress.report import Report, report
from tncompress.responses import Sensitivity
from tncompress.retruncation import Retruncation, retruncate
from tncompress.rounds import Progressive
from tncompress.saved import SavedModel, read_saved
from tncompress.sensitivity import quick_sensitivity, sensitivity
from tncompress.spec import Budget, Rule, Settings, Spec
from tncompress.stripping import strip
from tncompress.surgery import compress, merge
from tncompress.sweep import sweep
from tncompress.sweep_rows import Sweep
from tncompress.weights import load_weights, save_weights
from tncompress.zoo import build_model

__version__ = "0.1.0"

__all__ = [
    "CP",
    "EVBMF",
    "MPS",
    "SVD",
    "AchievedCut",
    "Bench",
    "Budget",
    "BudgetReport",
    "Calibration",
    "ConvGeometry",
    "Cut",
    "CutAtlas",
    "CutRow",
    "Diagram",
    "Einsum",
    "Energy",
    "Entropy",
    "FinetuneConfig",
    "FixedRank",
    "Format",
    "Frozen",
    "History",
    "KernelNodes",
    "LayerPlan",
    "Machine",
    "ParamsRatio",
    "Plan",
    "Progressive",
    "RankFraction",
    "RelError",
    "RepairReport",
    "Report",
    "Retruncation",
    "Rule",
    "SavedModel",
    "Sensitivity",
    "Settings",
    "Skip",
    "Spec",
    "Sweep",
    "TNConv",
    "Timing",
    "Truncation",
    "Tucker",
    "activation_bytes",
    "atlas",
    "bench",
    "build_model",
    "calibrate",
    "calibrate_machine",
    "checkpoint_activations_",
    "choose_contractions_",
    "compress",
    "diagram_svg",
    "draw",
    "evaluate",
    "export_aoti",
    "export_onnx",
    "export_program",
    "finetune",
    "freeze",
    "from_pretrained",
    "from_quimb",
    "from_tensornetwork",
    "from_tltorch",
    "keep_memory",
    "load",
    "load_weights",
    "make_plan",
    "merge",
    "progressive",
    "push_to_hub",
    "quantize_onnx",
    "quick_sensitivity",
    "read_saved",
    "register_format",
    "repair",
    "report",
    "retruncate",
    "save",
    "save_weights",
    "sensitivity",
    "strip",
    "sweep",
    "to_einsum",
    "to_quimb",
    "to_tensornetwork",
    "to_tltorch",
    "train_",
    "truncate",
]
