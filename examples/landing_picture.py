"""The pictures on the documentation's first page: accuracy without training, by size.

    python examples/landing_picture.py     # docs/figures/landing-*.svg, from docs/accuracy.jsonl

What a picture shows is in its metadata, too, as JSON; a test compares it with the rows.
"""

import argparse
import json
import statistics
from pathlib import Path

from accuracy_at_size import RESULTS, read

FIGURES = RESULTS.parent / "figures"
NETWORKS = {"cnn4": "four-layer CNN", "resnet20": "ResNet-20"}
TIMES = (2, 4, 8, 16)
LINES = {  # what a line is called: format and step in the rows, colour in light and in dark
    "repaired on images": ("auto", "repair", "#0b5cad", "#7cc4ff"),
    "data-aware": ("auto", "aware + BatchNorm", "#4f94d4", "#4b93d1"),
    "one budget": ("auto", "budget + BatchNorm", "#9cc3e6", "#34658f"),
    "tltorch CP": ("tltorch CP", "uniform + BatchNorm", "#b4530a", "#ffab6b"),
    "tltorch Tucker": ("tltorch Tucker", "uniform + BatchNorm", "#d98a4a", "#c97f45"),
    "tltorch TT": ("tltorch TT", "uniform + BatchNorm", "#ecc19c", "#8a5a34"),
}
THEMES = {"light": ("#1f2328", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}


def accuracies(rows: list[dict], **key) -> list[float]:
    """Return the accuracies, in percent, of the rows with these values."""
    return [
        row["accuracy"]
        for row in rows
        if "accuracy" in row and all(row.get(name) == value for name, value in key.items())
    ]


def mean(found: list[float]) -> float:
    """Return the mean over the seeds, to the digits that are shown anywhere."""
    return round(statistics.mean(found), 2)


def points(rows: list[dict], network: str) -> dict[str, list[float]]:
    """Return the mean accuracy over the seeds at each of TIMES, for each line, and the dense network's."""
    found = {"dense": [mean(accuracies(rows, network=network, step="dense"))]}
    for name, (format, step, *_) in LINES.items():
        key = {"network": network, "resource": "params", "format": format, "step": step}
        found[name] = [mean(accuracies(rows, times=times, **key)) for times in TIMES]
    return found


def sentence(rows: list[dict]) -> str:
    """Return what the first page says of the picture."""
    shown = points(rows, "resnet20")
    at = TIMES.index(8)
    return (
        f"a ResNet-20 keeps {shown['repaired on images'][at]:.1f} % of its {shown['dense'][0]:.1f} % at an "
        f"eighth of its convolution parameters; tltorch's best decomposition of that size has "
        f"{max(shown[name][at] for name in LINES if name.startswith('tltorch')):.1f} %"
    )


def draw(shown: dict[str, list[float]], network: str, theme: str, path: Path) -> None:
    """Write the picture of one network as SVG with text as text, on no background."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, faint = THEMES[theme]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": network, "font.size": 11}):
        figure = Figure(figsize=(5.2, 4.8), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(shown["dense"][0], color=ink, linestyle="--", linewidth=1, label="dense")
        for name, (_, _, *colours) in LINES.items():
            ours = not name.startswith("tltorch")
            axes.plot(
                TIMES,
                shown[name],
                color=colours[theme == "dark"],
                marker="o" if ours else "s",
                linewidth=2.2 if ours else 1.4,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(TIMES, [f"{times}x" for times in TIMES])
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.set_xlabel("fewer convolution parameters", color=ink)
        axes.set_ylabel("accuracy, %", color=ink)
        axes.set_title(f"{NETWORKS[network]}, Fashion-MNIST, no training", color=ink, fontsize=11)
        axes.tick_params(colors=ink)
        axes.grid(color=faint, linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_color(faint)
        figure.legend(labelcolor=ink, frameon=False, fontsize=10, loc="outside lower center", ncols=2)
        about = {"Description": json.dumps({"network": network, "accuracy": shown}), "Date": None}
        figure.savefig(path, transparent=True, metadata=about)


def shown_in(path: Path) -> dict:
    """Return what a picture says of itself in its metadata."""
    text = path.read_text(encoding="utf-8")
    described = text.split("<dc:description>")[1].split("</dc:description>")[0]
    return json.loads(described.replace("&quot;", '"'))


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS, help="what accuracy_at_size.py measured")
    parser.add_argument("--out", type=Path, default=FIGURES, help="a folder for the pictures")
    chosen = parser.parse_args()
    rows = list(read(chosen.rows))
    chosen.out.mkdir(parents=True, exist_ok=True)
    for network in NETWORKS:
        for theme in THEMES:
            draw(points(rows, network), network, theme, chosen.out / f"landing-{network}-{theme}.svg")
    print(sentence(rows))


if __name__ == "__main__":
    main()
