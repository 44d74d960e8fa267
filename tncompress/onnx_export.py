"""A model as ONNX: checked against torch, with weights merged and BatchNorm folded if wanted, and in int8."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tncompress.cost_model import choose_contractions_
from tncompress.discovery import refuse_wrapped
from tncompress.freezing import frozen_graph
from tncompress.programs import relative_error
from tncompress.running import call_model, copy_model, eval_mode
from tncompress.storage import new_file
from tncompress.textfiles import one_line

PROVIDERS = ["CPUExecutionProvider"]
MOST_IMAGES = 512
"""Of how many images at most the ranges of activations are taken, 32 of them at a time."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor,
    *,
    fused: bool = False,
    fold_batchnorm: bool = False,
    tolerance: float = 1e-4,
    overwrite: bool = True,
) -> float:
    """Write ``model`` as ONNX with a dynamic batch axis; return how far onnxruntime's outputs are off.

    With ``fused`` each layer runs as the contraction that takes the least time by the model of the machine
    (:func:`tncompress.choose_contractions_`): neighbouring cores are merged into one convolution where that
    pays, and the merged weights are what the file holds. Without it a layer is exported as it runs. With
    ``fold_batchnorm`` the statistics and weights of each BatchNorm become part of the convolution before it.
    Both need a model that ``torch.fx`` can follow, else they are a ``ValueError``.

    The file is checked by ``onnx.checker`` and run by onnxruntime on a batch of another size than it was
    traced with. An output that differs by more than ``tolerance``, relative to its largest value, is a
    ``ValueError``, and no file is left. Nested outputs come in their order.
    """
    import onnx

    refuse_wrapped(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = example_inputs.to(device)
    traced, other = (torch.cat([example] * 3)[:size] for size in (2, 3))
    batch = torch.export.Dim("batch", min=1)
    with new_file(path, overwrite=overwrite) as fresh, eval_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = call_model(model, other)
        count = len(tree_leaves(wanted))
        torch.onnx.export(
            _prepared(model, traced, fused=fused, fold_batchnorm=fold_batchnorm),
            (traced,),
            str(fresh),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["input"],
            output_names=["output"] if count == 1 else [f"output{i}" for i in range(count)],
            external_data=False,
            verbose=False,
        )
        onnx.checker.check_model(str(fresh))
        error = _onnx_error(fresh, other, wanted)
        if not error <= tolerance:
            raise ValueError(f"the ONNX model's output is off by {error:.2g}, wanted at most {tolerance:.2g}")
    return error


def _prepared(model: nn.Module, example: Tensor, *, fused: bool, fold_batchnorm: bool) -> nn.Module:
    """Return ``model``, or a copy whose weights are merged and folded beforehand."""
    if not (fused or fold_batchnorm):
        return model
    target = copy_model(model).eval().requires_grad_(False)
    if fused:
        choose_contractions_(target, example, by="model")
    graph = frozen_graph(target, pack=False, fold_after=fold_batchnorm)
    if graph is None:
        asked = " and ".join(
            name for name, on in (("fused", fused), ("fold_batchnorm", fold_batchnorm)) if on
        )
        raise ValueError(f"torch.fx can't follow {type(model).__name__}, as {asked} needs: export it without")
    return graph


def quantize_onnx(
    path: str | Path,
    out: str | Path,
    batches: Iterable[Any] | None = None,
    *,
    kind: Literal["dynamic", "static"] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the ONNX model at ``path`` in int8 to ``out``, by onnxruntime, and return its path.

    ``static`` takes the ranges of activations from ``batches`` of inputs (tensors, or tuples that begin with
    one; up to 512 images), and is what convolutions want; ``dynamic`` takes them anew from every input. The
    default is static where there are batches; weights then have a scale for each output channel, and 7 bits,
    since sums of products of 8 saturate on x86 processors without VNNI. What the rounding costs in accuracy
    depends on the model: measure it.
    """
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kind = kind or ("static" if batches is not None else "dynamic")
    if kind not in ("static", "dynamic"):
        raise ValueError(f"wanted the kind static or dynamic, got {kind!r}")
    if kind == "static" and batches is None:
        raise ValueError("static quantization takes the ranges of activations from data: give batches")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no ONNX file {path}")
    with new_file(out, overwrite=overwrite) as fresh:
        ready = fresh.with_name("ready.onnx")
        try:
            quant_pre_process(str(path), str(ready))
            if kind == "dynamic":
                q.quantize_dynamic(str(ready), str(fresh), weight_type=q.QuantType.QUInt8)
            else:
                assert batches is not None
                reader = _Reader(path, batches)
                # weights of 7 bits: pairs of products of 8 saturate on x86 processors without VNNI
                q.quantize_static(str(ready), str(fresh), reader, per_channel=True, reduce_range=True)
        except Exception as error:  # of protobuf, of onnx, of onnxruntime, or of the data
            if isinstance(error, OSError | MemoryError):
                raise
            raise ValueError(f"onnxruntime can't quantize {path} ({one_line(error)})") from error
        finally:
            ready.unlink(missing_ok=True)
    return Path(out).expanduser()


class _Reader:
    """The calibration data as onnxruntime asks for them: one batch after another, by the input's name."""

    def __init__(self, path: Path, batches: Iterable[Any]) -> None:
        self.name = session(path).get_inputs()[0].name
        self.left = _images(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None after the last."""
        found = next(self.left, None)
        return None if found is None else {self.name: found.numpy()}


def _images(batches: Iterable[Any]) -> Iterator[Tensor]:
    seen = 0
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        for part in x.detach().cpu().float()[: MOST_IMAGES - seen].split(32):
            seen += len(part)
            yield part
        if seen >= MOST_IMAGES:
            return
    if not seen:
        raise ValueError("wanted at least one batch of inputs, got none")


def session(path: str | Path, threads: int = 0) -> Any:
    """Return onnxruntime's session for a file on the CPU, with so many threads (0: as it likes)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)


def run_onnx(path: str | Path, x: Tensor) -> Tensor:
    """Return the first output of the ONNX model at ``path`` for ``x``."""
    return _outputs(path, x)[0]


def _outputs(path: str | Path, x: Tensor) -> list[Tensor]:
    opened = session(path)
    found = opened.run(None, {opened.get_inputs()[0].name: x.cpu().numpy()})
    return [torch.from_numpy(output) for output in found]


def _onnx_error(path: Path, x: Tensor, wanted: Any) -> float:
    """Return the largest difference of an output from the one wanted, relative to the largest value in it."""
    return relative_error(_outputs(path, x), [output.cpu() for output in tree_leaves(wanted)])
