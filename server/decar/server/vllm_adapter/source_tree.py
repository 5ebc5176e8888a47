"""What a tree of Python source says about its classes and functions, read without running any of it. Knows no vLLM.

Followed are imports within the tree, aliases and inheritance. What comes from outside the tree is not looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """Where a name leads to: the statement that makes it, and the module that this is in."""

    module: str
    node: ast.AST


class SourceTree:
    """The packages below ``root``, by module name."""

    def __init__(self, root: Path):
        self._root = root
        self._names: dict[str, dict[str, ast.AST] | None] = {}
        self._members: dict[ast.ClassDef, dict[str, ast.AST]] = {}

    def path(self, module: str) -> Path:
        """The file of a module, relative to the root; where there is none, that of a module without submodules."""
        parts = Path(*module.split("."))
        package = parts / "__init__.py"
        return package if (self._root / package).is_file() else parts.with_suffix(".py")

    def has(self, module: str) -> bool:
        return (self._root / self.path(module)).is_file()

    def find(self, module: str, name: str) -> Found | None:
        """What ``name`` is in ``module``: "function", "Class", "CONSTANT", "Class.member".

        A member is whatever a class or a class that it inherits from defines, declares, or assigns to its first
        parameter in a method. What it inherits has to be more than a placeholder for what it would define itself.
        """
        first, _, rest = name.partition(".")
        found = self._top(module, first, frozenset())
        for member in rest.split(".") if rest else ():
            found = self._member(found, member, frozenset()) if found is not None else None
        return found

    def _top(self, module: str, name: str, seen: frozenset[tuple[str, str]]) -> Found | None:
        if (module, name) in seen:
            return None
        seen |= {(module, name)}
        node = self._names_of(module).get(name)
        if node is None:
            return Found(module, ast.Module([], [])) if self.has(f"{module}.{name}") else None
        if isinstance(node, ast.ImportFrom):
            source = self._source_of(module, node)
            outside = not self.has(source.partition(".")[0])
            return Found(module, node) if outside else self._top(source, _original(node, name), seen)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            return self._top(module, node.value.id, seen) or Found(module, node)
        return Found(module, node)

    def _member(self, owner: Found, name: str, seen: frozenset[tuple[str, int]]) -> Found | None:
        here = (owner.module, id(owner.node))
        if not isinstance(owner.node, ast.ClassDef) or here in seen:
            return None
        found = self._members_of(owner.node).get(name)
        if found is not None and not (seen and _is_placeholder(owner.node, found)):
            return Found(owner.module, found)
        for base in owner.node.bases:
            parent = self._base(owner.module, base)
            inherited = self._member(parent, name, seen | {here}) if parent is not None else None
            if inherited is not None:
                return inherited
        return None

    def abstract_members(self, owner: Found) -> set[str]:
        """What a class asks those that inherit from it to define."""
        body = owner.node.body if isinstance(owner.node, ast.ClassDef) else []
        return {
            node.name
            for node in body
            if isinstance(node, Function)
            and any(
                isinstance(mark, ast.Name) and mark.id == "abstractmethod" for mark in node.decorator_list
            )
        }

    def _base(self, module: str, base: ast.expr) -> Found | None:
        if isinstance(base, ast.Subscript):  # Generic[...]
            base = base.value
        if isinstance(base, ast.Name):
            return self._top(module, base.id, frozenset())
        if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
            imported = self._imported_module(module, base.value.id)
            return self._top(imported, base.attr, frozenset()) if imported is not None else None
        return None

    def _imported_module(self, module: str, name: str) -> str | None:
        node = self._names_of(module).get(name)
        if isinstance(node, ast.Import):
            return next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        if isinstance(node, ast.ImportFrom):
            return f"{self._source_of(module, node)}.{_original(node, name)}"
        return None

    def _source_of(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path(module).name == "__init__.py"
        package = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _members_of(self, owner: ast.ClassDef) -> dict[str, ast.AST]:
        if owner not in self._members:
            self._members[owner] = _members(owner)
        return self._members[owner]

    def _names_of(self, module: str) -> dict[str, ast.AST]:
        if module not in self._names:
            path = self._root / self.path(module)
            names = dict(_bound(ast.parse(path.read_bytes()).body)) if path.is_file() else None
            self._names[module] = names
        return self._names[module] or {}


def _bound(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """(name, statement) of what a body binds, in all branches of its conditions; what comes later counts."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield part.id, node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(node, name, []):
                    yield from _bound(part.body if isinstance(part, ast.ExceptHandler) else [part])


def _original(node: ast.ImportFrom, name: str) -> str:
    """What is called ``name`` after an import, where it comes from."""
    return next(alias.name for alias in node.names if (alias.asname or alias.name) == name)


def _members(owner: ast.ClassDef) -> dict[str, ast.AST]:
    members: dict[str, ast.AST] = {}
    bound = list(_bound(owner.body))
    for _, method in bound:
        if isinstance(method, Function) and method.args.args:
            for name, assignment in _assigned(method, method.args.args[0].arg):
                if name not in members or not _is_nothing(assignment):
                    members[name] = assignment
    members.update((name, node) for name, node in bound if name not in members or not _is_nothing(node))
    return members


def _assigned(method: Function, first: str) -> Iterator[tuple[str, ast.AST]]:
    """(name, statement or target) of what a method assigns to attributes of its first parameter."""
    for node in ast.walk(method):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
        elif isinstance(node, ast.For | ast.withitem):
            targets = [node.target if isinstance(node, ast.For) else node.optional_vars or node]
        for part in (part for target in targets for part in ast.walk(target)):
            if (
                isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and isinstance(part.value, ast.Name)
                and part.value.id == first
            ):
                yield part.attr, node


def _is_nothing(node: ast.AST) -> bool:
    """Whether a statement declares a name without a value, or with None."""
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else node
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _is_placeholder(owner: ast.ClassDef, node: ast.AST) -> bool:
    """Whether a member is only there for classes that inherit it to define: a stub, or an attribute without a value."""
    if isinstance(node, Function):
        body = [
            statement
            for statement in node.body
            if not (isinstance(statement, ast.Pass) or _is_constant_expression(statement))
        ]
        return not body or (
            len(body) == 1 and isinstance(body[0], ast.Raise) and _raises_not_implemented(body[0])
        )
    # In data classes and their like (decorated, or of bases that make fields of declarations) these are the fields.
    plain = not owner.decorator_list and all(
        isinstance(base, ast.Name) and base.id == "ABC" for base in owner.bases
    )
    return plain and _is_nothing(node)


def _is_constant_expression(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _raises_not_implemented(statement: ast.Raise) -> bool:
    raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def mentions(part: ast.AST, name: str) -> bool:
    """Whether a function or a class calls, or hands on, something of this name, whatever it belongs to."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.Name) and node.id == name)
        for node in ast.walk(part)
    )


@dataclass(frozen=True)
class Signature:
    """The parameters of a function, without the first one of a method.

    Attributes:
        positional: those that a call may give by position, in order.
        keyword: those that it has to give by name.
        optional: those of both that have a default.
        args, kwargs: whether it takes any further ones, by position and by name.
        is_async: whether it is ``async def``.
    """

    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    optional: frozenset[str]
    args: bool
    kwargs: bool
    is_async: bool

    @classmethod
    def read(cls, function: Function, *, method: bool) -> Signature:
        static = any(
            isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in function.decorator_list
        )
        given = function.args
        positional = [parameter.arg for parameter in (*given.posonlyargs, *given.args)]
        keyword = [parameter.arg for parameter in given.kwonlyargs]
        optional = set(positional[len(positional) - len(given.defaults) :])
        optional |= {
            name for name, default in zip(keyword, given.kw_defaults, strict=True) if default is not None
        }
        return cls(
            tuple(positional[1:] if method and not static else positional),
            tuple(keyword),
            frozenset(optional),
            given.vararg is not None,
            given.kwarg is not None,
            isinstance(function, ast.AsyncFunctionDef),
        )

    @classmethod
    def parse(cls, text: str) -> Signature:
        """The signature that "a, b=, *, c" or "async a, **kwargs" says; "=" stands for any default."""
        is_async = text.startswith("async ")
        parameters = text.removeprefix("async ").replace("=", "=None")
        [function] = ast.parse(f"{'async ' * is_async}def f({parameters}): ...").body
        assert isinstance(function, Function)
        return cls.read(function, method=False)

    def __str__(self) -> str:
        named = [f"{name}=" if name in self.optional else name for name in self.positional]
        star = ["*args"] if self.args else ["*"] if self.keyword else []
        later = [f"{name}=" if name in self.optional else name for name in self.keyword]
        inside = ", ".join([*named, *star, *later, *(["**kwargs"] if self.kwargs else [])])
        return f"{'async ' * self.is_async}({inside})"

    def unlike_call_of(self, theirs: Signature) -> str | None:
        """Why a call that passes these parameters does not fit a function; None if it does."""
        given = theirs.positional[: len(self.positional)]
        if given != self.positional and not (theirs.args and self.positional[: len(given)] == given):
            return "its first parameters are others"
        known = {*theirs.positional[len(given) :], *theirs.keyword}
        for name in self.keyword:
            if name not in known and not theirs.kwargs:
                return f"it has no parameter {name!r}"
        for name in (*theirs.positional[len(given) :], *theirs.keyword):
            if name not in theirs.optional and name not in self.keyword and not self.kwargs:
                return f"it needs a parameter {name!r}"
        return self._unlike_kind(theirs)

    def unlike_replaced(self, theirs: Signature) -> str | None:
        """Why a function of these parameters cannot stand where another is; None if it can."""
        if theirs.positional[: len(self.positional)] != self.positional:
            return "its first parameters are others"
        further = theirs.positional[len(self.positional) :]
        if (further and not (self.args and self.kwargs)) or (theirs.args and not self.args):
            return f"it takes further parameters: {', '.join(further) or '*args'}"
        by_name = [name for name in theirs.keyword if name not in self.keyword]
        if (by_name or theirs.kwargs) and not self.kwargs:
            return f"it takes further parameters: {', '.join(by_name) or '**kwargs'}"
        for name in self.keyword:
            if name not in theirs.keyword:
                return f"it has no parameter {name!r}"
        return self._unlike_kind(theirs)

    def _unlike_kind(self, theirs: Signature) -> str | None:
        if self.is_async != theirs.is_async:
            return "it is no longer async" if self.is_async else "it has become async"
        return None
