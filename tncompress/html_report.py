"""The report as one page of HTML that needs no network: tables, diagrams, and figures to explore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2.utils import htmlsafe_json_dumps

from tncompress.atlas_page import WORDS as ATLAS_WORDS
from tncompress.diagram import diagram_svg
from tncompress.html_layers import columns_and_lines, layer_words
from tncompress.html_summary import cards, lead, way
from tncompress.layer_figures import LayerFigures
from tncompress.pages import Markup, document, filled, source_of, table
from tncompress.recovery_record import COLUMNS as CURVE_COLUMNS
from tncompress.report_plots import (
    GREY,
    KERNELS,
    Plot,
    colour_of,
    drawn_layers,
    entropy_plots,
    recovery_plot,
    spectra_plots,
)
from tncompress.report_table import Report

SECTIONS = (
    ("summary", "Summary"),
    ("layers", "Layers"),
    ("networks", "Tensor networks"),
    ("recovery", "Recovery"),
    ("spectra", "Spectra"),
    ("reproduce", "To make it again"),
    ("words", "Words"),
)
WORDS = (
    ("kernel error", "‖W − Ŵ‖ / ‖W‖ of the dense kernel W and the one that the factors stand for: as "
     "planned, and now, after repair and training, which move the kernel away from the dense one on purpose; "
     "where a BatchNorm follows, its scale is free"),
    ("output error", "the same of the layer's output about the mean of each channel, on the inputs that the "
     "dense layer gets: as planned on the calibration images, and measured now"),
    ("rank", "the dimension of a bond between two factors"),
    ("MACs", "multiply-accumulates of one forward pass on the input that the summary names"),
    ("interval of an accuracy", "Wilson's 95 % interval: what the choice of the test images leaves open, not "
     "what another seed would change"),
    ("latency", "the median over blocks of forward passes, both models in turns, ± half the range between "
     "the quartiles"),
)  # fmt: skip


def page(report: Report, title: str) -> str:
    """Return the page; whatever comes from the model is escaped."""
    plots = _plots(report)
    library, glue = plotly_script() if plots else "", source_of("report.js")
    nets = networks(report.layers)
    columns, lines = columns_and_lines(report.layers, {name: net.id for net in nets for name in net.layers})
    body = filled(
        "report.html.j2",
        title=title,
        lead=lead(report),
        sections=SECTIONS,
        cards=cards(report),
        where=report.where(),
        warnings=report.warnings,
        layers=lines,
        columns=columns,
        layer_words=layer_words(report),
        networks=nets,
        grouped=any(layer.format is not None and layer.groups > 1 for layer in report.layers),
        words=(*WORDS, *(ATLAS_WORDS if report.atlas else ())),
        figures=htmlsafe_json_dumps({id: plot.figure for id, plot in plots.items()}) if plots else "",
        library=Markup(library),
        glue=glue,
        **way(report),
        **_recovery(report, plots),
        **_spectra(report, plots),
        **_reproduce(report),
    )
    return document(title, body, styles=["report.css"], scripts=[*([library] if plots else []), glue])


def plotly_script() -> str:
    """Return the source of plotly.js; an ``ImportError`` says how it is installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError(
            "the curves of an HTML report need plotly, which is not there: pip install tncompress[report]"
        ) from None
    return get_plotlyjs()


# --- diagrams, curve, spectra -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """One network, and the layers that are held as it."""

    id: str
    layers: tuple[str, ...]
    names: str
    words: str
    svg: Markup


def networks(layers: Iterable[LayerFigures]) -> list[Net]:
    """Return the distinct networks; layers of the same format, shape and ranks share one."""
    found: dict[Any, list[LayerFigures]] = {}
    for layer in layers:
        if layer.format is not None:
            found.setdefault((str(layer.format), layer.kernel_shape, layer.ranks), []).append(layer)
    nets = []
    for number, same in enumerate(found.values(), 1):
        first, names = same[0], tuple(layer.name for layer in same)
        assert first.format is not None
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        words = f"{first.format}, ranks {' '.join(map(str, first.ranks))}"
        drawn = diagram_svg(first.format.network(first.kernel_shape), first.kernel_shape, first.ranks, words)
        nets.append(Net(f"network-{number}", names, shown, words, Markup(drawn)))
    return nets


def _plots(report: Report) -> dict[str, Plot]:
    plots = {}
    if report.recovery.points and (report.recovery.has_accuracies or _has_losses(report)):
        plots["curve"] = recovery_plot(report.recovery)
    if report.atlas is not None:
        plots |= {f"spectrum-{i}": plot for i, plot in enumerate(spectra_plots(report.atlas), 1)}
        plots |= {f"entropy-{i}": plot for i, plot in enumerate(entropy_plots(report.atlas), 1)}
    return plots


def _has_losses(report: Report) -> bool:
    return any(point.loss is not None for point in report.recovery.points)


def _recovery(report: Report, plots: Mapping[str, Plot]) -> dict[str, Any]:
    rows = [point.cells() for point in report.recovery.points]
    return {
        "curve": plots.get("curve"),
        "curve_table": table("", CURVE_COLUMNS, rows, label="Epochs") if rows else "",
        "no_curve": "No training is recorded with this model: it was not tuned, or no history was given.",
    }


def _spectra(report: Report, plots: Mapping[str, Plot]) -> dict[str, Any]:
    atlas = report.atlas
    drawn = [plot for id, plot in plots.items() if id.startswith("spectrum")]
    if atlas is None or not drawn:
        return {"atlas": None, "no_atlas": "No spectra were taken of the dense model for this report."}
    shown, depths = drawn_layers(atlas), {row.layer: row.depth for row in atlas.rows}
    deepest = max(depths.values())
    few = len(atlas.layers) > len(shown)
    words = f"Drawn are {len(shown)} of {len(atlas.layers)} layers, evenly by depth." if few else ""
    named = shown if len(shown) <= 8 else (shown[0], shown[len(shown) // 2], shown[-1])
    marks = [(name, KERNELS[name][0]) for name in atlas.kernels if name in KERNELS]
    return {
        "atlas": atlas,
        "spectra": drawn,
        "entropies": [plot for id, plot in plots.items() if id.startswith("entropy")],
        "spectra_words": words,
        "key": [{"name": name, "colour": colour_of(depths[name], deepest)} for name in named],
        "entropy_key": [{"name": f"{name} kernels", "colour": colour} for name, colour in marks]
        + [{"name": "the largest possible, log(full rank)", "colour": GREY}],
        "digest": Markup().join(table(*parts) for parts in atlas.digests()),
    }


# --- to make it again ---------------------------------------------------------------------------------------


def _reproduce(report: Report) -> dict[str, Any]:
    plan, training = report.plan, report.recovery.config
    notes = list(plan.notes) if plan else []
    if plan is not None and plan.budget is not None:
        notes.append(f"{plan.budget}.")
    if plan is not None and any(layer.output_error is not None for layer in plan.compressed):
        notes.append("The plan was made with calibration images, which are not in this file.")
    rows = [(name, str(value)) for name, value in report.environment.items()]
    return {
        "spec": report.spec_text(),
        "training": yaml.safe_dump(training, sort_keys=False) if training else "",
        "calls": _calls(report),
        "notes": notes,
        "versions": table("", ("", "here"), rows, label="Versions"),
    }


def _calls(report: Report) -> str:
    """Return lines of Python that make the model again, as far as what is needed for them is recorded."""
    source = {name: value for name, value in (report.source or {}).items() if value is not None}
    name = source.pop("source", None)
    built = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in source.items())])
    lines = ["from pathlib import Path", "import yaml"] if report.recovery.config else []
    lines += ["import tncompress as tnc", ""]
    lines += [f"model = tnc.build_model({built})" if name else "model = ...  # the dense model, trained"]
    lines += ['tnc.load_weights(model, "dense.safetensors")'] if name else []
    lines += ['small = tnc.compress(model, "spec.yaml")'] if report.plan else []
    names = [step.name for step in report.recovery.steps]
    lines += ["small = tnc.repair(small, model, batches)  # unlabelled"] if "repaired" in names else []
    if report.recovery.config:
        lines.append('config = yaml.safe_load(Path("config.yaml").read_text())')
        lines.append(
            "history = tnc.finetune(small, train_loader, config, teacher=model, val_loader=val_loader)"
        )
    return "\n".join(lines)
