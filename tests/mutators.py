"""The small changes that `tests/mutation.py` makes to our sources: every one that the rules below allow.

A change replaces a stretch of text and keeps the number of lines. Nothing is changed in docstrings, annotations,
decorators, f-strings and ``raise``, in calls that matter to the compiler or to speed alone, nor where `COMPILED` says.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "&"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
SWAPPED = {"fma", "select", "divide", "range", "matmul", "exponent", "decay_factor", "_product", "_join", "state_step"}
"""Functions of which the last two arguments are of one kind; elsewhere a swap would fail at once."""
SPEED = {"prefetch", "prefetch_near", "prefetch_rows", "apart"}
COMPILER = {"njit", "register_jitable", "infer_global", "lower_builtin", "overload", "register_at_fork"}
VECTOR_CALLS = {"load", "store", "pick", "accumulate"}

COMPILED = {
    "npmamba/cpu/simd.py": "load store accumulate pick total any_lane width",
    "npmamba/cpu/cache.py": "",
}
"""Files of which only the named functions run without the compiler."""
COMPILED_FUNCTIONS = {
    "npmamba/scalar.py": {"log1p_polynomial", "exp2m1_series"}, "npmamba/cpu/runtime.py": {"_compile"},
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: ``source[start:end]`` of the file at `path` becomes `text`; `line` is where its statement begins."""

    path: str
    line: int
    last: int
    start: int
    end: int
    text: str
    kind: str
    function: str
    shown: str

    @property
    def name(self) -> str:
        """What tells this mutant from all others; without line numbers, so that it outlives changes elsewhere."""
        return f"{self.path}: {self.function}: {self.kind}: {self.shown}"

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


class _Finder:
    """Walks one file and collects its mutants."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source, self.found = path, source, list[Mutant]()
        self.times: Counter[tuple[str, str, str]] = Counter()
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.rows = source.splitlines()
        self.statement: ast.stmt | None = None
        self.functions: list[str] = []

    def offset(self, line: int, column: int) -> int:
        return self.lines[line - 1] + len(self.rows[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        return self.source[slice(*self.span(node))]

    def change(self, node: ast.AST, kind: str, text: str) -> None:
        """Record that `node` becomes `text`."""
        start, end = self.span(node)
        before = self.source[start:end]
        text += "\n" * (before.count("\n") - text.count("\n"))
        where, last = (self.statement.lineno, _header_end(self.statement)) if self.statement else (node.lineno,) * 2
        line = " ".join(self.rows[where - 1].split())
        shown = f"{' '.join(before.split())} -> {' '.join(text.split())}"
        shown = shown if before.strip() == line else f"{shown} in: {line}"
        function = ".".join(self.functions) or "module"
        self.times[function, kind, shown] += 1
        if self.times[function, kind, shown] > 1:
            shown += f" (no. {self.times[function, kind, shown]})"
        self.found.append(Mutant(self.path, where, last, start, end, text, kind, function, shown))

    def operator(self, whole: ast.AST, parts: list[ast.expr], operators: list[ast.AST], kind: str) -> None:
        """Replace the operators between `parts`; all get parentheses, so that nothing else binds otherwise."""
        start, end = self.span(whole)
        text, at = "(", start
        for i, part in enumerate(parts):
            first, last = self.span(part)
            gap = self.source[at:first]
            if i:
                old, new = OPERATORS[type(operators[i - 1])]
                gap = gap.replace(old, new, 1)
            text, at = f"{text}{gap}({self.source[first:last]})", last
        self.change(whole, kind, f"{text}{self.source[at:end]})")

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        called = _called(node)
        if called in SPEED or called in COMPILER:
            return
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.functions.append(node.name)
        rule = getattr(self, f"on_{type(node).__name__}", None)
        if rule:
            rule(node)
        for child in _children(node):
            self.visit(child)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.functions.pop()
        self.statement = outer

    # --- the rules ---

    def on_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in OPERATORS:
            self.operator(node, [node.left, node.right], [node.op], "arithmetic")

    def on_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            self.operator(node, [node.left, *node.comparators], node.ops, "comparison")
            return
        for i, op in enumerate(node.ops):  # a < b < c: parentheses would change its meaning
            left, right = ([node.left, *node.comparators][j] for j in (i, i + 1))
            (start, end), at = self.span(node), (self.span(left)[1], self.span(right)[0])
            gap = self.source[slice(*at)].replace(*OPERATORS[type(op)], 1)
            self.change(node, "comparison", self.source[start : at[0]] + gap + self.source[at[1] : end])

    def on_BoolOp(self, node: ast.BoolOp) -> None:
        self.operator(node, node.values, [node.op] * (len(node.values) - 1), "boolean")

    def on_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub | ast.Not):
            self.change(node, "sign", f"({self.text(node.operand)})")

    def on_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.change(node, "constant", str(not value))
        elif isinstance(value, int):
            others = [value + 1, value - 1] if abs(value) < 1000 else [2 * value]
            for other in others:
                self.change(node, "constant", f"({other})" if other < 0 else str(other))
        elif isinstance(value, float):
            self.change(node, "constant", f"({self.text(node)} * 1.25)" if value else "1.0")

    def on_If(self, node: ast.If | ast.While | ast.IfExp) -> None:
        self.change(node.test, "condition", f"(not ({self.text(node.test)}))")

    on_While = on_IfExp = on_If

    def on_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.change(test, "condition", f"(not ({self.text(test)}))")

    def on_Call(self, node: ast.Call) -> None:
        name, given = _called(node), node.args
        if len(given) > 1 and name in SWAPPED and self.text(given[-2]) != self.text(given[-1]):
            (a, b), (c, d), (start, end) = self.span(given[-2]), self.span(given[-1]), self.span(node)
            s = self.source
            self.change(node, "swap", s[start:a] + s[c:d] + s[b:c] + s[a:b] + s[d:end])
        if name == "range":
            for bound in given[:2]:
                if not isinstance(bound, ast.Constant):
                    self.change(bound, "range", f"({self.text(bound)}) + 1")
                    self.change(bound, "range", f"({self.text(bound)}) - 1")
        if name in VECTOR_CALLS and len(given) > 1 and isinstance(given[1], ast.Tuple):
            self.indices(given[1].elts)

    def on_Subscript(self, node: ast.Subscript) -> None:
        if "/cpu/" in self.path or "/reference/" in self.path:
            self.indices(node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])

    def indices(self, found: list[ast.expr]) -> None:
        """Put each index off by one, if it is computed or has a short name; others may be no numbers."""
        ends = [end for x in found if isinstance(x, ast.Slice) for end in (x.lower, x.upper)]
        for x in [*found, *ends]:
            if isinstance(x, ast.BinOp) or (isinstance(x, ast.Name) and len(x.id) <= 2 and x.id.islower()):
                self.change(x, "index", f"({self.text(x)}) + 1")

    def on_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and _called(node.value) not in SPEED | COMPILER:
            self.change(node, "dropped", "pass")

    def on_AugAssign(self, node: ast.AugAssign) -> None:
        self.change(node, "dropped", "pass")

    def on_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        names = {x.id for x in ast.walk(target) if isinstance(x, ast.Name)}
        again = isinstance(target, ast.Name) and any(
            isinstance(x, ast.Name) and x.id in names for x in ast.walk(node.value)
        )
        if again or isinstance(target, ast.Subscript | ast.Attribute):
            self.change(node, "dropped", "pass")

    def on_Break(self, node: ast.Break) -> None:
        self.change(node, "jump", "continue")

    def on_Continue(self, node: ast.Continue) -> None:
        self.change(node, "jump", "break")


def _called(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", ""))


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list", "type_comment"):
            yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, ast.AST))


def _header_end(node: ast.stmt) -> int:
    """Return the last line of a statement, of a compound one that of its head."""
    body = getattr(node, "body", None)
    return max(node.lineno, body[0].lineno - 1) if body else node.end_lineno


def mutants(path: str, source: str) -> list[Mutant]:
    """Return every mutant of a file, in the order of its lines."""
    tree, finder = ast.parse(source), _Finder(path, source)
    kept = COMPILED.get(path)
    for node in tree.body:
        if kept is None or getattr(node, "name", None) in kept.split():
            finder.visit(node)
    compiled = COMPILED_FUNCTIONS.get(path, set())
    return [m for m in finder.found if not compiled & set(m.function.split("."))]
