"""The shape of the source tree: floors, one stem per operation, twins that agree.

Everything here is read from the source text, so a rule holds for files that this machine cannot import too.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "npmamba"

FLOORS = [
    "scalar shapes backend cache autodiff.tape autodiff.tree",
    "cpu cpu.* cuda.* reference reference.*",
    "ops ops.* autodiff.algebra autodiff.check lti",
    "autodiff autodiff.leaves autodiff.optim block config config_names initialize data vocabulary corpus streaming"
    " settings checkpoint tensorfile training_state files generate",
    "lm tasks",
    "train inspect testing testing.* report report_style charts summary progress runs plan doctor warmup arguments",
    "cli",
    "__main__",
]

# These load Numba's CUDA compiler; `npmamba.cuda.machine` loads them at the first kernel that is not kept.
CUDA_COMPILER = {"cuda.compile", "cuda.intrinsics", "cuda.translate"}

# NVIDIA's `cuda` is spread over many folders, none with an __init__.py; these are its parts.
TAKEN_BY_NVIDIA = {"__init__", "core", "bindings", "pathfinder", "cccl", "compute", "coop", "tile"}


def module_name(path: Path) -> str:
    """Name a file below npmamba/ as imports do, without the leading ``npmamba.``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package; its root, which imports the rest by name when asked, is left out."""
    folders = [PACKAGE, *(entry for entry in PACKAGE.iterdir() if entry.is_symlink())]
    files = {path for folder in folders for path in folder.rglob("*.py")}
    return {name: path for path in sorted(files) if (name := module_name(path))}


def operations() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, ours: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Yield the full name of each imported module, and whether it is loaded as soon as the file is.

    `ours` tells ``from npmamba import module`` from the import of a name. Those for type checkers are left out.
    """
    known = {"numba.cuda", *(f"npmamba.{name}" for name in ours)}
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.module and not node.level else "npmamba"
            whole = [f"{module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            names = [name if name in known else module for name in whole]
        else:
            continue
        for name in names:
            yield name, id(node) not in late


def imports_of_ours(path: Path) -> set[str]:
    """Return which of our modules a file imports, now or later; the package's root is an empty name."""
    every = {name for name, _ in imports(syntax(path), modules())}
    return {name.removeprefix("npmamba").lstrip(".") for name in every if name.partition(".")[0] == "npmamba"}


def floor(module: str) -> int | None:
    for number, patterns in enumerate(FLOORS):
        if any(fnmatchcase(module, pattern) for pattern in patterns.split()):
            return number
    return None


def climbs(importer: str, imported: str) -> bool:
    """Tell whether an import goes up, or sideways into another folder."""
    above, below = floor(importer), floor(imported)
    assert above is not None
    assert below is not None
    sideways = above == below and importer.rpartition(".")[0] != imported.rpartition(".")[0]
    return below > above or (sideways and imported.rpartition(".")[0] != importer)


def test_the_rule_of_floors_can_fail():
    assert climbs("ops.selective_scan", "lm")
    assert climbs("cpu.selective_scan", "reference.selective_scan")
    assert climbs("cpu.selective_scan", "cuda.selective_scan")
    assert not climbs("ops.selective_scan", "cpu.selective_scan")
    assert not climbs("block", "config")
    tree = ast.parse("import npmamba.lm\ndef f():\n    from npmamba import cli\n    from numba import cuda")
    late = [("npmamba.cli", False), ("numba.cuda", False)]
    assert list(imports(tree, ["lm", "cli"])) == [("npmamba.lm", True), *late]


def test_the_compiler_of_cuda_kernels_is_where_it_is_said_to_be():
    for module in CUDA_COMPILER:
        assert any(name.startswith("numba.cuda") for name, _ in imports(syntax(modules()[module]), modules()))


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_file_imports_only_from_lower_floors(module):
    assert floor(module) is not None, f"npmamba.{module} stands on no floor: give it one in FLOORS"
    for imported in imports_of_ours(modules()[module]):
        assert imported, f"npmamba.{module} must import from where things are defined, not from npmamba"
        assert not climbs(module, imported), f"npmamba.{module} must not import npmamba.{imported}"


def test_no_import_leads_back_to_its_file():
    graph = {module: imports_of_ours(path) & set(modules()) for module, path in modules().items()}
    for module in graph:
        reached, frontier = set(), set(graph[module])
        while frontier:
            reached |= frontier
            frontier = {below for above in frontier for below in graph[above]} - reached
        assert module not in reached, f"npmamba.{module} imports itself, by way of {sorted(reached)}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_only_the_compiler_of_cuda_kernels_needs_numbas(module):
    """And nothing imports CuPy to begin with: an array of its can only exist where its owner has, and whoever is asked
    for a GPU asks `npmamba.cuda.requirements`, which says what is missing."""
    for imported, at_import in imports(syntax(modules()[module]), modules()):
        top = imported.partition(".")[0]
        assert top not in ("cupy", "cupyx"), f"npmamba.{module} imports {imported}"
        compiler = at_import and (imported.startswith("numba.cuda") or top == "cuda")
        assert not compiler or module in CUDA_COMPILER, f"npmamba.{module} imports {imported}"


def test_references_are_independent_of_the_kernels():
    for module, path in modules().items():
        if module.startswith("reference."):
            ours = {name.partition(".")[0] for name in imports_of_ours(path)}
            others = {name.partition(".")[0] for name, _ in imports(syntax(path), modules())}
            assert not ours & {"cpu", "cuda", "ops"}, module
            assert "numba" not in others, module


def test_the_links_lead_to_the_top_level_folders():
    for name in ("autodiff", "cuda"):
        assert (PACKAGE / name).resolve() == ROOT / name


def test_cuda_hides_nothing_of_nvidias():
    """Run from the root of a checkout, ``cuda`` is found in ours first: NVIDIA's parts must stay visible."""
    taken = {path.name.partition(".")[0] for path in (ROOT / "cuda").iterdir()} & TAKEN_BY_NVIDIA
    assert not taken, (
        f"cuda/ holds {sorted(taken)}: run from the root of a checkout, this hides NVIDIA's own `cuda` "
        "package of that name, and `from numba import cuda` fails"
    )


def signatures(tree: ast.Module) -> dict[str, str]:
    """Return the public functions of a module with their arguments and defaults, annotations left out."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = copy.deepcopy(node.args)
            for argument in ast.walk(arguments):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            found[node.name] = ast.unparse(arguments)
    return found


def test_the_comparison_of_twins_can_fail():
    cpu = ast.parse("def forward(u: int, *, save=True) -> int: ...\ndef _kernel(): ...")
    assert signatures(cpu) == {"forward": "u, *, save=True"}
    assert signatures(cpu) != signatures(ast.parse("def forward(u, *, save=False): ..."))


def test_there_are_operations():
    assert operations()


@pytest.mark.parametrize("op", operations())
def test_an_operation_is_one_stem(op):
    wanted = [
        f"npmamba/ops/{op}.md",
        f"npmamba/cpu/{op}.py",
        f"npmamba/reference/{op}.py",
        f"tests/test_{op}.py",
    ]
    assert [name for name in wanted if not (ROOT / name).is_file()] == []
    public = signatures(syntax(PACKAGE / f"ops/{op}.py"))
    assert op in public
    reference = signatures(syntax(PACKAGE / f"reference/{op}.py"))
    assert {"forward"} | ({"backward"} if f"{op}_backward" in public else set()) <= set(reference)


def twins() -> list[str]:
    """List the modules that `npmamba.backend.twin` is asked for, and those of operations."""
    asked = {
        node.args[0].value
        for path in modules().values()
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "twin"
        if node.args and isinstance(node.args[0], ast.Constant)
    }
    return sorted(asked | set(operations()))


def test_twins_are_found_where_they_are_asked_for():
    assert {"selective_scan", "rms_norm", "dropout", "optimizer_update"} <= set(twins())


@pytest.mark.parametrize("op", twins())
def test_twins_agree(op):
    cpu, cuda = PACKAGE / f"cpu/{op}.py", ROOT / f"cuda/{op}.py"
    assert signatures(syntax(cpu))
    if op in operations():
        assert "forward" in signatures(syntax(cpu))
    if cuda.is_file():
        assert signatures(syntax(cuda)) == signatures(syntax(cpu)), "what only one of them has begins with _"


def homes() -> dict[str, str]:
    """The table of public names in npmamba/__init__.py, read as text; a name given twice is an error."""
    for node in syntax(PACKAGE / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            assert isinstance(node.value, ast.Dict)
            keys = [ast.literal_eval(key) for key in node.value.keys if key is not None]
            assert sorted(keys) == sorted(set(keys)), "a name is listed twice"
            return ast.literal_eval(node.value)
    raise AssertionError("npmamba/__init__.py has no table _HOME")


def test_public_names_are_listed_once_and_where_they_are_defined():
    for name, module in homes().items():
        assert module in modules(), f"{name} is said to be in npmamba.{module}, which does not exist"
        defined = {node.name for node in syntax(modules()[module]).body if hasattr(node, "name")}
        assert name in defined, f"{name} is not defined in npmamba.{module}"


@pytest.mark.parametrize("op", operations())
def test_every_public_function_of_an_operation_is_a_public_name(op):
    for name in signatures(syntax(PACKAGE / f"ops/{op}.py")):
        assert homes().get(name) == f"ops.{op}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_library_neither_prints_nor_runs_text(module):
    refused = {"exec", "eval", "compile", "breakpoint", "input"} | ({"print"} if module != "cli" else set())
    for node in ast.walk(syntax(modules()[module])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in refused, f"npmamba.{module}:{node.lineno} calls {node.func.id}()"
