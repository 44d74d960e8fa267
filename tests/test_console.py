"""What the commands print: whole figures at any width, and nothing but text where that is no terminal."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
import torch
import typer
from few_images import few_digits
from rich.table import Table
from rich.text import Text

import tncompress as tnc
from tncompress import data
from tncompress.cli import app
from tncompress.tables import render

SPEC = "default: {format: tucker, rank: {params_ratio: 0.25}}\nrules: [{pattern: conv3, keep_dense: true}]\n"
NAMED = "--model zoo:cnn4 --weights dense.safetensors"
DIGITS = f"{NAMED} --data digits"
GRID = "--layers conv2 --cuts out|rest --fractions 0.5 --images 0 --test-images 8"
VERBS = {
    "demo": "demo --data digits --epochs 1 --tune-epochs 1 --out OUT",
    "train": "train --model zoo:cnn4 --data digits --epochs 1 --out OUT.safetensors",
    "atlas": f"atlas {NAMED}",
    "sweep": f"sweep {DIGITS} {GRID} --out OUT",
    "calibrate": f"calibrate {DIGITS} --images 16 --out OUT.safetensors",
    "sensitivity": f"sensitivity {DIGITS} --formats svd --ratios 0.5 --images 4",
    "plan": f"plan {NAMED} --spec spec.yaml --input 1x28x28",
    "compress": f"compress {NAMED} --spec spec.yaml --input 1x28x28 --out OUT",
    "repair": "repair small --data digits --images 16 --out OUT",
    "finetune": "finetune small --data digits --epochs 1 --out OUT",
    "progressive": f"progressive {DIGITS} --spec spec.yaml --rounds 2 --epochs 1 --images 16 --out OUT",
    "retruncate": "retruncate small --rank rank_fraction=0.5 --data digits --out OUT",
    "evaluate": "evaluate small --data digits",
    "report": "report small --input 1x28x28 --spectra",
    "bench": "bench small --input 1x28x28 --ways eager --seconds 0 --batch 1",
    "info": "info small",
    "export": "export small --to strip --data digits --out OUT.pt",
}
COMMANDS = typer.main.get_command(app).commands
WORDS = ("train", "calibrate", "evaluate", "export")  # which print no table, but lines of words
TIMED = ("demo", "repair", "finetune", "progressive", "report", "bench")  # whose figures are times, too
REPEATABLE = [verb for verb in VERBS if verb not in TIMED]
QUICK = [pytest.param(verb, marks=[pytest.mark.slow] if verb == "demo" else []) for verb in VERBS]
UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # escapes, returns and the like


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


@pytest.fixture(scope="module")
def known():
    """What has been printed already, by verb and columns."""
    return {}


@pytest.fixture
def printed(run, folder, known, monkeypatch, quick_cp):
    """Run a verb on few images, with the output in a pipe of this many columns; return what it prints."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CI", "true")
    monkeypatch.setitem(data._IN_MEMORY, "digits", few_digits())

    def call(verb, columns):
        if (verb, columns) not in known:
            monkeypatch.setenv("COLUMNS", str(columns))
            out = f"{verb}-{columns}"
            result = run(VERBS[verb].replace("OUT", out))
            known[verb, columns] = [text.replace(out, "OUT") for text in (result.stdout, result.stderr)]
        return known[verb, columns]

    return call


def figures(text):
    """Return the numbers of a text, and the words of reasons, wherever lines were broken."""
    return sorted(re.findall(r"\d[\d.,x×]*(?: [kMG]B?\b)?", " ".join(text.split())))


def test_the_laws_of_the_console_are_held_against_every_verb():
    assert list(VERBS) == list(COMMANDS)


@pytest.mark.parametrize("verb", QUICK)
@pytest.mark.usefixtures("unchecked")
def test_a_pipe_gets_plain_text_within_its_columns(printed, verb):
    for columns in (40, 160) if verb in REPEATABLE else (40,):
        out, err = printed(verb, columns)
        assert out.strip()
        assert not UNWANTED.search(out + err)
        assert "…" not in out
        assert out == "\n".join(line.rstrip() for line in out.splitlines()) + "\n"
        if verb in WORDS:
            assert all(re.match(r"[\w ]+: ", line) for line in out.splitlines())
        else:
            assert max(map(len, out.splitlines())) <= columns


@pytest.mark.parametrize("verb", REPEATABLE)
@pytest.mark.usefixtures("unchecked")
def test_a_narrow_terminal_shows_the_figures_of_a_wide_one(printed, verb):
    wide, narrow = (printed(verb, columns)[0] for columns in (160, 40))
    assert figures(narrow) == figures(wide)
    tiny = printed(verb, 24)[0]
    assert len("".join(figures(tiny))) >= 0.9 * len("".join(figures(wide)))  # some are broken over lines


@pytest.mark.parametrize("verb", VERBS)
def test_misuse_is_one_line_however_narrow(run, folder, monkeypatch, verb):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setitem(data._IN_MEMORY, "digits", few_digits())
    wrong = VERBS[verb].replace("zoo:cnn4", "zoo:none").replace(" small", " nothing")
    wrong = wrong if wrong != VERBS[verb] else wrong.replace("digits", "none")
    before = sorted(folder.rglob("*"))
    for line, code, words in (
        (f"{VERBS[verb]} --nonsense", 2, f"(tncompress {verb} --help says what there is)"),
        (wrong, 1, "none" if "none" in wrong else "nothing"),
    ):
        result = run(line.replace("OUT", "unmade"), code=code)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
        assert not UNWANTED.search(result.stderr)
    assert sorted(folder.rglob("*")) == before


def test_an_unknown_verb_or_option_before_it_is_one_line(run):
    for line, words in (("pln", "Did you mean 'plan'?"), ("--nonsense plan", "No such option: --nonsense")):
        result = run(line, code=2)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_and_is_plain_where_that_is_wanted(run, monkeypatch, verb):
    for columns in (40, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        out = run(f"{verb} --help").stdout
        assert not UNWANTED.search(out)
        assert max(len(line.rstrip()) for line in out.splitlines()) <= columns


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_and_every_option_says_what_it_is(verb):
    assert COMMANDS[verb].help
    assert COMMANDS[verb].params
    for parameter in COMMANDS[verb].params:
        assert (parameter.help or "").strip(), (verb, parameter.opts)


def test_a_report_shows_its_layers_recovery_and_spec_at_any_width(printed):
    for columns in (40, 160):
        out = printed("report", columns)[0]
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


def test_figures_of_a_column_end_at_its_right():
    lines = [line for line in render(table()).splitlines() if "│" in line]
    assert [line.split("│")[3] for line in lines] == [" 123.45 k ", "        1 "]


def test_what_is_printed_of_a_file_name_is_no_markup(folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    name = "made-[red]-[/x]"
    assert f"saved in {name}" in run(f"compress {NAMED} --spec spec.yaml --out {name}").stderr


RUNNER = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from few_images import few_digits
from tncompress import data
from tncompress.cli import app
from tncompress.formats import cp
data._IN_MEMORY["digits"] = few_digits()
cp.SWEEPS, cp.RESTARTS = 20, 1
for line in sys.argv[2:]:
    print("@@@", flush=True)
    try:
        app(line.split(), standalone_mode=False)
    except SystemExit:
        pass
"""
EXPORTS = "export small --to onnx --data digits --out OUT.onnx"


def runner(where):
    """Return what runs all verbs in one process of its own, and ONNX, whose libraries have much to say."""
    lines = [line.replace("OUT", f"{where}-{n}") for n, line in enumerate([*VERBS.values(), EXPORTS])]
    return [sys.executable, "-c", RUNNER, str(Path(__file__).parent), *lines], len(lines)


@pytest.mark.slow
def test_a_terminal_keeps_no_bar_and_no_colour_where_that_is_not_wanted(folder, monkeypatch):
    monkeypatch.chdir(folder)
    command, count = runner("terminal")
    raw = in_a_terminal(command, columns=40, NO_COLOR="1", TERM="xterm")
    assert raw.count("@@@") == count
    assert "\nerror: " not in raw
    assert not re.search(r"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9[0-7])m", raw)  # colours
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h")  # the cursor is there again
    assert "\x1b[2K" in raw  # there were bars, which were wiped out
    screen = seen(raw)
    assert not any("%" in line and ":" in line and "━" in line for line in screen)
    assert all(any(word in line for line in screen) for word in ("conv2", "tucker", "accuracy"))
    assert max((len(line.rstrip()) for line in screen if set(line) & set("━┃│┏└")), default=0) <= 40
    dumb = in_a_terminal([*command[:4], VERBS["plan"], VERBS["sensitivity"]], columns=40, TERM="dumb")
    assert "\x1b" not in dumb


@pytest.mark.slow
def test_pipes_of_a_process_stay_free_of_litter(folder, monkeypatch):
    monkeypatch.chdir(folder)
    command, count = runner("pipe")
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")}
    done = subprocess.run(command, env=kept | {"COLUMNS": "40"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outs = dict(zip([*VERBS, "onnx"], done.stdout.split("@@@\n")[1:], strict=True))
    assert len(outs) == count
    assert not UNWANTED.search(done.stdout + done.stderr)
    for words in ("^error: ", "Warning", "Traceback", "it/s", "━━"):
        assert not re.search(words, done.stderr, re.MULTILINE), words
    for verb, out in outs.items():
        assert out.strip()
        if verb not in (*WORDS, "onnx"):
            assert max(map(len, out.splitlines())) <= 40, verb


def in_a_terminal(command, *, columns, **variables):
    """Return what a command writes to a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        kept = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR", "COLUMNS")}
        os.execve(command[0], command, kept | variables)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written, end = b"", time.monotonic() + 600
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
