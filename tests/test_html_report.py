"""The report as a page: whole, harmless, honest about what is not known, and readable in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pages import HISTORY, HOSTILE, Checker, deep, hostile, one_layer, report_of
from torch import nn

import tncompress as tnc
from tncompress import report_plots
from tncompress.measure import accuracy_interval
from tncompress.pages import source_of
from tncompress.recovery_record import Recovery, read_recovery

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MAKE = {"one": one_layer, "deep": deep, "hostile": hostile}


@pytest.fixture(scope="module", autouse=True)
def _plotly():
    pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def reports():
    return {name: make() for name, make in MAKE.items()}


@pytest.fixture(scope="module")
def texts(reports):
    return {name: report.to_html(f"A report of {name}") for name, report in reports.items()}


# --- the page as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_the_page_is_whole_and_fetches_nothing(texts, name):
    page = Checker(texts[name])
    assert len(page.ids) == len(set(page.ids))
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    for attrs in (attrs for _, attrs in page.tags):
        for key in ("aria-labelledby", "aria-label"):
            assert attrs.get(key, "x")
        assert set(attrs.get("aria-labelledby", page.ids[0]).split()) <= set(page.ids)
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    scripts = re.findall(r"<script>(.*?)</script>", texts[name], flags=re.DOTALL)
    made = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert made == allowed
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.split("script-src")[1]


def test_names_are_shown_letter_by_letter_and_are_nothing_else(texts, reports):
    page = Checker(texts["hostile"])
    text = "".join(page.text)
    for name in HOSTILE:
        assert f"parts.{name}" in text
    assert not page.of("img")
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert len(page.of("script")) == 3  # plotly.js, the figures as data, the glue
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', texts["hostile"])
    names = {line["name"] for line in json.loads(data)["spectrum-1"]["data"]}
    assert "parts.&lt;img src=x onerror=alert(1)&gt;" in names  # plotly.js reads markup
    assert "<img" not in json.dumps(json.loads(data))
    for words in (str(reports["hostile"]), reports["hostile"].to_markdown()):
        assert all(name in words.replace("\\|", "|") for name in HOSTILE[:2])


def test_what_is_not_known_is_said_in_words(texts):
    text = "".join(Checker(texts["one"]).text)
    for words in (
        "accuracy of this model was not measured",
        "No steps in between are recorded",
        "No training is recorded",
        "No spectra were taken",
    ):
        assert words in text
    assert "Plotly" not in texts["one"].replace(source_of("report.js"), "")
    assert 'class="drawing"' not in texts["one"]
    assert len(texts["one"]) < 60_000


def test_every_layer_is_in_the_table_with_its_reason_where_it_is_dense(texts, reports):
    for name, report in reports.items():
        rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", texts[name], flags=re.DOTALL)
        assert len(rows) == len(report.layers)
        plain = [re.sub(r"<wbr>", "", row) for row in rows]
        for layer, row in zip(report.layers, plain, strict=True):
            cells = "".join(Checker(row).text)
            assert layer.name in cells
            assert (layer.reason or str(layer.format)) in cells
            assert layer.format is None or f"{layer.kernel_error:.4f}" in cells


def test_tables_and_figures_can_be_read_out(texts):
    page = Checker(texts["deep"])
    assert all(head.get("scope") in ("col", "row") for head in page.of("th"))
    assert all(mark.get("type") == "button" for mark in page.of("button"))
    figures = [mark for mark in page.of("div") if mark.get("class") == "drawing"]
    assert len(figures) == 1 + 2 * 7
    assert all(mark["role"] == "img" and len(mark["aria-label"]) > 20 for mark in figures)
    assert page.of("html")[0]["lang"] == "en"
    assert page.tags[[tag for tag, _ in page.tags].index("body") + 1][1]["class"] == "skip"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_two_hundred_layers_make_a_small_page(texts, reports):
    assert len(reports["deep"].layers) == 200
    library = len(tnc.html_report.plotly_script())
    assert len(texts["deep"]) - library < 400_000
    assert texts["deep"].count("<svg") < 10  # layers of the same network share its diagram


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_from_the_paper(theme):
    parts = source_of("page.css").split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#\w+)", parts[0].split("body {")[0]))
    if theme == "dark":
        colours |= dict(re.findall(r"--(\w+): (#\w+)", parts[1].split("} }")[0]))
    for ink in ("fg", "muted", "accent", "good", "bad"):
        for paper in ("bg", "card", "shade"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    for line in (report_plots.BLUE, report_plots.ORANGE, report_plots.GREEN, report_plots.GREY):
        assert contrast(line, colours["bg"]) >= 3, line
    for depth in range(1, 11):
        assert contrast(report_plots.colour_of(depth, 10), colours["bg"]) >= 3


def contrast(one, other):
    """Return the contrast of two colours as WCAG 2 has it."""

    def light(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["deep", "hostile"])
def test_figures_are_what_plotly_knows(reports, name):
    go = pytest.importorskip("plotly.graph_objects")
    report = reports[name]
    plots = [report_plots.recovery_plot(report.recovery)]
    plots += [*report_plots.spectra_plots(report.atlas), *report_plots.entropy_plots(report.atlas)]
    for plot in plots:
        go.Figure(plot.figure)
        assert all(len(line["x"]) == len(line["y"]) > 0 for line in plot.figure["data"])
        assert len(plot.figure["data"]) <= report_plots.MOST_LINES


def test_without_plotly_one_line_says_what_to_install(reports, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"need plotly.*pip install tncompress\[report\]"):
        reports["deep"].to_html()
    reports["one"].save_html(tmp_path / "one.html")  # which has no curves


# --- what is measured and recorded --------------------------------------------------------------------------


def test_errors_of_a_fresh_compression_are_those_that_the_plan_promised():
    model = nn.Sequential(nn.Conv2d(6, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2)).double()
    batches = [torch.randn(16, 6, 11, 9, dtype=torch.float64).relu() for _ in range(2)]
    spec = {"default": {"format": "tucker", "rank": {"params_ratio": 0.4}}, "keep_dense": []}
    small = tnc.compress(model, spec, calibration=batches)
    told = tnc.report(model, small, example_inputs=batches[0], batches=batches, seconds=0.01)
    for layer, planned in zip(told.layers, small.tncompress_plan.layers, strict=True):
        assert layer.kernel_error == pytest.approx(planned.rel_error, rel=1e-6)
        assert layer.output_error == pytest.approx(planned.output_error, rel=1e-6)
        assert (layer.params, layer.params_dense) == (planned.params, planned.params_dense)
    assert sum(layer.macs_dense for layer in told.layers) == told.dense.macs
    assert sum(layer.macs for layer in told.layers) == told.compressed.macs


def test_the_error_of_an_output_is_about_the_mean_of_each_channel():
    model = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)).double()
    batches = [torch.rand(8, 6, 5, 4, dtype=torch.float64) for _ in range(2)]
    small = tnc.compress(model, {"default": {"format": "mps", "rank": {"fixed": 2}}, "keep_dense": []})
    told = tnc.report(model, small, example_inputs=batches[0], batches=batches, seconds=0.01)
    x = torch.cat(batches)
    for place, layer in ((0, told.layers[0]), (2, told.layers[1])):
        given = model[:place](x)
        wanted = model[place](given).detach()
        missed = (wanted - small[place](given)).detach()
        parts = [t - t.mean((0, 2, 3), keepdim=True) for t in (missed, wanted)]
        assert layer.output_error == pytest.approx(float(parts[0].norm() / parts[1].norm()), rel=1e-9)


def test_a_model_without_a_plan_is_reported_layer_by_layer():
    dense = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, 1))
    small = nn.Sequential(tnc.TNConv.from_dense(dense[0], tnc.Tucker(), (3, 4)), dense[1])
    told = tnc.report(dense, small, example_inputs=torch.randn(1, 6, 5, 5), seconds=0.01)
    assert [str(layer.format) for layer in told.layers] == ["tucker", "None"]
    assert told.layers[0].planned_error == pytest.approx(told.layers[0].kernel_error, rel=1e-4)
    assert "without its plan" in told.layers[1].reason
    assert "without its plan" in told.to_html()
    plain = tnc.report(nn.ReLU(), nn.ReLU(), example_inputs=torch.randn(1, 3), seconds=0.01)
    assert "no convolution or linear layer" in plain.to_html()


def test_what_speaks_against_the_latencies_is_told(monkeypatch):
    monkeypatch.setattr("tncompress.noise.Load.others", 1.5)
    told = report_of(nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)))
    for text in (told.to_markdown(), str(told), "".join(Checker(told.to_html()).text)):
        assert "other processes took 1.5 of" in " ".join(text.split())


def test_the_way_of_the_accuracy_is_told_as_far_as_it_is_known():
    told = Recovery.of(HISTORY)
    assert [(step.name, step.accuracy) for step in told.steps] == [
        ("truncated", 0.4),
        ("repaired", 0.5),
        ("tuned", 0.94),
    ]
    assert [point.accuracy for point in told.points] == [0.5, 0.8, 0.94]
    plain = {key: value for key, value in HISTORY.items() if key != "steps"}
    assert [step.name for step in Recovery.of(plain).steps] == ["before tuning", "tuned"]
    assert [step.name for step in Recovery.of(plain, {"truncated": 0.4}).steps] == ["truncated", "tuned"]
    assert not Recovery.of(None)
    rounds = {"rounds": [{"truncated": 0.3, "repaired": 0.6, "epochs": [{"loss": 1, "accuracy": 0.9}]}] * 2}
    assert [point.place for point in Recovery.of(rounds).points] == [0, 0, 1, 1, 1, 2]
    losses = Recovery.of({"epochs": [{"loss": 1.0}, {"loss": 0.5}]})
    assert "loss" in report_plots.recovery_plot(losses).title


@pytest.mark.parametrize(
    "fields", [{"epochs": 3}, {"accuracy_start": 7}, {"steps": [{"name": "x"}]}, {"epochs": [{"loss": "x"}]}]
)
def test_a_damaged_history_is_one_line(fields, tmp_path):
    with pytest.raises(ValueError, match="this is no training history: "):
        Recovery.of(fields)
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history .*history.json is damaged"):
        read_recovery(tmp_path)


def test_an_interval_holds_the_accuracy_and_narrows_with_more_images():
    for accuracy in (0.0, 0.3, 0.99, 1.0):
        low, high = accuracy_interval(accuracy, 100)
        assert 0 <= low <= accuracy <= high <= 1
        closer = accuracy_interval(accuracy, 10_000)
        assert closer[1] - closer[0] < (high - low) / 5


def test_a_report_with_known_images_tells_their_spread():
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    data = [(torch.randn(40, 6, 6, 6), torch.randint(3, (40,)))]
    told = report_of(model, evaluate=lambda m: tnc.evaluate(m, data), steps={"truncated": 0.25})
    low, high = accuracy_interval(told.compressed.accuracy, 40)
    assert f"({100 * low:.1f} to {100 * high:.1f})" in str(told)
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in "".join(Checker(told.to_html()).text)
    assert "truncated 25.00 %" in told.to_markdown()


# --- the commands -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_record_the_way_and_the_page_tells_it(run, tmp_path):
    (tmp_path / "spec.yaml").write_text("default: {format: tucker, rank: {params_ratio: 0.1}}\n")
    run("train --model zoo:cnn4 --data digits --epochs 1 --out dense.safetensors")
    named = "--model zoo:cnn4 --data digits --weights dense.safetensors"
    run(f"compress {named} --spec spec.yaml --out small")
    run("repair small --data digits --images 64 --out repaired")
    run("finetune repaired --data digits --epochs 1 --no-control --out tuned")
    steps = [step.name for step in read_recovery(tmp_path / "tuned").steps]
    assert steps == ["truncated", "repaired", "tuned"]
    shown = run("report tuned --data digits --html made.html --out made.json")
    assert "Accuracy: dense" in shown.stdout
    text = "".join(Checker((tmp_path / "made.html").read_text()).text)
    assert "zoo:cnn4" in text
    assert "params_ratio: 0.1" in text
    assert json.loads((tmp_path / "made.json").read_text())["recovery"]["steps"][1]["name"] == "repaired"
    assert "is there already" in run("report tuned --data digits --html made.html", code=1).stderr
    (tmp_path / "dense.safetensors").unlink()
    without = run("report tuned --input 1x32x32 --html other.html")
    assert "weights are not known" in without.stderr
    text = "".join(Checker((tmp_path / "other.html").read_text()).text)
    assert "No spectra were taken" in text
    assert "kernel error now" not in text


def test_wrong_use_is_one_line(run, tmp_path, monkeypatch):
    assert "--html is a file that ends in .html" in run("report small --html page.pdf", code=1).stderr
    monkeypatch.setattr("tncompress.cli_result.find_spec", lambda name: None)
    lacking = run("report small --html page.html", code=1).stderr
    assert lacking == "error: --html needs plotly, which is not there: pip install tncompress[report]\n"


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here to open the page in: apt-get install chromium")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser, texts, tmp_path):
    """Open a page; whatever it logs as an error, raises, or asks of reader or network is a failure."""
    seen, pages = [], []

    def call(name, width=1280, **options):
        (tmp_path / "page.html").write_text(texts[name], encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda m: seen.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        page.route(
            "**/*",
            lambda route: (
                route.continue_()
                if route.request.url.startswith(("file:///", "data:", "blob:"))
                else (seen.append(route.request.url), route.abort())
            ),
        )
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield call
    for page in pages:
        page.close()
    assert not seen


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("name", MAKE)
def test_the_page_fits_and_draws_all_its_figures(opened, name, width):
    page = opened(name, width)
    drawn = page.locator(".drawing")
    assert page.locator(".drawing .main-svg .trace").count() >= drawn.count()
    assert all(drawn.nth(i).locator("svg").count() for i in range(drawn.count()))
    for folded in page.locator("details").all():
        folded.evaluate("node => node.open = true")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('.drawing, svg, pre, .card')].map(n => n.getBoundingClientRect())"
        ".map(r => r.right)"
    )
    assert max(sizes, default=0) <= width + 1


def column(page, number):
    return page.locator(f"table.sortable tbody tr > :nth-child({number})").evaluate_all(
        "cells => cells.map(c => c.dataset.value ?? c.textContent.trim())"
    )


def test_layers_are_sorted_by_mouse_and_by_keyboard(opened):
    page = opened("deep")
    heads = page.locator("table.sortable thead th")
    names = [name.strip() for name in heads.all_inner_texts()]
    before = column(page, 1)
    error = names.index("kernel error now") + 1
    heads.nth(error - 1).locator("button").click()
    assert heads.nth(error - 1).get_attribute("aria-sort") == "ascending"
    found = column(page, error)
    known = [float(value) for value in found if value]
    assert known == sorted(known)
    assert len(set(known)) > 100
    assert not any(found[len(known) :])  # what has no value comes last
    heads.nth(error - 1).locator("button").focus()
    page.keyboard.press("Enter")
    assert heads.nth(error - 1).get_attribute("aria-sort") == "descending"
    assert [float(value) for value in column(page, error) if value] == known[::-1]
    assert not any(column(page, error)[len(known) :])
    page.keyboard.press("Shift+Tab")  # the column before
    page.keyboard.press("Space")
    assert page.locator("table.sortable thead th[aria-sort]").count() == 1
    heads.nth(1).locator("button").click()
    assert column(page, 1) == before
    heads.nth(0).locator("button").click()
    assert column(page, 1) == sorted(before, key=lambda name: [int(part) for part in name.split(".")])


def test_the_keyboard_gets_past_the_head_to_every_part(opened):
    page = opened("one")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    focused = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.tagName"))
    assert {"BUTTON", "DIV", "A", "SUMMARY", "PRE"} <= set(focused)


def test_the_page_is_dark_where_the_reader_is_and_white_on_paper(opened):
    colour = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.drawing .xtick text')).fill"
    light, dark = opened("deep", color_scheme="light"), opened("deep", color_scheme="dark")
    assert light.evaluate(colour) != dark.evaluate(colour)
    assert light.evaluate(ink) != dark.evaluate(ink)
    dark.emulate_media(media="print")
    assert dark.evaluate(colour) == "rgb(255, 255, 255)"
    assert len(dark.pdf()) > 10_000


def test_the_example_takes_a_picture_and_prints(texts, tmp_path):
    pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here to open the page in: apt-get install chromium")
    (tmp_path / "one.html").write_text(texts["one"], encoding="utf-8")
    script = Path(__file__).parents[1] / "examples" / "report_picture.py"
    for name, start in (("one.png", b"\x89PNG"), ("one.pdf", b"%PDF")):
        line = [sys.executable, script, "one.html", "--out", name, "--width", "375", "--dark"]
        subprocess.run(line, check=True, cwd=tmp_path)
        assert (tmp_path / name).read_bytes().startswith(start)
