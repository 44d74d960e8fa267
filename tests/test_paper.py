"""The paper's experiment: rows out of results, statistics of rows, and the page that is made of them."""

import json
from pathlib import Path

import pytest
import run
import science_figures
import science_page
import science_rows
import torch
from torch import nn

import tncompress as tnc
from tncompress.data import load_data

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A tiny network swept and trained again on a few digits, as `run.py` lays it out."""
    folder = tmp_path_factory.mktemp("results") / "tiny-digits-0"
    folder.mkdir()
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    data = load_data("digits")
    batches = [(x[:, :, ::4, ::4], y) for x, y in list(data.test_loader(50))[:2]]
    tnc.atlas(model, controls=("random", "shuffled")).save(folder / "atlas.json")
    options = {"images": [x for x, _ in batches], "workers": 1}
    tnc.sweep(model, batches, fractions=(0.3, 0.6), **options).save(folder / "sweep.json")
    again = tnc.sweep(
        model,
        batches,
        layers="all",
        cuts=[("out|rest",)],
        fractions=(0.3,),
        retrain={"epochs": 2},
        train_loader=batches,
        **options,
    )
    again.save(folder / "again-0.json")
    about = {"network": "tiny", "data": "digits", "seed": 0, "torch": "2", "python": "3", "device": "cpu"}
    (folder / "about.json").write_text(json.dumps(about))
    return folder.parent


def test_rows_are_those_of_atlas_and_sweep(results):
    rows = list(science_rows.collect(results))
    sweep = tnc.Sweep.load(results / "tiny-digits-0" / "sweep.json")
    swept = science_rows.of(rows, "sweep")
    assert [row["before"] for row in swept] == [row.before.accuracy for row in sweep.rows]
    assert {(row["layer"], row["depth"]) for row in swept} == {("0", 1), ("3", 2)}
    atlas = science_rows.of(rows, "atlas")
    assert len(atlas) == 2 * 7 * 3
    assert {row["kernel"] for row in atlas} == {"trained", "random", "shuffled"}
    (again,) = science_rows.of(rows, "again")
    assert len(again["dense"]) == len(again["manifold"]) == len(again["control"]) == 2


def test_page_and_figures_are_written_and_written_again_from_the_rows(results, tmp_path):
    science_page.write_page(results, tmp_path)
    first = (tmp_path / "science.md").read_text()
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert pictures == [f"tiny-digits-{name}.png" for name in ("again", "entropy", "norm-loss")]
    assert all(f"figures/{name}" in first for name in pictures)
    (tmp_path / "science.md").unlink()
    science_page.write_page(tmp_path / "nothing", tmp_path)
    assert (tmp_path / "science.md").read_text() == first


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(0.0, 0.0), (0.2, 0.005), (0.4, 0.015)], (0.3, True)),
        ([(0.0, 0.0), (0.5, 0.02)], (0.25, True)),
        ([(0.0, 0.0), (0.5, 0.009)], (0.5, False)),
        ([(0.0, 0.0), (0.1, -0.01), (0.2, 0.03)], (0.15, True)),
    ],
)
def test_the_tolerated_norm_loss_is_where_a_point_is_lost(points, found):
    loss, reached = science_rows.tolerated(points)
    assert (round(loss, 9), reached) == found


def test_drift_is_the_part_that_comes_back():
    key = {"network": "n", "data": "d", "seed": 0}
    rows = [{"what": "dense", "before": 0.9, "after": 0.9, "images": 1} | key]
    for before, after in ((0.5, 0.8), (0.895, 0.9), (None, 0.4)):
        rows.append({"what": "sweep", "depth": 3, "before": before, "after": after} | key)
    ((depth, share),) = science_rows.drift_shares(rows, "n", "d")
    assert depth == 3
    assert share == pytest.approx(0.75)


def test_the_page_in_the_docs_is_that_of_its_rows():
    rows = science_rows.read(DOCS / "science.jsonl")
    assert (DOCS / "science.md").read_text() == science_page.page(rows)
    for name, _ in science_figures.figures(rows):
        assert (DOCS / "figures" / f"{name}.png").stat().st_size > 10_000


def test_every_setting_is_a_grid_that_can_be_swept():
    for setting in run.SETTINGS.values():
        assert all(0 < fraction < 1 for fraction in setting.fractions)
        assert setting.again <= len(run.AGAIN)
