"""The rooms: run <- data <- learning <- evaluation <- method families <- methods.py <- main_*.py."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_THE_HOUSE = {"tests", "benchmarks"}
FAMILIES = {p.parent.name for p in ROOT.glob("*/__init__.py")} - NOT_THE_HOUSE - {"utils"}  # packages of methods
ROOMS = {  # room of utils -> the modules and rooms of utils that it may import, besides itself
    "run": [],
    "data": ["run"],
    "learning": ["run.dist", "run.flags", "run.streams", "run.warned", "data.views", "data.photometric", "data.batch"],
    "evaluation": ["run", "data", "learning"],
}


def imports(path, root):
    """Dotted names of all modules that a file imports, wherever in the file; relative imports are resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = path.relative_to(root).parts[: -node.level] if node.level else ()
            parent = ".".join([*own, *([node.module] if node.module else [])])
            found |= {f"{parent}.{alias.name}" for alias in node.names}  # a module, or a name in the module `parent`
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.add(ast.literal_eval(node.args[0]))
    return found


def below(module, allowed):
    return any(f"{module}.".startswith(f"{name}.") for name in allowed)


def faults(root, families):
    """`file imports module` for every import that does not point down."""
    files = [*root.glob("*.py")] + [p for d in (*families, "utils") for p in (root / d).rglob("*.py")]
    house = {p.stem for p in root.glob("*.py")} | families | {"methods", "utils"}
    found = []
    for path in files:
        where = path.relative_to(root).parts
        if where[0] == "utils":
            allowed = {f"utils.{name}" for name in (where[1], *ROOMS.get(where[1], []))}
        elif where[0] in families:
            allowed = {where[0], "utils"}
        elif where[0] == "methods.py":
            allowed = families | {"utils"}
        else:
            allowed = families | {"methods", "utils"}
        ours = [module for module in sorted(imports(path, root)) if below(module, house)]
        found += [f"{path.relative_to(root)} imports {module}" for module in ours if not below(module, allowed)]
    return found


def test_floors__every_import_points_down():
    assert {"moco", "mosrep", "w2ssl", "cmc"} <= FAMILIES
    assert {p.parent.name for p in ROOT.glob("utils/*/__init__.py")} == set(ROOMS)
    assert faults(ROOT, FAMILIES) == []


@pytest.mark.parametrize(
    "file, code, fault",
    [
        ("utils/run/a.py", "from moco.builder import MoCo", "moco.builder.MoCo"),
        ("utils/data/a.py", "def f():\n    import methods", "methods"),
        ("utils/learning/a.py", "import importlib\nimportlib.import_module('mosrep.mosaic')", "mosrep.mosaic"),
        ("utils/run/a.py", "from utils.data import batch", "utils.data.batch"),
        ("utils/run/a.py", "from utils.learning.amp import DTYPES", "utils.learning.amp.DTYPES"),
        ("utils/run/a.py", "from utils import data", "utils.data"),
        ("utils/data/a.py", "from utils.learning import amp", "utils.learning.amp"),
        ("utils/data/a.py", "from utils.evaluation.probe import Frozen", "utils.evaluation.probe.Frozen"),
        ("utils/learning/a.py", "from utils.run import checkpoint", "utils.run.checkpoint"),
        ("utils/learning/a.py", "from utils.run.log import say", "utils.run.log.say"),
        ("utils/learning/a.py", "import utils.data.index", "utils.data.index"),
        ("utils/learning/a.py", "from utils.evaluation import probe", "utils.evaluation.probe"),
        ("utils/evaluation/a.py", "import main_lincls", "main_lincls"),
        ("moco/a.py", "from mosrep import mosaic", "mosrep.mosaic"),
        ("mosrep/a.py", "from moco.builder import MoCo", "moco.builder.MoCo"),
        ("moco/a.py", "from methods import METHODS", "methods.METHODS"),
        ("mosrep/a.py", "import main_pretrain as m", "main_pretrain"),
        ("methods.py", "import main_pretrain", "main_pretrain"),
        ("main_lincls.py", "from main_pretrain import get_args", "main_pretrain.get_args"),
        ("main_lincls.py", "from methods import METHODS\nfrom utils.run import dist\nfrom mosrep import mosaic", None),
        (
            "mosrep/a.py",
            "import torch\nfrom utils.learning import queue\nfrom . import mosaic\nfrom .mosaic import shift",
            None,
        ),
        ("utils/run/a.py", "import torch\nfrom utils.run import dist\nfrom .dist import rank", None),
        ("utils/run/a.py", "from ..data import batch", "utils.data.batch"),
        ("utils/data/a.py", "from utils.run.flags import RunError\nfrom utils.data import tars", None),
        ("utils/learning/a.py", "from utils.run import dist, flags, streams\nfrom utils.data.views import ViewSpec", None),
        (
            "utils/evaluation/a.py",
            "from utils.run.log import say\nfrom utils.learning import amp\nimport utils.data.index",
            None,
        ),
    ],
)
def test_floors__checker_sees_it(tmp_path, file, code, fault):
    """Otherwise the test above could pass without any check."""
    rooms = [f"utils/{room}/u.py" for room in ROOMS]
    for name in ("main_pretrain.py", "main_lincls.py", "methods.py", "moco/m.py", "mosrep/r.py", *rooms, file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code if name == file else "")
    assert faults(tmp_path, {"moco", "mosrep"}) == ([f"{file} imports {fault}"] if fault else [])
