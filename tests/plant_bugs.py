"""Plant known bugs, one at a time, in a copy of the repository, and see that the tests find each of them.

    python tests/plant_bugs.py            # a few minutes; `make bugs`

Each bug is a line of the library replaced by a wrong one. Prints what found it; exits with 1 if one survives.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    """A wrong line in the place of a right one, and the tests that should see it."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str


LAYER, PLAN, SURGERY = "tests/test_formats.py", "tests/test_plan.py", "tests/test_surgery.py"
BUGS = [
    Bug(
        "padding applied on the wrong stage",
        "contraction.py",
        "owned = [axis in stage.axes for axis in range(geometry.ndim)]",
        "owned = [axis not in stage.axes for axis in range(geometry.ndim)]",
        LAYER,
    ),
    Bug(
        "padding of all axes on every stage",
        "contraction.py",
        "pairs = [p if own else (0, 0) for p, own in zip(geometry.padding, owned, strict=True)]",
        "pairs = list(geometry.padding)",
        LAYER,
    ),
    Bug(
        "stride[0] used for both axes",
        "geometry.py",
        "            tuple(conv.stride),",
        "            (conv.stride[0],) * len(conv.stride),",
        LAYER,
    ),
    Bug("a dropped bias", "contraction.py", "bias if i == last else None", "None", LAYER),
    Bug("a bias on every stage", "contraction.py", "bias if i == last else None", "bias", LAYER),
    Bug(
        "padding_mode ignored",
        "geometry.py",
        "            conv.padding_mode,",
        '            "zeros",',
        LAYER,
    ),
    Bug(
        "ranks clipped but not recorded",
        "ranks.py",
        "return format.feasible(shape, format.check_ranks(shape, asked))",
        "return format.check_ranks(shape, asked)",
        f"{PLAN} tests/test_ranks.py {SURGERY}",
    ),
    Bug(
        "a policy on the error met by the bound alone",
        "ranks.py",
        "share = min(1.0, fit.rel_error**2 / bound) if bound > 0 else 1.0",
        "high = low if found else high",
        "tests/test_ranks.py",
    ),
    Bug(
        "one name of a shared module left dense",
        "surgery.py",
        "for name in planned.names}",
        "for name in planned.names[:1]}",
        SURGERY,
    ),
    *(
        Bug(f"a predicted error off by 1 % ({name})", f"formats/{name}.py", right, wrong, LAYER)
        for name, right, wrong in (
            (
                "chain",
                "return self.as_fit(made, kernel, rel_error)",
                "return self.as_fit(made, kernel, 1.01 * rel_error)",
            ),
            (
                "tucker",
                "return self.as_fit(made, kernel, error)",
                "return self.as_fit(made, kernel, 0.99 * error)",
            ),
            ("cp", "fit.factors), fit.rel_error)", "fit.factors), 1.01 * fit.rel_error)"),
        )
    ),
    Bug(
        "the error of groups off by 1 %",
        "formats/base.py",
        "error / total if",
        "1.01 * error / total if",
        "tests/test_laws.py",
    ),
    Bug(
        "the error of half precision taken before rounding",
        "formats/base.py",
        "if torch.finfo(kernel.dtype).eps > 1e-4:",
        "if False:",
        LAYER,
    ),
    Bug(
        "dilation of the first axis only",
        "contraction.py",
        "dilation = tuple(d if own else 1 for d, own in zip(geometry.dilation, owned, strict=True))",
        "dilation = tuple(geometry.dilation[0] if own else 1 for own in owned)",
        LAYER,
    ),
    Bug(
        "groups ignored",
        "contraction.py",
        "groups = geometry.groups * stage.groups",
        "groups = stage.groups",
        LAYER,
    ),
    Bug(
        "output padding ignored",
        "contraction.py",
        "tuple(p if own else 0 for p, own in zip(geometry.output_padding, owned, strict=True))",
        "(0,) * geometry.ndim",
        LAYER,
    ),
    Bug(
        "same padding of even kernels on the other side",
        "geometry.py",
        "return tuple((total // 2, total - total // 2) for total in totals)",
        "return tuple((total - total // 2, total // 2) for total in totals)",
        LAYER,
    ),
    Bug(
        "a bond scaled on one side only",
        "formats/chain.py",
        "balanced.append(scale[:, None, None] * core)",
        "balanced.append(core)",
        LAYER,
    ),
    Bug(
        "a subclass with a forward of its own compressed",
        "discovery.py",
        "        if changed:",
        "        if False:",
        "tests/test_obstacles.py",
    ),
    Bug(
        "a wrapped model let through",
        "discovery.py",
        'if "_orig_mod" in module._modules:',
        "if False:",
        "tests/test_obstacles.py",
    ),
    Bug(
        "a failed replacement not undone",
        "swap.py",
        "for name, layer in before.items():",
        "for name, layer in ():",
        "tests/test_obstacles.py",
    ),
    Bug(
        "a checksum not compared",
        "manifest.py",
        'if read and sha256_of(path) != manifest["sha256"]:',
        "if False:",
        "tests/test_export.py",
    ),
    Bug(
        "a result written in place",
        "storage.py",
        "        elif not _exchange(fresh, path):",
        "        elif shutil.rmtree(path) or fresh.rename(path):",
        "tests/test_faults.py",
    ),
    Bug(
        "a window not flipped for transposed convolutions",
        "patches.py",
        "x = x.flip([-1 - axis for axis in range(ndim)])",
        "x = x.clone()",
        "tests/test_patches.py",
    ),
    Bug(
        "the mean output shifted the wrong way",
        "moments.py",
        "(error.double().flatten(2) @ mean[:, :, None]).flatten()",
        "-(error.double().flatten(2) @ mean[:, :, None]).flatten()",
        "tests/test_moments.py",
    ),
    Bug(
        "factors whitened and not brought back",
        "weighted.py",
        "factors[number] = network.on_modes(number, factors[number], inverse)",
        "pass",
        "tests/test_weighted.py",
    ),
    Bug(
        "the factor of out solved for the kernel, not for the outputs",
        "weighted.py",
        "weighted = self.metric.times(seen).flatten(2)",
        "weighted = seen.flatten(2)",
        "tests/test_weighted.py",
    ),
    Bug(
        "a ridge towards zero",
        "least_squares.py",
        "missing = yx - work @ xx",
        "work, missing = torch.zeros_like(work), yx",
        "tests/test_least_squares.py",
    ),
    Bug(
        "only the first limit of a budget kept",
        "knapsack.py",
        "(total <= 1 + 1e-14 * len(self.losses)).all(-1)",
        "(total <= 1 + 1e-14 * len(self.losses))[..., 0]",
        "tests/test_knapsack.py",
    ),
    Bug(
        "losses that are not squared",
        "judge.py",
        "return error**2",
        "return error",
        "tests/test_judge.py",
    ),
]


def found_by(bug: Bug, copy: Path) -> str | None:
    """Return the first test that fails with ``bug``, or None."""
    path = copy / "tncompress" / bug.file
    source = path.read_text()
    if source.count(bug.right) < 1:
        raise SystemExit(f"{bug.what}: the line {bug.right!r} is not in {bug.file} any more")
    path.write_text(source.replace(bug.right, bug.wrong))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-m",
            "not slow",
            *bug.tests.split(),
        ]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(source)
    if run.returncode == 0:
        return None
    return next(
        (line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "no test ran"
    )


def main() -> None:
    """Try each bug whose description holds the words on the command line, or all of them."""
    wanted = " ".join(sys.argv[1:])
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "_build"))
        for bug in BUGS:
            if wanted in bug.what:
                found = found_by(bug, copy)
                survivors += found is None
                print(f"{bug.what}: {found.split(' - ')[0] if found else 'SURVIVED'}", flush=True)
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
