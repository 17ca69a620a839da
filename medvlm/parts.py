"""The folder is the registry: parts of this package by name, read without importing them."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from .errors import ModelError


def names(folder: str, attribute: str = "build") -> dict[str, str]:
    """{name: first line of its docstring} of the parts in a folder of this package; the folder is the registry."""
    found = {}
    for path in sorted((Path(__file__).parent / folder).glob("*.py")):
        defined, says = _read(path, path.stat().st_mtime_ns)
        if attribute in defined:
            found[path.stem] = says
    found |= {e.name: f"from {e.dist.name}" for e in _installed(folder)}
    return found


def find(folder: str, name: str, attribute: str = "build"):
    """The module of a part, by name; never by a dotted path."""
    file = Path(__file__).parent / folder / f"{name}.py"
    here = re.fullmatch(r"[A-Za-z]\w*", name) and (file.is_file() and attribute in _read(file, file.stat().st_mtime_ns)[0] or name in {e.name for e in _installed(folder)})
    if not here:
        raise ModelError(f"there is no {folder[:-1]} {name!r}; there are: {', '.join(names(folder, attribute)) or 'none'}", "NO_SUCH_PART")
    return _module(folder, name)


def every(folder: str, attribute: str) -> dict:
    """{name: what its module calls ``attribute``} of all the parts in a folder."""
    return {name: getattr(_module(folder, name), attribute) for name in names(folder, attribute)}


@functools.cache
def _read(path: Path, changed: int) -> tuple[frozenset[str], str]:
    """(what a file defines, the first line of its docstring); a model asks for many parts, and parsing them each time takes 0.2 s."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    values = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    return frozenset(functions | values), (ast.get_docstring(tree) or "").split("\n")[0]


@functools.cache
def _installed(folder: str) -> tuple[EntryPoint, ...]:
    """Reading what is installed takes 10 ms, and a process asks for every part."""
    return tuple(entry_points(group=f"medvlm.{folder}"))


def carries(**functions):
    """A decorator: the function has these beside it, as attributes; what a training loop heeds of an objective, say."""

    def mark(function):
        vars(function).update(functions)
        return function

    return mark


def _module(folder: str, name: str):
    for entry in _installed(folder):
        if entry.name == name:
            return entry.load()
    return importlib.import_module(f".{folder}.{name}", __package__)
