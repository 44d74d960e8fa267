"""The page docs/recovery.md, from the rows that finetune_recovery.py measured and from nothing else."""

import statistics
from collections import defaultdict
from collections.abc import Iterator

from scipy.stats import ttest_1samp

from tncompress.tables import markdown_table

POINTS = {4: (3, 0.1), 8: (5, 0.3), 16: (5, 1.0)}
"""By how many times fewer parameters: after how many epochs, and how far below the control at most."""
FORMATS = ("auto", "mps", "tucker", "cp")
PEERS = ("tltorch CP", "tltorch Tucker", "tltorch TT")
CONTROLS = {
    "global": "",
    "rate x 0.5": ", half the rate",
    "sgd": ", SGD",
    "augmented": ", augmented",
    "library's default": ", the library's default",
}
"""The recipes of the dense control, and how they are told apart."""
NAMES = {"auto": "mixed"}
LAYOUTS = ("channels first", "channels last")

INTRO = """# Recovery

How much of the accuracy fine-tuning brings back, how fast, and beside what. Convolution parameters are cut
4, 8 and 16 times under one budget over the model (*mixed*: formats are chosen layer by layer), fitted and
repaired on 1,024 unlabelled images; then come epochs with labels. The recipe is AdamW at a rate of 1e-3,
falling by a cosine, with cross-entropy alone, on images that are not augmented, if nothing else is said.
Dense kernels are decayed by 5e-4, factors are not: *frobenius* decays the kernels that they stand for.
A setting that helped on three seeds has lines of its own among the goals; it was found on the same test
images. Beside them stand the dense network trained for as many epochs more (goals are set beside the control
that ends highest), the same shape trained from scratch (SGD at 0.1), and tltorch's layers of at most as many
parameters with the same recipe, after their BatchNorm statistics were taken again. Accuracies in percent on
the test images, mean ± standard deviation over the seeds of the dense training (no ± where one was
measured); differences are taken seed by seed. A dash: not measured. Everything here is written by

```console
python examples/accuracy_at_size.py train --weights examples/weights  # what is not there yet
python examples/finetune_recovery.py measure --network cnn4           # --brief: what the goals are about
python examples/finetune_recovery.py measure --network resnet20
python examples/finetune_recovery.py steps --network resnet20         # on an idle machine
python examples/finetune_recovery.py steps --network resnet50 --batch 8 --rounds 6
python examples/finetune_recovery.py page
```

from the rows in `docs/recovery.jsonl`. The dense networks are in `examples/weights/`. A run that is stopped
goes on where it was.
"""

FITTED = """Cross-entropy on the training images over the last epoch, and how far, in points, the accuracy on
the test images is below the dense control's. Where a smaller network's loss is higher, it fits the training
images less well in these epochs: that part of a gap can't be closed by what helps against overfitting.
"""


class Rows:
    """Accuracies by what they are of, each by its seed."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = [row for row in rows if "accuracy" in row]
        steps = [row for row in rows if row.get("format") == "step"]
        self.steps = list({(row["network"], row["batch"], place_of(row)): row for row in steps}.values())
        self.found: dict[tuple, dict[int, float]] = defaultdict(dict)
        self.losses: dict[tuple, dict[int, float]] = defaultdict(dict)
        self.about: dict[tuple, dict] = {}
        for row in self.rows:
            key = self.key(
                **{name: row.get(name) for name in ("network", "times", "format", "recipe", "of", "epoch")}
            )
            self.found[key][row["seed"]] = row["accuracy"]
            if "loss" in row:
                self.losses[key][row["seed"]] = row["loss"]
            self.about[key] = row
        self.networks = sorted({row["network"] for row in self.rows})

    @staticmethod
    def key(network, format, epoch, times=None, recipe=None, of=None) -> tuple:
        """Return what an accuracy is of; what is measured before training has no length."""
        return network, times, format, recipe, of if epoch else None, epoch

    def get(self, network: str, format: str, epoch: int, **rest) -> dict[int, float]:
        """Return the accuracies, by seed; none where nothing was measured."""
        return self.found.get(self.key(network, format, epoch, **rest), {})


def shown(values, digits: int = 2) -> str:
    """Return mean ± standard deviation, or a dash."""
    found = list(values.values()) if isinstance(values, dict) else list(values)
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


def gaps(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Return by how much ``one`` is above ``other``, for the seeds that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def verdict(met: bool | None) -> str:
    """Return what is said of a goal."""
    return "–" if met is None else "met" if met else "**not met**"


def page(rows: list[dict]) -> str:
    """Return the page as Markdown."""
    found = Rows(rows)
    parts = [INTRO, "\n## Against the goals\n\n" + goals(found)]
    for network in found.networks:
        parts.append(f"\n## {network}\n\n" + curves(found, network))
        if table := recipes(found, network):
            parts.append(f"\n## {network}: which settings help\n\n" + table)
        if table := fitted(found, network):
            parts.append(f"\n## {network}: what is left of the gap\n\n" + FITTED + "\n" + table)
        if table := equal_time(found, network):
            parts.append(f"\n## {network}: slices, the whole, and both\n\n" + table)
    if found.steps:
        parts.append("\n## A step of training\n\n" + steps(found))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def goals(found: Rows) -> str:
    """Return what was aimed at beside what was measured."""
    lines, better = [], helpful(found)
    for network in found.networks:
        for times, (of, most) in POINTS.items():
            aim = f"after {of} epochs at most {most} below the dense control"
            lines.append((network, f"{times}x", aim, *below_control(found, network, times, of, most)))
            for recipe in better:
                said, met = below_control(found, network, times, of, most, recipe)
                if said != "–":
                    lines.append((network, f"{times}x", f"the same, *{recipe}*", said, met))
            lines += [ahead(found, network, times, of)]
    for row in found.steps:
        if row["on"] == "cpu":
            lines.append(faster(row))
    return markdown_table(("network", "fewer", "aim", "measured", ""), lines) if lines else "Nothing yet.\n"


def below_control(
    found: Rows, network: str, times: int, of: int, most: float, recipe: str = "global"
) -> tuple[str, str]:
    """Return how far ours are below the dense control, and whether that is at most ``most``."""
    control = best_control(found, network, of)
    ours = found.get(network, "auto", of, times=times, recipe=recipe, of=of)
    below = [-gap for gap in gaps(ours, control)]
    met = statistics.mean(below) <= most if below else None
    said = f"{shown(below)} ({shown(ours)} beside {shown(control)})" if below else "–"
    return said, verdict(met)


def best_control(found: Rows, network: str, of: int) -> dict[int, float]:
    """Return the accuracies of the control that ended highest, of those measured with the most seeds."""
    controls = [found.get(network, "dense control", of, of=of, recipe=recipe) for recipe in CONTROLS]
    return max(controls, key=lambda own: (len(own), statistics.mean(own.values()) if own else 0.0))


def faster(row: dict) -> tuple:
    """Return the line that says whether a step is faster by half of its MAC ratio, in its best way."""
    best = {name: min(row[layout][name] for layout in LAYOUTS) for name in row["macs"]}
    way = min(best.keys() - {"dense"}, key=lambda name: (best[name], name))
    ratio, got = row["macs"]["dense"] / row["macs"][way], best["dense"] / best[way]
    aim = f"a training step faster by half of the MAC ratio ({way}, batch {row['batch']}, {place_of(row)})"
    said = f"{got:.2f}x faster at {ratio:.2f}x fewer MACs"
    if got < ratio / 2:
        share = row["convolutions"]["dense"]
        said += (
            f"; all but the convolutions stays, so that {1 / (1 - share + share / ratio):.2f}x is the limit"
        )
    return row["network"], "", aim, said, verdict(got >= ratio / 2)


def place_of(row: dict) -> str:
    """Return the precision of a step, the processor or GPU, and how its environment was set."""
    precision = {"no": "float32"}.get(row["precision"], row["precision"])
    advised = {True: ["environment as advised"], False: ["default environment"]}
    return ", ".join([precision, row["environment"]["device"], *advised.get(row.get("advised"), [])])


def ahead(found: Rows, network: str, times: int, of: int) -> tuple:
    """Return the line that says whether ours are ahead of tltorch's after every epoch up to ``of``."""
    told, over, seeds = [], [], set()
    for epoch in range(1, of + 1):
        rest = {"times": times, "recipe": "global", "of": of}
        ours = found.get(network, "auto", epoch, **rest)
        theirs = {name: found.get(network, name, epoch, **rest) for name in PEERS}
        theirs = {name: own for name, own in theirs.items() if gaps(ours, own)}
        if theirs:
            name = max(theirs, key=lambda name: statistics.mean(theirs[name].values()))
            over.append(statistics.mean(gaps(ours, theirs[name])))
            seeds |= ours.keys() & theirs[name].keys()
            told.append(f"{over[-1]:+.2f} ({name})")
    aim = "ahead of the best of tltorch's after every epoch"
    said = f"{', '.join(told)}; seeds: {len(seeds)}" if told else "–"
    return network, f"{times}x", aim, said, verdict(min(over) > 0 if over else None)


def curves(found: Rows, network: str) -> str:
    """Return the accuracies on the way, a line for each training."""
    dense = shown(found.get(network, "dense", 0))
    longest = max((row["of"] for row in found.rows if row["network"] == network and row.get("of")), default=1)
    header = (
        "fewer",
        "format",
        "start",
        "truncated",
        "repaired",
        *(f"epoch {n}" for n in range(1, longest + 1)),
    )
    lines = []
    lengths = sorted({row["of"] for row in found.rows if row["network"] == network and row.get("of")})
    for of in lengths:
        for recipe, words in CONTROLS.items():
            rest = {"of": of, "recipe": recipe}
            told = [shown(found.get(network, "dense control", n, **rest)) for n in range(1, of + 1)]
            if set(told) != {"–"}:
                start = f"{of} epochs{words}"
                lines.append(("1x", "dense control", start, dense, "", *told, *[""] * (longest - of)))
    for times in sorted(
        {row["times"] for row in found.rows if row.get("times") and row["network"] == network}
    ):
        for format in (*FORMATS, *PEERS):
            before = [
                shown(found.get(network, format, 0, times=times, recipe=r)) for r in ("truncated", "repaired")
            ]
            for recipe in ("global", "scratch"):
                for of in lengths:
                    rest = {"times": times, "recipe": recipe, "of": of}
                    told = [shown(found.get(network, format, n, **rest)) for n in range(1, of + 1)]
                    if set(told) == {"–"}:
                        continue
                    start = f"{of} epochs" if recipe == "global" else f"from scratch, {of} epochs"
                    own = before if recipe == "global" else ["", ""]
                    name = NAMES.get(format, format)
                    lines.append((f"{times}x", name, start, *own, *told, *[""] * (longest - of)))
    return f"The dense network: {dense}.\n\n" + markdown_table(header, lines)


def compared(found: Rows) -> Iterator[tuple[tuple, dict[int, float], dict[int, float]]]:
    """Yield what was trained with some setting: its key, its accuracies, those of the plain recipe."""
    for key in sorted(found.found, key=str):
        network, times, format, recipe, of, epoch = key
        if epoch != of or recipe in (None, "global", "scratch") or "equal time" in recipe:
            continue
        plain = found.get(network, format, of, times=times, recipe="global", of=of)
        if both := found.found[key].keys() & plain.keys():
            yield key, *({seed: each[seed] for seed in both} for each in (found.found[key], plain))


def helpful(found: Rows) -> list[str]:
    """Return the settings of compressed networks that helped somewhere, beyond what seeds would give."""
    rows = ((key, gaps(own, plain)) for key, own, plain in compared(found))
    return sorted({key[3] for key, over in rows if key[1] is not None and said(over) == "helps"})


def recipes(found: Rows, network: str) -> str:
    """Return how far each setting is above the plain recipe, seed by seed."""
    lines = []
    for key, own, plain in compared(found):
        about, times, format, recipe, of, _ = key
        if about == network:
            over = gaps(own, plain)
            where = f"{times or 1}x, {NAMES.get(format, format)}, {of} epochs"
            lines.append((recipe, where, shown(own), shown(plain), shown(over), said(over)))
    header = ("setting", "where", "with it", "without", "difference", "")
    return markdown_table(header, lines) if lines else ""


def said(over: list[float]) -> str:
    """Return whether a difference is more than the seeds alone would give, by Student's t at 5 %."""
    if len(over) < 3:
        return "too few seeds to tell"
    if ttest_1samp(over, 0.0).pvalue >= 0.05:
        return "no difference seen"
    return "helps" if statistics.mean(over) > 0 else "harms"


def fitted(found: Rows, network: str) -> str:
    """Return the loss on the training images at the end, beside what is missing on the test images."""
    lines = []
    for times, (of, _) in POINTS.items():
        control = found.get(network, "dense control", of, recipe="global", of=of)
        for format in (*FORMATS, *PEERS):
            key = found.key(network, format, of, times=times, recipe="global", of=of)
            dense = found.losses.get(found.key(network, "dense control", of, recipe="global", of=of), {})
            own = found.losses.get(key, {})
            both = own.keys() & dense.keys() & control.keys()
            if both:
                losses = [shown([each[seed] for seed in both], 3) for each in (dense, own)]
                below = shown([control[seed] - found.found[key][seed] for seed in both])
                name = NAMES.get(format, format)
                lines.append((f"{times}x, {of} epochs", name, *losses, below))
    header = ("fewer", "format", "loss of the dense control", "loss", "points below it")
    return markdown_table(header, lines) if lines else ""


def equal_time(found: Rows, network: str) -> str:
    """Return local, global and hybrid after as many epochs, and after as much time."""
    lines = []
    points = sorted(
        {key[1:3] + key[4:5] for key in found.found if key[0] == network and "equal time" in str(key[3])}
    )
    for times, format, of in points:
        rest = {"times": times, "of": of}
        for recipe in ("global", "local", "hybrid"):
            same = found.get(network, format, of, recipe=recipe, **rest)
            name = recipe if recipe == "global" else f"{recipe}, equal time"
            timed = found.get(network, format, of, recipe=name, **rest)
            about = found.about.get(found.key(network, format, of, recipe=name, **rest), {})
            length = "{} local, {} global".format(*about["epochs"]) if "epochs" in about else "–"
            where = f"{times}x, {NAMES.get(format, format)}"
            lines.append(
                (
                    recipe,
                    where,
                    f"{of}",
                    shown(same),
                    length,
                    f"{about['time']:.2f}" if "time" in about else "–",
                    shown(timed),
                )
            )
    header = ("recipe", "where", "epochs", "accuracy", "in equal time", "time, over global", "accuracy then")
    return markdown_table(header, lines) if lines else ""


def steps(found: Rows) -> str:
    """Return time and memory of a step of training."""
    lines = []
    for row in found.steps:
        for name, macs in row["macs"].items():
            times = [f"{1e3 * row[layout][name]:.1f}" for layout in LAYOUTS]
            sizes = [f"{row[what][name] / 2**20:.1f}" for what in ("peak bytes", "forward bytes")]
            where = f"{row['network']}, batch {row['batch']}, {place_of(row)}"
            share = f"{100 * row['convolutions'][name]:.0f} %"
            lines.append((where, name, f"{macs / 1e6:.1f}", *times, share, *sizes))
    last = ("ms, channels first", "ms, channels last", "in convolutions", "peak MiB in training")
    last += ("peak MiB forward",)
    about = {", ".join(f"{k} {v}" for k, v in row["environment"].items()) for row in found.steps}
    words = (
        "Forward, backward and optimizer, the fastest of steps in turns; the share of convolutions in a "
        "forward and backward pass, channels last, by torch's profiler; memory of tensors alive, in float32."
    )
    table = markdown_table(("where", "model", "million MACs an image", *last), lines)
    return f"{table}\n\n{words} Measured on {'; '.join(sorted(about))}.\n"
