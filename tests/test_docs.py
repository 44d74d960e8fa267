"""The documentation: what stands on its pages runs, and says what the code and the rows say."""

import importlib
import inspect
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import geometry_grid
import landing_picture
import pytest
import torch
import zoo_table
from accuracy_at_size import read
from doc_blocks import ROOT, Block, blocks, check_command, commands, pages, run_python
from PIL import Image

import tncompress as tnc
import tncompress.data
from tncompress.cli import app
from tncompress.html_report import SECTIONS
from tncompress.zoo import CNN4

DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
WITH_PYTHON = [name for name, page in PAGES.items() if any(b.kind == "python" for b in blocks(page))]


# --- blocks of code -----------------------------------------------------------------------------------------


def readme(monkeypatch):
    """Loaders that the README leaves to its reader, a hub that is not there, and less work on ResNet-18."""
    x, y = torch.randn(4, 3, 64, 64), torch.randint(1000, (4,))
    uploaded = inspect.signature(tnc.push_to_hub)
    monkeypatch.setattr(tnc, "bench", partial(tnc.bench, ways=["eager"], seconds=0.01))

    def repair(small, dense, batches, mend=tnc.repair):
        return mend(small, dense, batches, least_squares="all" if isinstance(small, CNN4) else False)

    monkeypatch.setattr(tnc, "repair", repair)
    monkeypatch.setattr(tnc, "push_to_hub", lambda *args, **kwargs: uploaded.bind(*args, **kwargs))
    return {"batches": [x], "train_loader": [(x, y)], "val_loader": [(x, y)]}


def own_images(monkeypatch):
    """A folder of photographs, read as small ones, and a small network in place of what is downloaded."""
    load = tncompress.data.load_data
    monkeypatch.setattr(tncompress.data, "load_data", lambda name, image_size: load(name, image_size=32))
    timm, models = importlib.import_module("timm"), importlib.import_module("torchvision.models")
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: make(name, **options))
    monkeypatch.setattr(models, "resnet18", lambda weights: tnc.build_model("zoo:resnet20", in_channels=3))
    for split, count in (("train", 6), ("val", 3)):
        for shade, kind in enumerate(("cat", "dog")):
            folder = Path("photos", split, kind)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (80, 60), (90 * shade, 20 * number, 99)).save(folder / f"{number:04}.jpg")
    return {}


TAKEN_FOR_GRANTED = {"README.md": readme, "docs/howto/own-images.md": own_images}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_on_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch, unchecked, quick_cp):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"__name__": "__main__"} | TAKEN_FOR_GRANTED.get(name, lambda _: {})(monkeypatch)
    for block in blocks(PAGES[name]):
        if block.kind == "python":
            run_python(block, names)


COMMANDS = [
    pytest.param(words, id=f"{block.page}-{block.line}-{' '.join(words)[:40]}")
    for page in PAGES.values()
    for block in blocks(page)
    if block.kind == "console"
    for words in commands(block)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_on_a_page_could_be_given(words):
    check_command(words)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tncompress plan --modle zoo:cnn4", "modle"),
        ("tncompress plan", "model"),
        ("tncompress pln --model zoo:cnn4", "no command 'pln'"),
        ("make dmeo", "no target 'dmeo'"),
        ("pip install '.[rya]'", "no extra"),
        ("python examples/gone.py", "there is no"),
        ("python examples/zoo_table.py --walk x", "knows no --walk"),
        ("torchrun --nproc-per-node 2 -m tncompress finetune small --data digits --ouch x", "ouch"),
        ("rm -r docs", "nothing is known"),
    ],
)
def test_a_command_that_does_not_exist_is_found_out(text, complaint):
    (words,) = commands(Block("console", text + "\n", "page", 1))
    with pytest.raises(Exception, match=complaint):  # of whoever parses it
        check_command(words)


def test_code_on_a_page_that_is_wrong_is_found_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\n>>> 1 + 1\n3\n```\n\n```python\nx = 1\nassert x == 2\n```\n")
    doctest, plain = blocks(page)
    assert (doctest.line, plain.line) == (4, 9)
    with pytest.raises(AssertionError, match="line 4"):
        run_python(doctest, {})
    with pytest.raises(AssertionError):
        run_python(plain, {})


def test_blocks_have_a_language_that_somebody_checks():
    known = {"python", "console", "yaml", "text", "toml", ""}
    for page in PAGES.values():
        for block in blocks(page):
            assert block.kind in known, f"{block.page}:{block.line} has a block of {block.kind!r}"


@pytest.mark.parametrize("page", ["troubleshooting", "read-a-plan"])
def test_messages_on_a_page_are_those_of_the_code(page):
    source = "\n".join(path.read_text() for path in (ROOT / "tncompress").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that go on in the next line
    lines = (DOCS / "howto" / f"{page}.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    cells = [line.split(" | ")[0].strip("| ") for line in tables]
    shown = [cell for cell in cells if cell not in ("---", "it says", "what it says")]
    assert len(shown) > 10
    for cell in shown:
        for part in re.split(r"'?\.\.\.'?|, |[()]", cell):
            assert part.strip() in source, cell


def test_the_page_on_the_report_names_its_parts_and_what_it_says():
    text = (DOCS / "howto" / "html-report.md").read_text()
    for _, name in SECTIONS:
        assert f"\n| {name}" in text
    source = "".join(path.read_text() for path in (ROOT / "tncompress").glob("html_*.py"))
    told = text.split("| it says |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(told) >= 4
    for line in told:
        assert line.split(" | ")[0].strip("| .") in source


def test_specs_on_pages_can_be_read():
    read_ = 0
    for page in PAGES.values():
        for block in blocks(page):
            if block.kind == "yaml" and re.search("^(default|budget):", block.text, re.MULTILINE):
                yaml = importlib.import_module("yaml")
                fields = yaml.safe_load(block.text)
                tnc.Spec.parse(fields)
                read_ += 1
    assert read_ >= 3


# --- the reference ------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference_once():
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:class|function):: tncompress\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(tnc.__all__)


def test_what_is_a_class_is_documented_as_one():
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    for name in tnc.__all__:
        kind = "class" if isinstance(getattr(tnc, name), type) else "function"
        assert f".. auto{kind}:: tncompress.{name}\n" in text


def test_every_public_name_and_its_methods_say_what_they_are():
    for name in tnc.__all__:
        found = getattr(tnc, name)
        assert inspect.getdoc(found), name
        if isinstance(found, type):
            for key, member in vars(found).items():
                own = getattr(member, "__func__", member)
                if not key.startswith("_") and inspect.isfunction(own):
                    assert inspect.getdoc(getattr(found, key)), f"{name}.{key}"


def test_the_page_of_commands_has_every_command_and_option(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS / "_ext"), *sys.path])
    text = importlib.import_module("commands").commands_page()
    typer = importlib.import_module("typer")
    for name, command in typer.main.get_command(app).commands.items():
        section = text.split(f"\n## {name}\n" if name != "demo" else "## demo\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in section, (name, parameter.opts)
        assert "Example:" not in section  # it became a block


# --- pages of numbers ---------------------------------------------------------------------------------------


def test_the_pictures_on_the_first_page_show_the_rows():
    rows = list(read(landing_picture.RESULTS))
    for network in landing_picture.NETWORKS:
        shown = {"network": network, "accuracy": landing_picture.points(rows, network)}
        for theme in landing_picture.THEMES:
            picture = landing_picture.FIGURES / f"landing-{network}-{theme}.svg"
            assert landing_picture.shown_in(picture) == shown
            assert picture.name in (DOCS / "index.md").read_text()
    said = " ".join((DOCS / "index.md").read_text().split())
    assert landing_picture.sentence(rows) in said


def test_a_picture_shows_what_it_was_given(tmp_path):
    shown = {"dense": [90.0]} | {name: [80.0, 70.0, 60.0, 50.5] for name in landing_picture.LINES}
    landing_picture.draw(shown, "cnn4", "dark", tmp_path / "p.svg")
    assert landing_picture.shown_in(tmp_path / "p.svg") == {"network": "cnn4", "accuracy": shown}


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    trees = "\n".join(re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL))
    listed = re.findall(r"^([\w/-]+)$", trees, re.MULTILINE)
    for name, page in PAGES.items():
        place = str(page.relative_to(DOCS).with_suffix("")) if page.is_relative_to(DOCS) else None
        if place not in (None, "index", "tutorials"):
            assert place in listed, f"{name} is on no list"


@pytest.mark.slow
def test_the_page_of_geometries_is_what_the_grid_finds(tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(sys, "argv", ["geometry_grid.py", "--out", str(tmp_path / "page.md")])
    with warnings.catch_warnings():
        geometry_grid.main()
    made, kept = (
        path.read_text().split("\nMade with ")[0] for path in (tmp_path / "page.md", DOCS / "geometries.md")
    )
    assert made == kept


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "squeezenet1_0", "mobilenet_v2"])
def test_the_page_of_models_says_what_a_plan_says(name):
    lines = [line.strip("| ").split(" | ") for line in (DOCS / "zoo.md").read_text().splitlines()]
    (kept,) = (cells for cells in lines if cells[0] == name)
    *made, _ = zoo_table.table_row("classification", name, {})
    assert kept[: len(made)] == made


def test_every_page_of_numbers_is_compared_with_what_it_was_made_from():
    index = (DOCS / "index.md").read_text()
    measured = index.split(":caption: Measured\n")[1].split("```")[0].split()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in measured if f'"{name}.md"' not in tests] == []
