"""The summary of an HTML report: the result in a sentence, the accuracy step by step, a card a figure."""

from __future__ import annotations

from typing import Any

from tncompress.measure import accuracy_interval
from tncompress.report_table import Report, milliseconds, with_unit
from tncompress.tables import change, percent


def lead(report: Report) -> str:
    """Return the result in one sentence."""
    dense, small = report.dense, report.compressed
    parts = [
        change(dense.params, small.params, "fewer parameters", "as many parameters"),
        change(dense.macs, small.macs, "fewer MACs", "as many MACs"),
        change(dense.latency.median, small.latency.median, "faster", "slower"),
    ]
    if dense.accuracy is not None and small.accuracy is not None:
        parts.insert(0, f"{100 * (small.accuracy - dense.accuracy):+.2f} points of accuracy")
    return ", ".join(parts) + "."


def cards(report: Report) -> list[dict[str, Any]]:
    """Return a card for each figure: now, dense, the change, and what is known of its spread."""
    dense, small = report.dense, report.compressed
    found = []
    if dense.accuracy is not None and small.accuracy is not None:
        found.append(_accuracy_card(dense.accuracy, small.accuracy, dense.images, small.images))
    for name, unit, a, b in (
        ("Parameters", "", dense.params, small.params),
        ("MACs", "", dense.macs, small.macs),
        ("Size on disk", "B", dense.bytes_on_disk, small.bytes_on_disk),
    ):
        found.append(_counted(name, unit, a, b))
    before, after = dense.latency, small.latency
    (was, was_spread), (now, spread) = (milliseconds(each).split(" ± ") for each in (before, after))
    words, spreads = ("faster", "slower"), (f"± {was_spread}", f"± {spread}, IQR/2")
    found.append(_card("Latency", f"{was} ms", f"{now} ms", before.median, after.median, words, spreads))
    found.append(_counted("Peak memory", "B", dense.peak_memory, small.peak_memory))
    return found


def _counted(name: str, unit: str, a: int, b: int) -> dict[str, Any]:
    spread = "of tensors alive" if name == "Peak memory" else "exact"
    return _card(name, with_unit(a, unit), with_unit(b, unit), a, b, ("less", "more"), ("", spread))


def _card(
    name: str,
    dense: str,
    now: str,
    a: float | int,
    b: float | int,
    words: tuple[str, str],
    spreads: tuple[str, str],
) -> dict[str, Any]:
    return {
        "name": name,
        "now": now,
        "dense": dense,
        "dense_spread": spreads[0],
        "spread": spreads[1],
        "change": change(a, b, *words),
        "mood": "good" if b <= a else "bad",
        "part": round(min(100 * b / a, 100), 1) if a else None,
    }


def _accuracy_card(dense: float, now: float, was_on: int | None, images: int | None) -> dict[str, Any]:
    return {
        "name": f"Accuracy on {images:,} images" if images else "Accuracy",
        "now": percent(now),
        "dense": percent(dense),
        "spread": _interval(now, images) or "its spread is not known",
        "dense_spread": _interval(dense, was_on),
        "change": f"{100 * (now - dense):+.2f} points",
        "mood": _mood(dense, now, images),
        "part": round(100 * now, 1),
    }


def _mood(dense: float, now: float, images: int | None) -> str:
    """Return how an accuracy is told: plainly, where so many images can't tell it from the dense one."""
    low, high = accuracy_interval(now, images) if images else (now, now)
    return "" if low <= dense <= high else "good" if now > dense else "bad"


def _interval(accuracy: float, images: int | None) -> str:
    if images is None:
        return ""
    low, high = accuracy_interval(accuracy, images)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def way(report: Report) -> dict[str, Any]:
    """Return the accuracy step by step, and in words what of it is not known."""
    record, words = report.recovery, []
    dense, images = record.dense, None
    if dense is None or report.dense.accuracy is not None:
        dense, images = report.dense.accuracy, report.dense.images
    steps = [("dense", dense, images)] if dense is not None else []
    steps += [(step.name, step.accuracy, step.images) for step in record.steps]
    if report.compressed.accuracy is not None:
        steps.append(("this model, now", report.compressed.accuracy, report.compressed.images))
    else:
        words.append("The accuracy of this model was not measured: no labelled images were given.")
    known = {step.name for step in record.steps}
    if not known:
        words.append(
            "No steps in between are recorded: the model was not repaired or tuned, or without record."
        )
    elif missing := [name for name in ("truncated", "repaired", "tuned") if name not in known]:
        words.append(f"Not recorded with this model: its accuracy when {' or '.join(missing)}.")
    shown = [
        {"name": name, "accuracy": percent(value), "spread": _interval(value, number)}
        for name, value, number in steps
    ]
    return {"way": shown, "way_words": words}
