"""The house: rooms of a size that one can read, and no import that goes in a circle or hides."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nngeo_lazy"
FILES = sorted(PACKAGE.rglob("*.py"))
LINES = {path: path.read_text().count("\n") for path in FILES}
OPTIONAL = {"gpytorch", "matplotlib"}  # extras: imported where they are needed, if at all


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(tree):
    """Each import statement, with whether it is inside a function and whether only for types."""

    def walk(node, inside, typing):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, inside, typing
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, inside or function, typing or types)

    return walk(tree, False, False)


def targets(node, path):
    """The modules that a statement imports, as absolute names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        here = name_of(path).split(".")
        package = here if path.name == "__init__.py" else here[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *([node.module] if node.module else [])])
    inner = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else base for name in inner]


def graph():
    """module -> the modules of the package that it imports when it is imported."""
    edges = {}
    for name, path in MODULES.items():
        found = set()
        for node, inside, typing in imports(ast.parse(path.read_text())):
            if not inside and not typing:
                found |= {t for t in targets(node, path) if t in MODULES and t != name}
        edges[name] = found
    return edges


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_hides_in_a_function(path):
    for node, inside, _ in imports(ast.parse(path.read_text())):
        names = {target.split(".")[0] for target in targets(node, path)}
        assert not inside or names <= OPTIONAL, f"line {node.lineno} imports {names} in a function"


def test_no_module_imports_itself_by_a_detour():
    edges, done, path = graph(), set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(edges[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)


def test_no_room_and_no_file_is_too_large():
    total = sum(LINES.values())
    for room in {path.relative_to(PACKAGE).parts[0] for path in FILES}:
        share = sum(n for p, n in LINES.items() if p.is_relative_to(PACKAGE / room)) / total
        assert share <= 0.30, f"{room} holds {share:.0%} of the lines"
    long = {str(p.relative_to(PACKAGE)): n for p, n in LINES.items() if n > 450}
    assert not long, f"more than 450 lines: {long}"


MAKERS = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros"}
MAKERS |= {"rand", "randint", "randn", "randperm"}


def without_a_device(tree):
    """Lines of calls that make a tensor on whatever device is the default at that moment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            torchs = ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS
            if torchs and not any(key.arg in ("device", None) for key in node.keywords):
                yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_tensor_is_made_on_the_default_device(path):
    """A user may have set it (torch.set_default_device): the model's tensors are elsewhere."""
    lines = list(without_a_device(ast.parse(path.read_text())))
    assert not lines, f"say device= in lines {lines}"


def test_the_checks_see_what_they_forbid(tmp_path):
    assert list(without_a_device(ast.parse("torch.zeros(3)\ntorch.ones(3, device=d)"))) == [1]
    tree = ast.parse("import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\n")
    assert [flags for _, *flags in imports(tree)] == [[False, False], [True, False], [False, True]]
    assert "nngeo_lazy.operators.rules" in graph()["nngeo_lazy.operators.base"]


@cache
def parsed(path):
    return ast.parse((PACKAGE.parent / path).read_text())


def test_the_slow_tests_exist():
    """A test that is renamed would be slow without a mark."""
    lines = (PACKAGE.parent / "tests/slow.txt").read_text().splitlines()
    for name in (line for line in lines if not line.startswith("#")):
        path, *inner = name.split("::")
        if path.endswith("/"):
            assert (PACKAGE.parent / path).is_dir(), f"tests/slow.txt lists {path}: remove it"
            continue
        body = parsed(path).body
        for part in inner:
            found = [node for node in body if getattr(node, "name", None) == part]
            if not found and inner[0] != part:
                break  # inherited by a class of tests
            assert found, f"tests/slow.txt lists {name}, which is not there: rename or remove it"
            body = getattr(found[0], "body", [])
