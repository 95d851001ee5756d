"""The notebooks of colab/: executed from top to bottom, in a rehearsal of seconds."""

import ast
import base64
import functools
import importlib
import io
import json
import os
import re

import nbformat
import numpy as np
import pytest
import runs
from nbclient import NotebookClient
from PIL import Image

from clvsmim import analysis

COLAB = runs.ROOT / "colab"  # of a module that makes kernels share compilations
ATTENTION, REPRESENTATION = "self_attention_analysis", "representation_analysis"
BOTH = (ATTENTION, REPRESENTATION)
PRETRAIN = "pretrain"  # executed in test_pretrain_notebook.py
ALL = (*BOTH, PRETRAIN)
FIELDS = {name: "WORKDIRS TRAIN ZOO IMAGE_FOLDER MODEL IMAGE ARRAYS" for name in BOTH}
FIELDS[PRETRAIN] = "DATA METHODS LAMBDA LABELS IMAGES"
# The files of clvsmim/metrics whose kernels a notebook shows.
FILES = {
    ATTENTION: "distance nmi offsets rollout diversity maps cka",
    REPRESENTATION: "fourier amplitude spectrum rank dimension clusters displacement "
    "smoothing variance grams probe knn lidar",
}
SHARED = ["setup", "models-text", "models", "measure", "results", "looked-at"]
SHARED += ["drawings"]  # cells
FORM = re.compile(r"(?m)^([A-Z_]+) = (.+?)  # @param (.+)$")
MODELS = {"TRAIN": "moco_v3, simmim", "ZOO": "mini_simmim, mini_none"}
INLINE = "module://matplotlib_inline.backend_inline"  # what a kernel takes by default


@functools.cache
def read(name):
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def code(name):
    """{id: source} of the code cells, as Python: no magics."""
    cells = (cell for cell in read(name).cells if cell.cell_type == "code")
    return {c.id: re.sub(r"(?m)^( *)%.*$", r"\1pass", c.source) for c in cells}


def fill(cell, **values):
    """The cell as a user's form would leave it."""
    for field, value in values.items():
        there = rf"(?m)^{field} = .+?  #"
        assert re.search(there, cell.source), f"{cell.id} has no field {field}"
        line = f"{field} = {value!r}  #".replace("\\", r"\\")
        cell.source = re.sub(there, line, cell.source)


class Session:
    """A notebook and its kernel, which is that of a user with one device."""

    def __init__(self, name, folder, **first):
        self.notebook = nbformat.from_dict(read(name))
        self.cells = {cell.id: cell for cell in self.notebook.cells}
        for place, values in first.items():
            fill(self.cells[place], **values)
        self.client = NotebookClient(
            self.notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )

    def __enter__(self):
        env = os.environ | {
            "CLVSMIM_SMOKE": "1",
            "XLA_FLAGS": runs.flags(1),
            "MPLBACKEND": INLINE,
        }
        self.context = self.client.setup_kernel(env=env)
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def run(self, *places, **values):
        """Execute some cells, all by default, after filling in the first's form."""
        chosen = places or self.cells
        fill(self.cells[next(iter(chosen))], **values)
        for number, cell in enumerate(self.notebook.cells):
            if cell.id in chosen and cell.cell_type == "code":
                self.client.execute_cell(cell, number)

    def text(self, place):
        """What a cell printed and wrote, but for pictures."""
        outputs = self.cells[place].outputs
        told = (
            o.get("text") or o.get("data", {}).get("text/markdown") for o in outputs
        )
        return "\n".join(filter(None, told))

    def pictures(self, place):
        """The pictures of a cell, (h, w, 3) each."""
        data = [o.get("data", {}) for o in self.cells[place].outputs]
        found = [d["image/png"] for d in data if "image/png" in d]
        for page in (d.get("text/html", "") for d in data):
            found += re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(x))).convert("RGB"))
            for x in found
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both notebooks run: the second finds what the first trained."""
    return tmp_path_factory.mktemp("colab")


@pytest.fixture(scope="module")
def attention(folder):
    with Session(ATTENTION, folder, models=MODELS) as session:
        session.run()
        yield session


@pytest.fixture(scope="module")
def representation(folder, attention):
    with Session(REPRESENTATION, folder, models=MODELS) as session:
        session.run()
        yield session


@pytest.mark.parametrize("name", ALL)
def test_no_logic(name):
    for place, source in code(name).items():
        for node in ast.walk(ast.parse(source)):
            kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
            assert not isinstance(node, kinds), f"{place} defines something"


@pytest.mark.parametrize("name", ALL)
def test_as_committed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.colab.provenance == []
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("name", ALL)
def test_badge(name):
    colab, title = "https://colab.research.google.com", read(name).cells[0].source
    place = f"{colab}/github/clvsmim/clvsmim/blob/main/colab/{name}.ipynb"
    assert f"]({colab}/assets/colab-badge.svg)]({place})" in title


@pytest.mark.parametrize("name", ALL)
def test_forms(name):
    """Fields that Colab can read; a default is within its slider."""
    for place, source in code(name).items():
        fields = FORM.findall(source)
        assert len(fields) == source.count("@param"), place
        assert source.startswith("# @title") == bool(fields), place
        for field, value, form in fields:
            value, choice = ast.literal_eval(value), form.startswith("[")
            choices, options = (form if choice else "[]" + form).split("]")
            options = json.loads(options or "{}")
            if options.get("type") == "slider":
                steps = (value - options["min"]) / options["step"]
                assert options["min"] <= value <= options["max"], field
                assert abs(steps - round(steps)) < 1e-6, field
            else:
                assert isinstance(value, str), field
                assert not choice or value in json.loads(choices + "]"), field
    first = {f for fields in map(FORM.findall, code(name).values()) for f, *_ in fields}
    assert {"REPOSITORY", "LONGER", "FOLDER", *FIELDS[name].split()} <= first


@pytest.mark.parametrize("name", ALL)
def test_links(name):
    """Each names the two others."""
    for other in set(ALL) - {name}:
        assert f"main/colab/{other}.ipynb)" in read(name).cells[0].source


def test_what_is_shared_is_the_same():
    one, other = ({c.id: c.source for c in read(name).cells} for name in BOTH)
    for place in SHARED:
        assert one[place] == other[place], place
    third = {c.id: c.source for c in read(PRETRAIN).cells}
    for place in ("setup", "results"):
        assert one[place] == third[place], place


@pytest.mark.parametrize("name", BOTH)
def test_every_kernel_is_there(name):
    """Used, or named in the text, whole words."""
    words = set(re.findall(r"\w+", "\n".join(cell.source for cell in read(name).cells)))
    for file in FILES[name].split():
        module = importlib.import_module(f"clvsmim.metrics.{file}")
        assert set(module.__all__) <= words, file


@pytest.mark.parametrize("name", BOTH)
def test_every_quantity_drawn_is_measured(name, folder, attention):
    (tree,) = (ast.parse(s) for p, s in code(name).items() if p == "topics")
    names = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    found = analysis.read_series(f"{folder}/runs/x1/simmim/analysis")["series"]
    topics = {key.value for key in tree.body[0].value.keys}
    assert set(names) - topics - {""} <= {s.name for s in found}


def assert_drawn(session, *places):
    for place in places:
        found = session.pictures(place)
        assert found, f"{place} shows no picture"
        for picture in found:
            assert min(picture.shape[:2]) > 100 and picture.std() > 1, place


def test_attention(attention):
    shown = (
        "distance cls nmi entropy offsets diversity rollout-all cka-heads cka-depths"
    )
    drawn = ("maps", "everywhere", "rollout", "canvas", "own-figures", *shown.split())
    assert_drawn(attention, *drawn, "cka-positions", "cka-models")
    assert len(attention.pictures("distance")) == 4  # one of all, and one each
    assert "no 'mini_none' in the zoo of this" in attention.text("models")
    assert "| mini_simmim, block 6, head 1 |" in attention.text("one")
    one = attention.text("one")
    assert "| nmi |" in one and "nan" not in one
    assert "MoCo v3 (CL)" in attention.text("numbers")
    assert "nan" not in attention.text("numbers") + attention.text("own")
    biased, floor = re.findall(
        r"biased ([\d.]+), expected of it ([\d.]+)", attention.text("floor")
    )[0]
    assert floor == "0.923" and abs(float(biased) - 0.923) < 0.01


def test_representation(representation, folder):
    shown = "fourier plane tokens images ranks clusters translation displacement"
    shown += " smoothing taps models-cka probe neighbours own-figures"
    assert_drawn(representation, "one", "tsne", *shown.split())
    assert len(representation.pictures("ranks")) == 8  # alpha-ReQ needs more images
    assert "nan" not in representation.text("one-numbers") + representation.text("own")
    purity = re.search(r"same image: ([\d.]+)", representation.text("tsne"))[1]
    assert 0 < float(purity) <= 1
    assert len(re.findall(r"(?m)^\| \d+ \|", representation.text("claims"))) == 24
    assert "one seed: not judged" in representation.text("claims")
    assert (folder / representation.text("report").strip()).exists()


def test_the_second_notebook_measures_nothing_again(folder, attention, request):
    states = sorted(folder.glob("runs/**/state.npz"))
    before = [path.stat().st_mtime_ns for path in states]
    request.getfixturevalue("representation")
    assert len(before) == 3 and before == [p.stat().st_mtime_ns for p in states]


SLIDERS = ("maps", "everywhere", "one", "rollout", "canvas")


def test_other_sliders(attention):
    corner = dict(MODEL="moco_v3", IMAGE=63, BLOCK=2, HEAD=2, ROW=3, COLUMN=3)
    before = [attention.pictures(place)[0] for place in SLIDERS if place != "one"]
    attention.run(*SLIDERS, **corner)
    after = [attention.pictures(place)[0] for place in SLIDERS if place != "one"]
    for a, b in zip(before, after, strict=True):
        assert a.shape != b.shape or (a != b).any()
    assert "nearest" not in attention.text("maps")
    assert "| moco_v3, block 2, head 2 |" in attention.text("one")
    # Beyond what there is: the same picture, with a line for each.
    attention.run("maps", BLOCK=24, HEAD=16, ROW=31, COLUMN=31)
    told = attention.text("maps")
    for line in ("BLOCK 24", "HEAD 16", "ROW 31", "COLUMN 31"):
        assert f"{line} is not in" in told
    assert (attention.pictures("maps")[0] == after[0]).all()
    attention.run("maps", MODEL="mae")
    told = "no model 'mae' among moco_v3, simmim, mini_simmim: moco_v3 is shown"
    assert told in attention.text("maps")


def test_other_depths(representation):
    for depth, model in ((0, "simmim"), (2, "moco_v3")):
        representation.run("one", "one-numbers", DEPTH=depth, MODEL=model)
        assert_drawn(representation, "one")
        told = representation.text("one-numbers")
        assert f"| {model}, depth {depth}," in told and "nan" not in told
        assert ("translation_share" in told) == (depth > 0)
    before = representation.pictures("tsne")[0]
    representation.run("tsne", MODEL="moco_v3", DEPTH=6)
    assert "DEPTH 6 is not in 0 to 2" in representation.text("tsne")
    representation.run("tsne", MODEL="moco_v3", DEPTH=0)
    assert "nearest" not in representation.text("tsne")
    after = representation.pictures("tsne")[0]
    assert after.shape != before.shape or (after != before).any()


def test_a_quantity_that_was_not_measured(attention):
    attention.run("numbers", QUANTITY="attention distance of MAE")
    assert "was not measured; there are: attention distance;" in attention.text(
        "numbers"
    )


def test_own_images(attention, tmp_path):
    for i, shade in enumerate((40, 200)):
        pixels = np.full((30, 50, 3), shade, np.uint8)
        pixels[:, :20] = 120
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    attention.run("looked-at", "maps", IMAGE_FOLDER=str(tmp_path))
    assert f"2 images of {tmp_path}" in attention.text("looked-at")
    assert "IMAGE 63 is not in 0 to 1" in attention.text("maps")
    assert_drawn(attention, "maps")


def test_own_attention(attention, tmp_path):
    """Arrays of another model: two prefix tokens, 3 x 5 patches, three blocks."""
    logits = np.random.default_rng(0).normal(size=(3, 5, 2, 17, 17))
    logits[0] = 0
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    path = str(tmp_path / "mine.npz")
    np.savez(path, attention=weights, grid=(3, 5), patch=8, prefix=2)
    attention.run("own", "own-figures", ARRAYS=path)
    rows, columns = np.mgrid[:3, :5].reshape(2, 15)
    far = np.hypot(rows[:, None] - rows, columns[:, None] - columns) * 8
    assert f"{far.mean():.4f}".rstrip("0") in attention.text("own")
    assert len(attention.pictures("own-figures")) == 4


def test_own_residual(representation, tmp_path):
    stream = np.random.default_rng(0).normal(size=(7, 6, 17, 12))
    path = str(tmp_path / "mine.npz")
    np.savez(path, residual=stream, grid=(3, 5), prefix=2)
    representation.run("own", "own-figures", ARRAYS=path)
    assert "of 6 images, after the last block" in representation.text("own")
    assert "nan" not in representation.text("own")
    assert len(representation.pictures("own-figures")) == 6


def test_own_runs(attention):
    """One workdir: nothing is trained, and there is nothing to compare with."""
    names = ("models", "measure", "results", "looked-at", "maps", "topics", "drawings")
    attention.run(*names, "distance", "cka-models", WORKDIRS="runs/x1/simmim, ")
    assert "MODEL can be: simmim" in attention.text("measure")
    assert len(attention.pictures("distance")) == 2
    assert attention.pictures("cka-models") == []
