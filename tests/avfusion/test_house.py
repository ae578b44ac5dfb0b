"""The rooms of avfusion and which may look into which: arrows point down, and no file imports one that imports it."""

import ast
import graphlib
from pathlib import Path

import pytest

import avfkernels
import avfusion

ROOT = Path(avfusion.__file__).parents[1]
# From the ground up. Rooms on one floor do not know each other, but for the pairs in BESIDE.
FLOORS = ({"common", "files", "distributed", "remote"}, {"media", "models", "synth"}, {"data", "metrics"},
          {"training", "embedding"}, {"tasks", "viz"}, {"cli"})  # fmt: skip
BESIDE = {("models", "media"), ("tasks", "viz")}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def files():
    paths = [path for package in ("avfusion", "avfkernels") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


FILES = files()


def imports(name):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES or node.module in FILES:
                    yield inner if inner in FILES else node.module


GRAPH = {name: sorted(set(imports(name))) for name in FILES}


def room(name):
    return name.split(".")[1] if name.count(".") else None


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("avfusion.")))
def test_arrows_point_down(name):
    if room(name) == "__main__":
        return
    assert room(name) in FLOOR, f"{name} is in no room of the house"
    for other in GRAPH[name]:
        if other.startswith("avfusion.") and room(other) != room(name):
            down = FLOOR[room(other)] < FLOOR[room(name)] or (room(name), room(other)) in BESIDE
            assert down, f"{name} imports {other}"


def test_no_file_imports_one_that_imports_it():
    graphlib.TopologicalSorter({name: set(others) - {name} for name, others in GRAPH.items()}).prepare()


def test_the_kernels_know_nothing_of_the_model():
    wrong = {name: [o for o in others if o.startswith("avfusion")] for name, others in GRAPH.items()
             if name.startswith("avfkernels")}  # fmt: skip
    assert not any(wrong.values()), wrong


def test_the_model_uses_public_names_of_the_kernels_alone():
    for name in FILES:
        if name.startswith("avfusion"):
            assert set(GRAPH[name]) & {o for o in FILES if o.startswith("avfkernels.")} == set(), name
            for node in ast.walk(ast.parse(FILES[name].read_text())):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "avfkernels"
                ):
                    assert node.attr in {*avfkernels.__all__, "__version__"}, f"{name}: avfkernels.{node.attr}"


def test_no_file_is_two():
    long = {name: lines for name, path in FILES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_every_file_has_its_line_in_the_documentation():
    lines = (ROOT / "docs" / "structure.md").read_text().splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("    ") and line.strip()}
    for name, path in FILES.items():
        if name.startswith("avfusion.") and path.name not in ("__init__.py", "__main__.py"):
            assert "/".join(path.relative_to(ROOT / "avfusion").parts[1:]) in listed or path.name in listed, name
