"""The house rules a machine can hold: import direction, sizes, and a few habits.

A rule is a function from one file to its violations; test_house.py applies them. The tables at the
top are the rules' content: a new top-level module needs a place in LAYERS.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vidlm"

# Lowest first. A module imports from its own layer or from a lower one. "" is vidlm/__init__.py.
LAYERS = (
    ("errors", "types"),
    ("files",),
    ("media", "download", "foreign", "hub", "text"),
    ("native",),
    ("nn", "vision", "weights", "fingerprint"),
    ("models", "quant"),
    ("engine",),
    ("hf", "compat"),
    ("api", "fit", "plan", "server", "batch", "train", "demo", "cli", "__main__", ""),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What the layers alone would allow: importer, what it leaves alone, and the exceptions to that.
APART: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "media",
        ("download", "foreign", "hub", "text"),
        (),
    ),  # a decode worker imports vidlm.media and nothing more
    ("nn", ("vision", "weights"), ()),
    ("engine", ("models",), ("models.base",)),  # knows the family protocol, never a family
)

# Applications see the library as a user does: these packages by their public names, never by a
# submodule; the next ones with their submodules; and what a single application needs besides.
APPLICATIONS = ("server", "batch", "train", "demo", "cli")
DOORS = ("", "api", "plan", "engine", "hf")
OPEN = ("media", "types", "errors", "files")
ALSO = {
    "train": ("models", "nn"),
    "demo": ("hub", "text"),
    "demo.train": ("models", "nn", "weights"),
    "cli": ("server", "batch", "train", "demo", "native"),
}

NEVER = ("transformers", "torchvision")  # oracles of the tests
# usable before, or without, torch
LIGHT = ("errors", "types", "files", "media", "download", "foreign", "hub", "text")
TORCH_FREE = (*LIGHT, "engine.request", "engine.blocks", "engine.scheduler", "engine.sequence")

# By the start of a path, the first that fits.
MAX_LINES = {
    "src/vidlm/models/": 450,
    "src/vidlm/compat/llava.py": 150,
    "ARCHITECTURE.md": 60,
    "": 400,
}
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
# "module:qualified.name" -> the documented external signature that it mirrors.
EXEMPT: dict[str, str] = {
    "api.lm:load": "what a model is loaded with, each by its own keyword",
    "media.video:load_video": "every rule of frame choice by its own keyword",
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


# ---- what a rule sees ------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One file: its path in the repository, its module below vidlm, and its text."""

    path: str
    text: str
    known: frozenset[str] = frozenset()  # every module of the package, to tell it from a name

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        parts = Path(self.path).with_suffix("").parts[2:]
        return ".".join(parts[:-1] if parts[-1:] == ("__init__",) else parts)

    @property
    def package(self) -> str:
        """What a relative import of one dot starts from."""
        return ".".join(("vidlm", *Path(self.path).parent.parts[2:]))

    def at(self, node: ast.AST | Import, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


@dataclass(frozen=True)
class Import:
    """One imported thing: a module in full, and the name taken from it, if any."""

    lineno: int
    module: str
    name: str = ""

    @property
    def own(self) -> str | None:
        """The module below vidlm, or None for somebody else's."""
        if not within(self.module, "vidlm"):
            return None
        return self.module.removeprefix("vidlm").removeprefix(".")


Rule = Callable[[Source], Iterator[str]]


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def top(module: str) -> str:
    return module.partition(".")[0]


def sources(*folders: str) -> list[Source]:
    """The Python files below these folders of the repository."""
    modules = package_modules()
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(p.relative_to(ROOT).as_posix(), p.read_text("utf-8"), modules) for p in paths]


def package_modules() -> frozenset[str]:
    """The full names of vidlm's modules, with those that LAYERS foresees."""
    files = (Source(p.relative_to(ROOT).as_posix(), "") for p in PACKAGE.rglob("*.py"))
    modules = {*LEVEL, *(file.module for file in files)}
    return frozenset(f"vidlm.{module}" for module in modules if module)


def imports(source: Source) -> Iterator[Import]:
    """Every import of a file: at its top, in a function, for types only, or by literal name."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = absolute(source, "." * level + (module or ""))
                for alias in names:
                    full = f"{base}.{alias.name}"
                    is_module = full in source.known
                    yield Import(node.lineno, *((full,) if is_module else (base, alias.name)))
            case ast.Call(args=[ast.Constant(value=str(name)), *_]):
                if called(node) in ("import_module", "__import__"):
                    yield Import(node.lineno, absolute(source, name))


def absolute(source: Source, name: str) -> str:
    rest = name.lstrip(".")
    dots = len(name) - len(rest)
    if not dots:
        return rest
    parts = source.package.split(".")
    return ".".join((*parts[: len(parts) - dots + 1], *filter(None, [rest])))


def called(node: ast.Call) -> str:
    """The last part of the name that is called: `c` of `a.b.c()`."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, FunctionNode):
            yield name, child
        is_scope = isinstance(child, FunctionNode | ast.ClassDef)
        yield from functions(child, f"{name}." if is_scope else prefix)


# ---- the rules -------------------------------------------------------------------------------


def imports_upward(source: Source) -> Iterator[str]:
    here = top(source.module)
    if here not in LEVEL:
        yield source.at(source.tree, f"vidlm.{here} has no layer; give it one in LAYERS")
        return
    for item in imports(source):
        if item.own is None:
            continue
        there = top(item.own)
        if there not in LEVEL:
            yield source.at(item, f"{item.module} has no layer; give it one in LAYERS")
        elif LEVEL[there] > LEVEL[here]:
            yield source.at(item, f"imports {item.module} from a layer above")


def imports_sideways(source: Source) -> Iterator[str]:
    for importer, others, exceptions in APART:
        if not within(source.module, importer):
            continue
        for item in imports(source):
            if within(item.own or "", *others) and not within(item.own or "", *exceptions):
                yield source.at(item, f"{importer} may not import {item.module}")


def imports_past_the_door(source: Source) -> Iterator[str]:
    here = top(source.module)
    if here not in APPLICATIONS:
        return
    extra = [
        name for place, names in ALSO.items() if within(source.module, place) for name in names
    ]
    for item in imports(source):
        if item.own is None or within(item.own, here):
            continue
        parts = (*item.own.split("."), item.name)
        if any(part.startswith("_") and not part.startswith("__") for part in parts):
            yield source.at(item, f"takes a private name: {item.module} {item.name}".rstrip())
        elif item.own not in DOORS and not within(item.own, *OPEN, *extra):
            yield source.at(item, f"an application may not import {item.module}")


def imports_oracles(source: Source) -> Iterator[str]:
    for item in imports(source):
        if within(item.module, *NEVER):
            yield source.at(item, f"imports {item.module}, which is for tests only")


def imports_torch(source: Source) -> Iterator[str]:
    if within(source.module, *TORCH_FREE):
        for item in imports(source):
            if within(item.module, "torch"):
                yield source.at(item, f"vidlm.{source.module} does without torch")


def too_long(source: Source) -> Iterator[str]:
    limit = next(limit for prefix, limit in MAX_LINES.items() if source.path.startswith(prefix))
    lines = source.text.count("\n")
    if lines > limit:
        yield f"{source.path}: {lines} lines, at most {limit}"


def long_functions(source: Source) -> Iterator[str]:
    for name, node in functions(source.tree):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield source.at(node, f"{name} has {lines} lines, at most {MAX_FUNCTION_LINES}")


def many_parameters(source: Source) -> Iterator[str]:
    for key, node in over_parameters(source).items():
        if key not in EXEMPT:
            name = key.partition(":")[2]
            yield source.at(node, f"{name} has more than {MAX_PARAMETERS} parameters")


def over_parameters(source: Source) -> dict[str, FunctionNode]:
    """The functions over the limit, by the key that EXEMPT knows them by."""
    return {
        f"{source.module}:{name}": node
        for name, node in functions(source.tree)
        if count_parameters(node.args) > MAX_PARAMETERS
    }


def count_parameters(spec: ast.arguments) -> int:
    named = [*spec.posonlyargs, *spec.args]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    packed = [arg for arg in (spec.vararg, spec.kwarg) if arg]
    return len(named) + len(spec.kwonlyargs) + len(packed)


def swallows_errors(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        match node:
            case ast.ExceptHandler(type=None):
                yield source.at(node, "bare except")
            case ast.ExceptHandler(type=kind, body=body) if kind and is_broad(kind):
                if all(does_nothing(statement) for statement in body):
                    yield source.at(node, "swallows every exception")
            case ast.Call(args=kinds) if called(node) == "suppress" and any(map(is_broad, kinds)):
                yield source.at(node, "suppresses every exception")


def is_broad(kind: ast.expr) -> bool:
    match kind:
        case ast.Tuple(elts=kinds):
            return any(map(is_broad, kinds))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in ("Exception", "BaseException")
    return False


def does_nothing(statement: ast.stmt) -> bool:
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass | ast.Continue)


def prints(source: Source) -> Iterator[str]:
    if within(source.module, "cli", "demo"):
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                yield source.at(node, "prints; the library logs")


# What torch makes in the process' default dtype, which any thread may change at any time.
ALLOCATORS = {"empty", "empty_strided", "eye", "full", "ones", "rand", "randn", "normal", "zeros"}
CONVERTERS = {"arange", "as_tensor", "asarray", "linspace", "logspace", "range", "tensor"}
CREATORS = {*ALLOCATORS, *CONVERTERS, "scalar_tensor"}
TYPED_BY_DEFAULT = {"Tensor", "FloatTensor"}  # take no dtype at all
CREATING = CREATORS | TYPED_BY_DEFAULT


def leaves_dtype_to_torch(source: Source) -> Iterator[str]:
    taken = {i.name for i in imports(source) if i.module == "torch"} & CREATORS
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                is_creator = name in CREATING
            case ast.Call(func=ast.Name(id=name)):
                is_creator = name in taken
            case _:
                continue
        has_dtype = name in CREATORS and any(word.arg == "dtype" for word in node.keywords)
        if is_creator and not has_dtype:
            yield source.at(node, f"torch.{name} without dtype depends on the process' default")


def writes_in_place(source: Source) -> Iterator[str]:
    """A file that is written where it shall be is lost when that fails; `partial`, which
    `files.replaced` gives, is none."""
    if source.module == "files":
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.Call() if called(node) in ("write_text", "mkstemp", "NamedTemporaryFile"):
                yield source.at(node, f"{called(node)}; vidlm.files writes whole files")
            case ast.Call(args=args, keywords=words) if called(node) == "open":
                modes = [*args, *(word.value for word in words if word.arg == "mode")]
                if any(map(is_for_writing, modes)) and "partial" not in ast.unparse(node):
                    yield source.at(node, "opens for writing; vidlm.files writes whole files")


def is_for_writing(mode: ast.expr) -> bool:
    match mode:
        case ast.Constant(value=str(text)):
            return bool(text) and set(text) <= set("rwaxbt+") and bool(set(text) & set("wax"))
    return False


def opens_any_image(source: Source) -> Iterator[str]:
    """Pillow tries every plugin it has, and that of EPS starts Ghostscript."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="open", value=opener), keywords=keywords):
                last = getattr(opener, "attr", getattr(opener, "id", ""))
                if last == "Image" and "formats" not in {each.arg for each in keywords}:
                    yield source.at(node, "Image.open without formats=; see media/pillow.py")
            case ast.ImportFrom(module="PIL.Image", names=names):
                if any(alias.name == "open" for alias in names):
                    yield source.at(node, "takes open from PIL.Image; see media/pillow.py")


def starts_undocumented(source: Source) -> Iterator[str]:
    if not ast.get_docstring(source.tree):
        yield f"{source.path}: does not start with a docstring"
