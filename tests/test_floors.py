"""The floors of the house: main_* -> methods -> method packages -> utils, every import points down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_THE_HOUSE = {"tests", "benchmarks"}
PACKAGES = {p.parent.name for p in ROOT.glob("*/__init__.py")} - NOT_THE_HOUSE - {"utils"}  # one for each method family


def imports(path):
    """Top-level names of all modules that a file imports, wherever in the file; relative imports are of its own package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parent.name if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.add(ast.literal_eval(node.args[0]).split(".")[0])
    return found


def faults(root, packages):
    """`file imports module` for every import that does not point down."""
    files = [*root.glob("*.py")] + [p for d in (*packages, "utils") for p in (root / d).rglob("*.py")]
    scripts = {p.stem for p in root.glob("*.py")} - {"methods"}
    house = scripts | packages | {"methods", "utils"}
    found = []
    for path in files:
        name = path.stem if path.parent == root else path.relative_to(root).parts[0]
        if name == "utils":
            allowed = {"utils"}
        elif name == "methods":
            allowed = packages | {"utils"}
        elif name in packages:
            allowed = {name, "utils"} | ({"moco"} if name == "mosrep" else set())
        else:
            allowed = packages | {"methods", "utils"}
        found += [f"{path.relative_to(root)} imports {module}" for module in sorted(imports(path) & house - allowed)]
    return found


def test_floors__every_import_points_down():
    assert {"moco", "mosrep", "w2ssl"} <= PACKAGES
    assert faults(ROOT, PACKAGES) == []


@pytest.mark.parametrize(
    "file, code, fault",
    [
        ("utils/a.py", "from moco.builder import MoCo", "moco"),
        ("utils/a.py", "def f():\n    import methods", "methods"),
        ("utils/a.py", "import importlib\nimportlib.import_module('mosrep.mosaic')", "mosrep"),
        ("moco/a.py", "from mosrep import mosaic", "mosrep"),
        ("moco/a.py", "from methods import METHODS", "methods"),
        ("mosrep/a.py", "import main_pretrain as m", "main_pretrain"),
        ("methods.py", "import main_pretrain", "main_pretrain"),
        ("main_lincls.py", "from main_pretrain import get_args", "main_pretrain"),
        ("main_lincls.py", "from methods import METHODS\nfrom utils import dist\nfrom mosrep import mosaic", None),
        ("mosrep/a.py", "import torch\nfrom moco.builder import MoCo\nfrom . import mosaic", None),
    ],
)
def test_floors__checker_sees_it(tmp_path, file, code, fault):
    """So that the test above cannot pass by looking at nothing."""
    for name in ("main_pretrain.py", "main_lincls.py", "methods.py", "utils/u.py", "moco/m.py", "mosrep/r.py", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code if name == file else "")
    assert faults(tmp_path, {"moco", "mosrep"}) == ([f"{file} imports {fault}"] if fault else [])
