"""The rooms and which of them may import which. A file that imports upwards fails here.

cli -> web -> (bench, evaluation, training, parity, plots, mini, serving) -> hosts -> (scheduling, selection, cost)
-> bottom, where the bottom is config, budget, plan, registry, results and errors.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "adallava"
BOTTOM = {"config", "budget", "plan", "registry", "results", "errors"}
MIDDLE = {"scheduling", "selection", "cost"}
MAY_IMPORT = {
    **{room: BOTTOM for room in (*BOTTOM, *MIDDLE, "data")},
    "hosts": BOTTOM | MIDDLE | {"data"},
    "training": BOTTOM | MIDDLE | {"hosts", "data"},
    "mini": BOTTOM | MIDDLE | {"hosts", "data", "training"},
    "bench": BOTTOM | MIDDLE | {"hosts", "data", "mini", "serving"},
    "evaluation": BOTTOM | MIDDLE | {"hosts", "data", "mini"},
    "parity": BOTTOM | MIDDLE | {"hosts", "data"},
    "serving": BOTTOM | MIDDLE | {"hosts"},
    "plots": BOTTOM | {"cost"},
    "web": BOTTOM | MIDDLE | {"hosts", "mini", "bench", "plots", "serving"},
    "cli": BOTTOM
    | MIDDLE
    | {"hosts", "data", "training", "mini", "bench", "evaluation", "parity", "plots", "serving", "web"},
}
# The package's __init__ names everything lazily; only its version may be imported from elsewhere.
TOP = "__init__"
MAY_SAY_TRANSFORMERS = {"hosts", "data", "training", "evaluation", "bench", "mini", "parity"}
WITHOUT_TORCH = {"config", "budget", "registry", "results", "errors", TOP}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree, package):
    """Full names of all modules imported in the file, inside functions too; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from adallava import plan` imports a module, `from adallava import __version__` a name.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "adallava" else [module]


def violations(path, source):
    room = room_of(path)
    package = ["adallava", *path.relative_to(PACKAGE).parts[:-1]]
    for module in imported_modules(ast.parse(source), package):
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if top == "transformers" and room not in MAY_SAY_TRANSFORMERS:
            yield f"{room} imports {module}: only {sorted(MAY_SAY_TRANSFORMERS)} may"
        if top == "torch" and room in WITHOUT_TORCH:
            yield f"{room} imports torch, but must work without it"
        if top == "adallava" and room != TOP and target not in ({"__version__", room} | MAY_IMPORT[room]):
            yield f"{room} imports {module}: it may import {sorted(MAY_IMPORT[room])}"


def test_files_were_found():
    assert len(FILES) >= 12
    assert {"__init__", *BOTTOM, "scheduling"} <= {room_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert room_of(path) in {TOP, *MAY_IMPORT}, "a new room: add it to MAY_IMPORT and to the docs"
    assert list(violations(path, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("room", "line", "wrong"),
    [
        ("plan.py", "from adallava.hosts.model import AdaptiveVLM", True),
        ("plan.py", "from adallava import scheduling", True),
        ("plan.py", "from .scheduling import sampling", True),
        ("plan.py", "def f():\n    import adallava.cost.flops", True),
        ("plan.py", "import transformers.models", True),
        ("config.py", "import torch", True),
        ("scheduling/a.py", "from ..hosts import model", True),
        ("hosts/a.py", "from adallava.training import trainer", True),
        ("training/a.py", "import transformers\nfrom adallava.hosts.model import AdaptiveVLM", False),
        ("scheduling/a.py", "from .latency import LatencyEncoder\nfrom adallava.plan import ExecutionPlan", False),
        ("results.py", "from adallava import __version__", False),
        ("cli/main.py", "from adallava.hosts import model", False),
    ],
)
def test_the_check_itself(room, line, wrong):
    assert bool(list(violations(PACKAGE / room, line))) == wrong


def test_importing_the_package_is_light():
    code = """
import sys, adallava
assert set(adallava.__all__) <= set(dir(adallava))
adallava.Budget.parse("60%"), adallava.AdaptiveConfig
import adallava.registry, adallava.results
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "heavy import"
assert adallava.ExecutionPlan.__module__ == "adallava.plan"
try:
    adallava.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
