"""The atlas as a value: files, frames, tables, figures, the page and the command; work side by side."""

import copy
import json
import math
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress.threads import side_by_side, with_threads


@pytest.fixture(scope="module")
def made():
    """An atlas of layers of several kinds, one of them left out, with controls and data."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("<b>&first", nn.Conv2d(3, 6, 3))
    model.add_module("pointwise", nn.Conv2d(6, 8, 1))
    model.add_module("depthwise", nn.Conv2d(8, 8, 3, groups=8))
    model.add_module("line", nn.ConvTranspose2d(8, 4, (1, 4), groups=2))
    return tnc.atlas(model, calibration=[torch.randn(8, 3, 9, 9)], controls=("random", "shuffled"), seed=4)


# --- files and frames ---------------------------------------------------------------------------------------


def test_an_atlas_goes_through_json_as_it_is(made, tmp_path):
    made.save(tmp_path / "a.json")
    again = tnc.CutAtlas.load(tmp_path / "a.json")
    assert again == made
    assert json.loads(json.dumps(again.to_dict())) == json.loads((tmp_path / "a.json").read_text())
    with pytest.raises(FileExistsError, match="is there already"):
        made.save(tmp_path / "a.json", overwrite=False)


def test_an_atlas_of_more_values_than_settings_may_have_is_read(tmp_path, monkeypatch, made):
    monkeypatch.setattr("tncompress.textfiles.MAX_VALUES", 10)
    made.save(tmp_path / "a.json")
    assert tnc.CutAtlas.load(tmp_path / "a.json") == made
    monkeypatch.setattr("tncompress.cut_atlas.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="take fewer layers"):
        made.save(tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def spoilt(made, **changes):
    fields = copy.deepcopy(made.to_dict())
    for path, value in changes.items():
        *way, last = (int(part) if part.isdigit() else part for part in path.split("__"))
        at = fields
        for part in way:
            at = at[part]
        at[last] = value
    return fields


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2, this release reads 1"),
        ({"rows__0__entropy": 9.0}, "has entropy 9, its spectrum"),
        ({"rows__0__spectrum": 99999}, "names spectrum 99999 of"),
        ({"rows__0__shape": [3, 3, 3, 3]}, "has 3 singular values"),
        ({"rows__0__cut": "up|down"}, "unknown leg"),
        ({"rows__0__kernel": "wild"}, "rows.0.kernel"),
        ({"spectra__0__0": math.nan}, "spectra.0.0"),
        ({"spectra__0": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}, "not sorted"),
        ({"losses": [0]}, "losses.0"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(made, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        tnc.CutAtlas.from_dict(spoilt(made, **changes))
    assert "\n" not in str(error.value)


def test_text_that_is_no_atlas_is_refused(tmp_path):
    for text, words in (("{", "not valid JSON"), ('{"a": NaN}', "NaN is no number"), ("[]", "no atlas")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            tnc.CutAtlas.load(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_frames_have_a_line_for_each_row(made, kind, monkeypatch):
    pytest.importorskip(kind)
    frame = made.to_frame(kind, spectra=True)
    assert len(frame) == len(made.rows)
    for number in (0, 5, len(made.rows) - 1):
        row = made.rows[number]
        get = frame.iloc[number] if kind == "pandas" else frame.row(number, named=True)
        assert (get["layer"], get["cut"], get["full"]) == (row.layer, row.cut, row.full)
        assert get["entropy"] == row.entropy
        assert get["rank_for_0.1"] == row.rank_for(0.1)
        assert get["params_for_0.1"] == row.params_ratio(row.rank_for(0.1))
        assert list(get["spectrum"]) == list(row.spectrum)
    assert "spectrum" not in made.to_frame(kind).columns
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ImportError, match=rf"needs {kind}: pip install {kind}"):
        made.to_frame(kind)


def test_rows_are_found_in_any_spelling_of_a_cut(made):
    assert made.select(cut="in kh kw|out", kernel="trained") == made.select(cut="out|rest", kernel="trained")
    (row,) = made.select(layer="pointwise", cut="kh in|rest", kernel="trained", metric="norm")
    assert row.cut == "out kw|in kh"
    for options, words in (
        ({"layer": "x"}, "no layer 'x'; it has .*pointwise"),
        ({"metric": "x"}, "no metric 'x'; it has norm, data"),
        ({"cut": "kd|rest"}, "no cut 'kd|rest' there; it has out"),
    ):
        with pytest.raises(ValueError, match=words):
            made.select(**options)


@pytest.mark.usefixtures("unchecked")
def test_no_other_frames_are_known(made):
    with pytest.raises(ValueError, match="a frame is of 'pandas' or 'polars', got 'table'"):
        made.to_frame("table")


def test_the_trend_with_depth_is_spearmans():
    rows = [
        tnc.CutRow(str(i), i, "out|rest", "trained", "norm", (2, 9, 3, 3), 1, (1.0, s))
        for i, s in enumerate((0.9, 0.5, 0.6, 0.1), 1)
    ]
    atlas = tnc.CutAtlas(tuple(rows))
    assert atlas.trend("out|rest") == pytest.approx(-0.8)
    assert atlas.trend("out|rest", "rank") == pytest.approx(-0.8)
    assert tnc.CutAtlas(tuple(rows[:2])).trend("out|rest") is None
    with pytest.raises(ValueError, match="entropy, rank, params, got 'size'"):
        atlas.trend("out|rest", "size")


def test_tables_state_entropies_means_and_what_was_left_out(made):
    text, markdown = str(made), made.to_markdown()
    row = made.select(layer="pointwise", cut="out|rest", kernel="trained", metric="norm")[0]
    for shown in (text, markdown):
        for word in ("<b>&first", "2x4x1x4 /2", f"{row.relative_entropy:.3f}", "mean, shuffled", "depthwise"):
            assert word in shown, word
    assert "out\\|rest" in markdown
    assert "outputs on 8 images, beside random and shuffled kernels, 1 left out" in text


# --- figures and the page -----------------------------------------------------------------------------------


def draw(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def words_of(figure):
    from matplotlib.text import Text

    draw(figure)
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("metric", ["norm", "data"])
def test_figures_have_titles_labels_units_and_a_legend(made, metric):
    entropy = words_of(made.plot_entropy(metric=metric))
    for word in (
        "out|rest",
        "entropy (nats)",
        "depth (number of the layer)",
        "log(full rank)",
        "random kernels",
    ):
        assert word in entropy, word
    spectra = words_of(made.plot_spectra(metric=metric))
    for word in ("σₖ / σ₁", "place k / full rank", "random kernels, range over layers"):
        assert word in spectra, word
    for measure, name in (
        ("entropy", "correlation entropy / log(full rank)"),
        ("params", "norm loss at a quarter"),
    ):
        heat = words_of(made.plot_heatmap(measure, metric=metric))
        assert any(name in word for word in heat)
        assert "pointwise  8×6×1×1" in heat
    (row,) = made.select(layer="pointwise", cut="out|rest", kernel="random", metric=metric)
    assert f"{row.relative_entropy:.2f}" in words_of(made.plot_heatmap(kernel="random", metric=metric))
    if metric == "data":
        assert any("norm of the layer's output" in word for word in entropy)


def test_nothing_of_a_figure_is_drawn_beyond_its_edge(made):
    for figure in (made.plot_entropy(), made.plot_spectra(), made.plot_heatmap()):
        box = draw(figure).get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


def test_kernels_of_any_kind_can_be_drawn():
    zero = nn.Conv2d(4, 4, 3)
    zero.weight.data.zero_()
    for layers in (
        [nn.Conv1d(3, 4, 5)],
        [nn.Conv3d(2, 3, (1, 2, 3)), nn.Conv2d(3, 1, 1), nn.Linear(4, 5)],
        [zero],
        [nn.Conv2d(1, 1, 1)],
    ):
        atlas = tnc.atlas(nn.Sequential(*layers), linear=True)
        for figure in (atlas.plot_spectra(), atlas.plot_entropy(), atlas.plot_heatmap("params")):
            draw(figure)
        assert str(atlas)
        assert tnc.CutAtlas.from_dict(atlas.to_dict()) == atlas


def test_matplotlib_is_imported_where_it_is_used_and_without_pyplot():
    code = (
        "import sys, torch, tncompress as tnc\n"
        "assert not any(name.split('.')[0] in ('matplotlib', 'pandas', 'polars') for name in sys.modules)\n"
        "atlas = tnc.atlas(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))\n"
        "import matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "atlas.to_html()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict.__eq__(before, matplotlib.rcParams)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Checker(HTMLParser):
    """Sees to it that tags are closed in order, and gathers addresses and text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text, self.images = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]
        self.images += tag == "img"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(made, tmp_path):
    made.save_html(tmp_path / "page.html", "a < b")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert checker.images == 10
    assert all(address.startswith("data:image/png;base64,") for address in checker.addresses)
    assert not re.search(r"https?:|@import|url\(|<script", page)
    assert "<b>" not in page
    text = "".join(checker.text)
    assert "<b>&first" in text
    assert "a < b" in text
    assert "Left out" in text
    rows = page.count("<tr>") - page.count("<thead>")
    assert rows >= len(made.rows)


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_a_folder_or_a_file(run, tmp_path):
    torch.manual_seed(0)
    dense = tnc.build_model("zoo:cnn4").eval()
    tnc.save_weights(dense, tmp_path / "w.safetensors")
    model = "atlas --model zoo:cnn4 --weights w.safetensors"
    shown = run(f"{model} --controls --seed 1 --out made")
    assert "conv4" in shown.stdout
    assert "mean, shuffled" in shown.stdout
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"atlas.json", "atlas.html", "atlas.md", "atlas.csv", "entropy.png", "spectra.png"} <= names
    held = tnc.CutAtlas.load(tmp_path / "made" / "atlas.json")
    wanted = tnc.atlas(dense, controls=("random", "shuffled"), seed=1)
    assert held.rows == wanted.rows
    lines = (tmp_path / "made" / "atlas.csv").read_text().splitlines()
    assert len(lines) == 1 + len(held.rows)
    printed = json.loads(run(f"{model} --linear --losses 0.1,0.5 --json").stdout)
    assert printed["losses"] == [0.1, 0.5]
    assert {row["layer"] for row in printed["rows"]} == {"conv1", "conv2", "conv3", "conv4", "fc"}
    for suffix in ("json", "md", "csv"):
        run(f"{model} --data digits --calibrate 32 --out one.{suffix}")
    held = tnc.CutAtlas.load(tmp_path / "one.json")
    assert (held.metrics, held.images, len(held.rows)) == (("norm", "data"), 32, 56)
    assert "in the norm of the output" in (tmp_path / "one.md").read_text()
    assert "is there already" in run(f"{model} --out one.md", code=1).stderr
    run(f"{model} --out one.md --overwrite")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--out page.pdf", "--out is a folder, or a file that ends in .json, .html, .md, .csv, got page.pdf"),
        ("--losses a,b", "--losses are numbers with commas between them, got 'a,b'"),
        ("--losses 2", "a norm loss is a number between 0 and 1, got 2.0"),
        ("--calibrate 8", "--calibrate takes its images from --data"),
        ("--weights none.safetensors", "none.safetensors"),
        ("--include everything", "include"),
        ("--out taken", "holds other files"),
    ],
)
def test_wrong_use_of_the_command_is_one_line(run, tmp_path, line, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    result = run(f"atlas --model zoo:cnn4 {line}", code=1)
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


# --- side by side -------------------------------------------------------------------------------------------


def threads_of_a_new_thread():
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return seen[0]


def test_pieces_run_on_one_core_each_and_nobody_else_notices():
    before, fresh = torch.get_num_threads(), threads_of_a_new_thread()
    torch.set_num_threads(3)
    try:
        meet, seen, told = threading.Barrier(2, timeout=20), [], []

        def work(item):
            meet.wait()  # two at a time, or never
            seen.append((torch.get_num_threads(), threads_of_a_new_thread()))
            return item * item

        assert side_by_side(work, [1, 2, 3, 4], threads=2, done=told.append) == [1, 4, 9, 16]
        assert seen == [(1, 3)] * 4
        assert sorted(told) == [1, 2, 3, 4]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads_of_a_new_thread() == fresh


def test_the_dearest_work_is_begun_first():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.02)

    assert side_by_side(work, [3, 1, 9, 5, 2], threads=2, cost=lambda item: item) == [None] * 5
    assert set(begun[:2]) == {9, 5}
    assert begun[-1] in (1, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_error_ends_it(threads):
    begun = []

    def work(item):
        begun.append(item)
        if item == 0:
            raise ValueError("item 0")
        threading.Event().wait(0.05)

    with pytest.raises(ValueError, match="item 0"):
        side_by_side(work, list(range(50)), threads=threads)
    assert len(begun) < 25


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_error_of_work_side_by_side_is_that_of_the_first_item_which_has_one(threads):
    def work(item):
        time.sleep(0.05 if item == 1 else 0.0)
        if item:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(work, [0, 1, 2, 3], threads=threads)


def test_an_atlas_is_the_same_on_any_number_of_cores():
    """But for rounding: LAPACK's last digits depend on where in memory a matrix lies."""
    model = nn.Sequential(*(nn.Conv2d(6, 5 + i, 3) for i in range(6)))
    alone = tnc.atlas(model, controls=("random", "shuffled"))
    with with_threads(3):
        beside = tnc.atlas(model, controls=("random", "shuffled"))
    assert replace(beside, rows=alone.rows) == alone
    for row, other in zip(beside.rows, alone.rows, strict=True):
        assert row.spectrum == pytest.approx(other.spectrum, rel=1e-10)
        assert replace(row, spectrum=other.spectrum) == other
