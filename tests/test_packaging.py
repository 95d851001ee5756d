"""What `pip install` gives: every file of the package and everything it imports."""

import ast
import pathlib
import re
import runpy
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "clvsmim"

# Where the name to import differs from the name to install.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


@pytest.fixture
def setup(monkeypatch):
    """The keywords that setup.py passes on."""
    given = {}
    fake = types.ModuleType("setuptools")
    fake.setup = given.update
    fake.find_packages = lambda **_: []
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [f for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_every_file_is_code_or_package_data(setup):
    data = {
        path
        for package, patterns in setup["package_data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {p for p in PACKAGE.rglob("*") if p.is_file()}
    other = {p for p in files if p.suffix != ".py" and "__pycache__" not in p.parts}
    assert data and other == data


def test_everything_imported_is_required(setup):
    core = _names(setup["install_requires"])
    optional = _names(sum(setup["extras_require"].values(), []))
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, at_import in _imports(path):
            name = DISTRIBUTIONS.get(name, name).replace("_", "-")
            allowed = core if at_import else core | optional
            assert name in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_neither_tensorflow_nor_torch_is_required(setup):
    assert not {"tensorflow", "torch"} & _names(setup["install_requires"])


def _names(requirements):
    return {re.split(r"[\[<>=;]", r)[0].replace("_", "-").strip() for r in requirements}


def _imports(path):
    """(top-level name, whether importing the file imports it) of third parties."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        else:
            continue
        for name in {module.split(".")[0] for module in modules}:
            if name not in sys.stdlib_module_names and name != "clvsmim":
                yield name, node in tree.body
