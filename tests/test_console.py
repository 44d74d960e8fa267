"""What the commands print: whole figures at any width, and nothing but text where that is no terminal."""

import os
import pty
import re
import select
import struct
import sys
import termios
import time
from fcntl import ioctl

import pytest
import torch
from rich.table import Table
from rich.text import Text

import tncompress as tnc
from tncompress.tables import render

SPEC = "default: {format: tucker, rank: {params_ratio: 0.25}}\nrules: [{pattern: conv3, keep_dense: true}]\n"
NAMED = "--model zoo:cnn4 --weights dense.safetensors"
QUICK = "--ways eager --seconds 0 --batch 1"
VERBS = {
    "plan": f"plan {NAMED} --spec spec.yaml --input 1x28x28",
    "compress": f"compress {NAMED} --spec spec.yaml --input 1x28x28 --out OUT",
    "info": "info small",
    "report": "report small --input 1x28x28 --spectra",
    "atlas": f"atlas {NAMED}",
    "bench": f"bench small --input 1x28x28 {QUICK}",
    "retruncate": "retruncate small --rank rank_fraction=0.5 --out OUT",
    "evaluate": "evaluate small --data digits",
    "sensitivity": f"sensitivity {NAMED} --data digits --formats svd --ratios 0.5 --images 4",
}
REPEATABLE = [verb for verb in VERBS if verb not in ("bench", "report")]  # whose figures are no times


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("console")
    (place / "spec.yaml").write_text(SPEC)
    torch.manual_seed(0)
    dense = tnc.build_model("zoo:cnn4", num_classes=10, in_channels=1).eval()
    tnc.save_weights(dense, place / "dense.safetensors")
    source = {"source": "zoo:cnn4", "num_classes": 10, "in_channels": 1}
    small = tnc.compress(dense, place / "spec.yaml")
    tnc.save(small, place / "small", source=source, dense_weights=place / "dense.safetensors")
    return place


@pytest.fixture
def printed(run, folder, monkeypatch):
    """Run a verb with the output in a pipe of this many columns, and return what it prints."""
    monkeypatch.chdir(folder)
    made = iter(range(1000))

    def call(line, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("CI", "true")
        out = f"made-{columns}-{next(made)}-{time.monotonic_ns()}"
        result = run(line.replace("OUT", out))
        return result.stdout.replace(out, "OUT"), result.stderr.replace(out, "OUT")

    return call


def figures(text):
    """Return the numbers of a text, and the words of reasons, wherever lines were broken."""
    return sorted(re.findall(r"\d[\d.,x×]*(?: [kMG]B?\b)?", text))


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipe_gets_plain_text_within_its_columns(printed, verb):
    for columns in (60, 160):
        out, err = printed(VERBS[verb], columns)
        assert out.strip()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out + err)
        assert "…" not in out
        assert out == "\n".join(line.rstrip() for line in out.splitlines()) + "\n"
        if verb != "evaluate":  # which prints no table, but lines of words
            assert max(map(len, out.splitlines())) <= columns


@pytest.mark.parametrize("verb", REPEATABLE)
def test_a_narrow_terminal_shows_the_figures_of_a_wide_one(printed, verb):
    wide, narrow = (printed(VERBS[verb], columns)[0] for columns in (200, 60))
    assert figures(narrow) == figures(wide)
    tiny = printed(VERBS[verb], 24)[0]
    assert len("".join(figures(tiny))) >= 0.9 * len("".join(figures(wide)))  # some are broken over lines


def test_a_report_shows_its_layers_recovery_and_spec_at_any_width(printed):
    for columns in (60, 200):
        out = printed(VERBS["report"], columns)[0]
        for words in (
            "parameters",
            "latency",
            "conv2",
            "tucker",
            "params_ratio: 0.25",
            "out|rest",
            "torch 2",
        ):
            assert words in " ".join(out.split()), (columns, words)  # a line may end between words
        assert "kept dense by the rule 'conv3'" in " ".join(re.sub("[│]", " ", out).split())


def table():
    made = Table(title="a title")
    made.add_column("name", overflow="fold")
    made.add_column("why")
    for head in ("before", "after", ""):
        made.add_column(head, justify="right")
    made.add_row(Text("layer.[bold]one"), "because it is what was asked for", "123.45 k", "6.7 k", "18.43x")
    made.add_row(Text("two"), "", "1", "", "")
    return made


@pytest.mark.parametrize("width", range(20, 140, 4))
def test_a_table_becomes_a_list_before_a_figure_is_cut(width):
    text = render(table(), width)
    for whole in ("123.45 k", "6.7 k", "18.43x"):
        assert whole in text
    assert "layer.[bold]one" in text or width < 16
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert ("┃" in text) == (width >= 3 * 5 + 1 + 15 + 7 + 8 + 5 + 6)


def test_what_is_printed_of_a_file_name_is_no_markup(folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    name = "made-[red]-[/x]"
    assert f"saved in {name}" in run(f"compress {NAMED} --spec spec.yaml --out {name}").stderr


RUNNER = """
import sys, torch
torch.set_num_threads(1)
from tncompress.cli import app
for line in sys.argv[1:]:
    print("@@@", flush=True)
    try:
        app(line.split(), standalone_mode=False)
    except SystemExit:
        pass
"""


@pytest.mark.slow
def test_a_terminal_keeps_no_bar_and_no_colour_where_that_is_not_wanted(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = [line.replace("OUT", f"terminal-{verb}") for verb, line in VERBS.items()]
    raw = in_a_terminal([sys.executable, "-c", RUNNER, *lines], columns=60, NO_COLOR="1", TERM="xterm")
    assert raw.count("@@@") == len(lines)
    assert not re.search(r"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9[0-7])m", raw)  # colours
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h")  # the cursor is there again
    assert "\x1b[2K" in raw  # there were bars, which were wiped out
    screen = seen(raw)
    assert not any("%" in line and ":" in line and "━" in line for line in screen)
    assert all(any(verb in line for line in screen) for verb in ("conv2", "tucker", "accuracy"))
    dumb = in_a_terminal([sys.executable, "-c", RUNNER, *lines[:2]], columns=60, TERM="dumb")
    assert "\x1b" not in dumb


def in_a_terminal(command, *, columns, **variables):
    """Return what a command writes to a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        kept = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR", "COLUMNS")}
        os.execve(command[0], command, kept | variables)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written, end = b"", time.monotonic() + 240
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
            written += piece
    os.waitpid(child, 0)
    return written.decode()


def seen(raw):
    """Return the lines that stay on a screen: returns, wiped lines and moves of the cursor carried out."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", raw):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        elif part.startswith("\x1b"):
            number = int(re.sub(r"\D", "", part) or 1)
            row -= number if part.endswith("A") else 0
            if part.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
        lines += [""] * (row + 1 - len(lines))
    return lines
