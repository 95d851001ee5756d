"""docs/metrics.md and the package's docstring against the code they describe."""

import ast
import functools
import importlib.util
import io
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image

from clvsmim import metrics, pictures, plugin
from clvsmim.metrics import Series, between_models

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
TEXT = PAGE.read_text()
FACTS = {"grid": (4, 4), "patch": 4, "prefix": 1, "depth": 2, "group": 4, "classes": 3}
TESTS = {"distance": "attention_distance"}  # file -> its test, if not its name
IMAGES = 20  # whole mini-batches, and whole sets of views


@functools.cache
def shapes() -> dict:
    """Shapes of the features of a tiny encoder; nothing is computed with them."""

    def shape(*dims: int, dtype: str = "f4") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((IMAGES, *dims), dtype)

    return {
        "residual": (shape(17, 8),) * 5,
        "attention": (shape(2, 17, 17),) * 2,
        "head_outputs": (shape(2, 17, 4),) * 2,
        "output": shape(17, 8),
        "label": shape(dtype="i4"),
        "index": shape(dtype="i4"),
    }


def states(name: str) -> tuple[metrics.Metric, list]:
    """A metric and its states of rows of ones."""
    metric = plugin.load_with("metrics", name, FACTS)
    weights = jax.ShapeDtypeStruct((IMAGES,), "f4")
    rows = jax.eval_shape(metric.update, shapes(), weights)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), rows)
    return metric, [metric.summing(part)(ones) for part in metric.parts]


@functools.cache
def all_series() -> list[Series]:
    """Every Series that the code makes: of metrics, of two models, of a few images."""
    found = []
    for name in plugin.names("metrics"):
        if hasattr(getattr(metrics, name), "make"):
            metric, given = states(name)
            found += metric.compute(*given)
    (grams,) = states("grams")[1]
    tokens = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    few = pictures.clusters(list(tokens), np.array([0, 0, 1]))
    return [*found, between_models(grams, grams), *few]


def section(file: str) -> str:
    """The text under the heading of one file of metrics."""
    return re.split(r"\n##", TEXT.split(f"\n### {file}\n")[1])[0]


def test_every_kernel_is_in_the_table_of_contents_and_in_its_section():
    start, end = map(metrics.__doc__.index, ("attention of one head", "For the"))
    contents = metrics.__doc__[start:end]
    for file in plugin.names("metrics"):
        assert re.search(rf"^  {file}  ", contents, re.M), file
        for kernel in getattr(metrics, file).__all__:
            line = rf"^(?:  {file} +| {{16}}).*\b{kernel}\b"
            assert len(re.findall(line, contents, re.M)) == 1, kernel
            assert f"`{kernel}`" in section(file), kernel
    listed = re.findall(r"^(?:  \w+ +| {16})(\w+)  ", contents, re.M)
    assert set(listed) <= {*metrics.kernels()} and len(listed) > 50


def test_every_file_has_a_section_and_every_section_a_file():
    files = re.findall(r"\n### (\w+)", TEXT)
    assert sorted(files) == plugin.names("metrics")
    for file in files:
        assert f"[{file}](#{file})" in TEXT
        assert f"](../clvsmim/metrics/{file}.py)" in section(file)
        for part in ("Range", "Cost", "Checks", "Traps", "Do not conclude"):
            assert f"**{part}**" in section(file) or file == "dimension", (file, part)
        assert "```python" in section(file)
        assert f"](../tests/test_{TESTS.get(file, file)}.py)" in section(file)


def test_every_closed_form_of_the_page_is_asserted_by_the_test_it_names():
    """Those of four decimals or more, as they stand there."""
    checked = 0
    for file in plugin.names("metrics"):
        checks = re.search(r"\*\*Checks\*\* (.*?)\n- \*\*", section(file), re.S)[1]
        test = (PAGE.parent / re.search(r"\]\((.*?)\)", checks)[1]).read_text()
        for number in re.findall(r"\d+\.\d{4,}", checks):
            assert number in test, (file, number)
            checked += 1
    assert checked > 20


def test_every_series_has_a_row_with_its_axes_unit_and_figure():
    rows = set(re.findall(r"^\| `.*\|$", TEXT, re.M))
    found = all_series()
    assert len({s.name for s in found}) > 40
    for s in found:
        axes = " × ".join(axis.name for axis in s.axes)
        fields = (f"`{s.name}`", axes, s.unit or "1", s.source or "–")
        assert f"| {' | '.join(fields)} |" in rows, fields
    of_kernels = set(re.findall(r"^\| `.*\|$", section("dimension"), re.M))
    named = {row.split("`")[1] for row in rows - of_kernels}
    assert named == {s.name for s in found}


def test_every_link_leads_somewhere():
    headings = {h.lower() for h in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert (PAGE.parent / target).exists(), target


@functools.cache
def maker():
    """The script that draws the pictures."""
    path = PAGE.parent / "make_metrics_pictures.py"
    spec = importlib.util.spec_from_file_location("make_metrics_pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_shown_and_has_a_function_that_draws_it():
    shown = re.findall(r"!\[[^\]]+\]\(metrics/(\w+)\.png\)", TEXT)
    assert sorted(shown) == sorted(p.stem for p in maker().OUT.iterdir())
    assert sorted(shown) == sorted(maker().PICTURES) == plugin.names("metrics")
    assert sum(p.stat().st_size for p in maker().OUT.iterdir()) < 1.2e6


@pytest.mark.parametrize("name", ["displacement"])
def test_a_picture_is_drawn_again_as_it_is(name):
    """To a grey level or two: another machine rounds differently."""
    old, new = (
        np.asarray(Image.open(file).convert("L"), float)
        for file in (maker().OUT / f"{name}.png", io.BytesIO(maker().PICTURES[name]()))
    )
    assert old.shape == new.shape and np.abs(old - new).mean() < 2


@functools.cache
def examples() -> dict[str, str]:
    """The code of each heading, by the words of the heading."""
    parts = re.split(r"^##+ (.*)$", TEXT, flags=re.M)
    code = {
        heading: "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {heading: text for heading, text in code.items() if text}


@functools.cache
def first() -> dict:
    """The names that the first example defines."""
    space: dict = {}
    exec(examples()["Conventions"], space)
    return space


@pytest.mark.parametrize("heading", examples())
def test_every_example_runs_and_returns_what_stands_beside_it(heading):
    """A comment that is a number is the value: to its last digit, and to 0.001."""
    code, space, compared = examples()[heading], dict(first()), 0
    lines = code.splitlines()
    assert max(map(len, lines)) <= 88
    for node in ast.parse(code).body:
        text = ast.unparse(node)
        if not isinstance(node, ast.Expr):
            exec(text, space)
            continue
        want = re.search(r"# (-?[\d.]+)$", lines[node.end_lineno - 1])
        assert want, f"no value beside {text}"
        last = min(1e-3, 10.0 ** -len(want[1].partition(".")[2]))
        got = jax.jit(lambda text=text: eval(text, space))()  # faster than op by op
        np.testing.assert_allclose(got, float(want[1]), atol=last, rtol=0)
        compared += 1
    assert compared
