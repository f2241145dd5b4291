"""The library's rooms know only those below them: no import goes up, none goes round, and the front door is light."""

import ast
import subprocess
import sys

import pytest

from evsam_lib.study.paths import repo_root

LIBRARY = repo_root() / "evsam_lib"
ROOMS = [  # from the ground up; a room's modules import from lower rows alone
    {"compat", "depth", "figures", "study", "timing"},
    {"data"},
    {"models"},
    {"prompts", "scores"},
    {"everything", "predict"},
    {"deploy", "evaluate", "training"},
    {"bench"},
    {"sam3"},
    {"fetch", "run", "widgets"},
]
FLOOR = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
ASKED_FOR = {("predict", "deploy"), ("evaluate", "sam3")}  # inside a function: an engine, a model that the caller names
HEAVY = ("torch", "timm", "transformers", "pandas", "matplotlib", "scipy", "papermill", "PIL")


def imports(path):
    """Modules of the library that a file imports, with whether at its top level."""
    here = ["evsam_lib", *path.relative_to(LIBRARY).with_suffix("").parts]
    package = here[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            names = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from ((name, node in tree.body) for name in names if name.startswith("evsam_lib."))


FILES = sorted(LIBRARY.rglob("*.py"))
ARROWS = {
    (path.relative_to(LIBRARY).parts[0].removesuffix(".py"), name.split(".")[1])
    for path in FILES
    for name, _ in imports(path)
    if (LIBRARY / name.split(".")[1]).is_dir() or (LIBRARY / f"{name.split('.')[1]}.py").is_file()
}


def test_every_room_has_its_floor():
    rooms = {
        p.name.removesuffix(".py") for p in LIBRARY.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize(("above", "below"), sorted((a, b) for a, b in ARROWS if a not in (b, "__init__")))
def test_arrows_go_down(above, below):
    assert FLOOR[above] > FLOOR[below] or (above, below) in ASKED_FOR


def test_no_module_imports_itself_by_a_detour():
    modules = {".".join(["evsam_lib", *p.relative_to(LIBRARY).with_suffix("").parts]): p for p in FILES}
    edges = {m: {name for name, top in imports(p) if top and name in modules} for m, p in modules.items()}
    while edges:
        leaves = [module for module, below in edges.items() if not below & edges.keys()]
        assert leaves, f"a circle among {', '.join(sorted(edges))}"
        for leaf in leaves:
            del edges[leaf]


def test_importing_the_library_loads_nothing_heavy():
    code = f"import sys, evsam_lib; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
