"""The page of `deployment.py`: tables from the last row of each kind in a file of rows."""

import json
from pathlib import Path

from tncompress.tables import count, markdown_table, ratio

HEAD = """# Deployment

What a compressed model is worth where this library is not, by the command

```console
python examples/deployment.py
```

Every number here is from the rows in `deployment.jsonl`, which it appends.
"""


def page(path: Path) -> str:
    """Return the page of the rows in ``path``."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    parts = [HEAD]
    for model in dict.fromkeys(row["model"] for row in rows if row["part"] == "sizes"):
        own = [row for row in rows if row["part"] == "sizes" and row["model"] == model]
        parts.append(sizes(model, own))
        if any(row["kind"] not in ("dense", "compressed") for row in own):
            parts.append(formats(model, own))
    for part, words in (("latency", latency), ("load", load)):
        found = {row["model"]: row for row in rows if row["part"] == part}
        parts += [words(row) for row in found.values()]
    return "\n".join(parts)


def sizes(model: str, rows: list) -> str:
    """Return the table of what each form takes on disk, and how far its outputs are off."""
    last = {(row["kind"], row["form"]): row for row in rows}
    lines = []
    for (kind, form), row in last.items():
        if kind != "compressed":
            continue
        dense = last.get(("dense", {"stripped": "saved", "merged": "saved"}.get(form, form)))
        size = dense["bytes"] if dense else None
        told = [f"{count(size)}B" if size else "-", f"{count(row['bytes'])}B", ratio(size, row["bytes"])]
        lines.append([form, *told, shown_off(row["difference"])])
    header = ("form", "dense", "compressed", "smaller", "output off by")
    where = next(row for row in reversed(rows) if row["kind"] == "compressed")
    return (
        f"## {model}: size on disk and agreement\n\n{markdown_table(header, lines)}\n\n"
        "*saved* is the folder of `tnc.save`, loaded again; *merged* the dense layers that the compressed "
        "ones stand for. The output is compared with that of the compressed model in PyTorch, over its "
        f"largest value; int8 with the float ONNX model. {place(where)}\n"
    )


def formats(model: str, rows: list) -> str:
    """Return the table of what the forms of each format by itself take, and how far they are off."""
    last = {(row["kind"], row["form"]): row for row in rows}
    kinds = dict.fromkeys(row["kind"] for row in rows if row["kind"] not in ("dense", "compressed"))
    forms = list(dict.fromkeys(form for kind, form in last if kind in kinds))
    lines = []
    for kind in kinds:
        cells = [
            f"{count(last[kind, form]['bytes'])}B, {shown_off(last[kind, form]['difference'])}"
            for form in forms
        ]
        lines.append([kind, *cells])
    where = next(row for row in reversed(rows) if row["kind"] in kinds)
    return (
        f"## {model} in one format\n\nA quarter of the parameters of each layer: size on disk, and how far "
        f"the output is off.\n\n{markdown_table(('format', *forms), lines)}\n\n{place(where)}\n"
    )


def shown_off(difference: float) -> str:
    """Return how far an output is off, in words."""
    return "the same bits" if difference == 0 else f"{difference:.1e}"


def latency(row: dict) -> str:
    """Return the table of times in onnxruntime."""
    median = {form: seconds for form, (_, seconds, _) in row["quartiles"].items()}
    times = {form: median["dense"] / seconds for form, seconds in median.items()}
    lines = [
        [
            form,
            *(f"{1e3 * seconds:.0f} ms" for seconds in (row["least"][form], low, middle, high)),
            f"{times[form]:.2f}x",
        ]
        for form, (low, middle, high) in row["quartiles"].items()
    ]
    header = ("", "least", "first quartile", "median", "third quartile", "faster than dense, by medians")
    table = markdown_table(header, lines)
    best = max(times[form] for form in ("chain", "fused"))
    goal = "is reached" if best >= 2.2 else "is missed"
    int8 = [form for form in times if form.endswith("int8")]
    off = " and ".join(shown_off(row["differences"][form]) for form in int8)
    rounded = f"In int8 the outputs are off by {off} of the largest one" if int8 else ""
    if any(times[form] < times[form.removesuffix(", int8")] for form in int8):
        rounded += ", and it saves no time on this processor"
    rounded += ". " if int8 else ""
    return (
        f"## {row['model']} in onnxruntime\n\nBatch {row['batch']}, images of {row['side']} pixels, "
        f"{row['macs_times']:.2f}x fewer MACs (svd, ranks in multiples of 16), BatchNorm folded.\n\n"
        f"{table}\n\nThe goal of 2.2x {goal}: {best:.2f}x. The ranks not rounded have as many "
        "MACs, but are no multiples of 16: set `round_to: 16` in the spec. "
        f"{rounded}{place(row)}\n"
    )


def load(row: dict) -> str:
    """Return what loading takes, in words."""
    return (
        f"## Loading {count(row['bytes'])}B\n\nA saved {row['model']} of {count(row['bytes'])}B (dense "
        f"{count(row['dense_bytes'])}B) loads in {row['seconds']:.2f} s (the slowest of three fresh "
        f"processes: {row['slowest']:.2f} s), and the process then has grown by at most {row['times']:.2f} "
        f"times the file's size. {place(row)}\n"
    )


def place(row: dict) -> str:
    """Return where a row was measured."""
    return f"({row['machine']}, torch {row['torch']}, onnxruntime {row['onnxruntime']}, {row['date']})"
