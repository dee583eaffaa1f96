"""The order of the rooms: what may import what."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import bissl_hf

PACKAGE = Path(bissl_hf.__file__).parent
# A room imports only from itself and from those before it.
ROOMS = (
    "tensors", "text", "paths", "distributed", "losses", "checkpoints", "run_lock", "data", "models",
    "bilevel", "optim",
    "evaluation", "tasks", "cards", "report", "hub", "trainer", "benchmark", "cli", "study", "commands",
)  # fmt: skip
# Modules of cli that start what is in other rooms.
COMMANDS = ("main", "benchmark", "study")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name: str, *, at_import: bool = False) -> set[str]:
    """The modules of the package that a module imports; only those that are imported with it, if `at_import`."""
    path, found = MODULES[name], set()
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_for_types(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (at_import and id(node) in hidden):
            continue
        base = package.rsplit(".", node.level - 1)[0] if node.level else ""
        target = ".".join(part for part in (base, node.module) if part)
        for alias in node.names:
            whole = f"{target}.{alias.name}"
            found |= {module for module in (whole if whole in MODULES else target,) if module in MODULES}
    return found - {name}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room_of(name: str) -> str | None:
    _, *parts = name.split(".")
    if not parts:
        return None  # the root, which imports public names when they are asked for
    return "commands" if parts[0] == "cli" and parts[1:2] and parts[1] in COMMANDS else parts[0]


def test_every_module_is_in_a_room():
    assert {room for name in MODULES if (room := room_of(name))} <= set(ROOMS)


def test_rooms_import_from_those_before_them():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports_of(name)
        if (room := room_of(name)) and (source := room_of(other)) and ROOMS.index(source) > ROOMS.index(room)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports_of(name, at_import=True) - {"bissl_hf"} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES) - 1


def test_the_algorithm_knows_no_trainer_no_file_and_no_command():
    for name in MODULES:
        if room_of(name) == "bilevel":
            rooms = {room_of(other) for other in imports_of(name)}
            assert rooms <= {"tensors", "distributed", "losses", "data", "models", "bilevel"}, name
