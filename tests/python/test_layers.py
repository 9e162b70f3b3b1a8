"""The modules of the package: each imports only those below it, so there is no circle, and none is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from under_test import SOURCE

PACKAGE = SOURCE / "torch_uvm"
#: Each module may import those before it, also inside functions. Imports for type checkers do not count.
ORDER = [
    "_version",
    "_format",
    "_tables",
    "_dry_run",
    "_machine",
    "_records",
    "_library",
    "_report",
    "_hints",
    "_activate",
    "_pools",
    "_probe",
    "_streaming",
    "_streaming.internals",
    "_streaming.owners",
    "_streaming.pinned",
    "_streaming.extents",
    "_streaming.slots",
    "_streaming.order",
    "_streaming.plan",
    "_streaming.units",
    "_streaming.gradients",
    "_streaming.fetch",
    "_streaming.saved",
    "_streaming.forward",
    "_streaming.budget",
    "_streaming.attach",
    "_streaming.api",
    "_offload",
    "_stream",
    "_schema",
    "_unpickle",
    "_snapshot",
    "_report_html",
    "_report_plots",
    "_report_owners",
    "_report_segments",
    "_report_timeline",
    "_report_page",
    "_simulate",
    "_doctor",
    "__init__",
    "__main__",
]
LINES = 500
#: Modules that are to be divided, and may not grow meanwhile.
LONGER = {"_report_page": 560}

pytestmark = pytest.mark.one_version


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their name within it; that of a subpackage's `__init__` is the subpackage's."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def is_for_type_checkers(node: ast.stmt) -> bool:
    """Whether this is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All that run, in functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and is_for_type_checkers(child):
            for other in child.orelse:
                yield from import_statements(other)
        else:
            yield from import_statements(child)


def imported(name: str, path: Path, package: str, known: set[str]) -> set[str]:
    """The modules of the package that a module of it imports."""
    # What `from .` means: the subpackage that it is in, or is.
    parent = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    found = set()
    for statement in import_statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names if alias.name.split(".")[0] == package]
            found |= {name.partition(".")[2] or "__init__" for name in names}
            continue
        module = statement.module or ""
        if statement.level:
            base = [*parent[: len(parent) - statement.level + 1], *filter(None, module.split("."))]
        elif module.split(".")[0] == package:
            base = module.split(".")[1:]
        else:
            continue
        for alias in statement.names:
            deeper = ".".join([*base, alias.name])
            found.add(deeper if deeper in known else ".".join(base) or "__init__")
    return found - {name}


def upward(package: Path, order: list[str]) -> list[str]:
    """The imports that go up, and the modules that are nowhere in the order."""
    paths = modules(package)
    wrong = [f"{name} is not in the order" for name in paths if name not in order]
    for name, path in paths.items():
        for other in sorted(imported(name, path, package.name, set(paths))):
            if name in order and other in order and order.index(other) > order.index(name):
                wrong.append(f"{name} imports {other}, which is above it")
    return wrong


def test_imports_go_down() -> None:
    """A new module takes its place in ORDER."""
    assert upward(PACKAGE, ORDER) == []


def test_no_module_is_too_long() -> None:
    """One that is has more than one subject."""
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules(PACKAGE).items()}
    assert {name: count for name, count in lengths.items() if count > LONGER.get(name, LINES)} == {}


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("low", "from .high import x", ["low imports high, which is above it"]),
        ("low", "from . import high", ["low imports high, which is above it"]),
        ("low", "def late():\n    import package.high", ["low imports high, which is above it"]),
        ("low", "from package.inner.deep import x", ["low imports inner.deep, which is above it"]),
        ("inner/deep", "from ..high import x", ["inner.deep imports high, which is above it"]),
        ("inner/deep", "from .deeper import x", ["inner.deep imports inner.deeper, which is above it"]),
        ("inner/deeper", "from . import deep\nfrom .. import low\nfrom .deep import low as x", []),
        ("high", "from .inner import deep\nimport package.low\nimport high_above", []),
        ("low", "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from .high import x", []),
        ("other", "", ["other is not in the order"]),
    ],
)
def test_an_import_that_goes_up_is_seen(tmp_path: Path, name: str, text: str, wrong: list[str]) -> None:
    """The test above can fail."""
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    for module in ("__init__", "low", "high", "inner/__init__", "inner/deep", "inner/deeper"):
        (package / f"{module}.py").write_text("")
    (package / f"{name}.py").write_text(text)
    assert upward(package, ["low", "inner", "inner.deep", "inner.deeper", "high", "__init__"]) == wrong
