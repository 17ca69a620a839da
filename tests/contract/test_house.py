"""The rules of the house, read from the syntax tree: imports go down, the lower floors know no torch, import does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2] / "medvlm"

FLOORS = {
    "errors": 0,
    "parts": 0.5,
    "imaging": 1,
    "sample": 2,
    "datasets": 3, "evaluate": 3,
    "preprocess": 4, "language": 4,
    "encoders": 5, "projectors": 5, "heads": 5,
    "processor": 5, "vlm": 6,
    "predictors": 7,
    "sr": 7.2, "reading": 7.5, "export": 7.5,
    "train": 8,
    "recipes": 9,
    "demo": 10, "doctor": 10,
    "cli": 11, "__main__": 12,
}  # fmt: skip
"""Floor of each file or folder of the package; a new one must be given its floor here."""

LIGHT = {"errors", "parts", "imaging", "sample", "datasets", "evaluate"}
HEAVY = {"torch", "torchvision", "transformers", "timm", "monai", "accelerate", "peft", "open_clip", "segment_anything", "safetensors", "gradio", "tensorflow", "jax"}
"""Libraries that load torch or are as heavy; not below floor 4, not even inside a function."""

PURE = {
    "frozenset", "set", "dict", "list", "tuple", "range", "len", "min", "max", "sorted", "zip", "str", "int", "float", "bytes", "slice",
    "dict.fromkeys", "re.compile", "re.escape", "np.array", "np.dtype", "np.float32", "np.eye", "np.diag", "struct.Struct", "struct.calcsize",
    "TypeVar", "namedtuple", "Path", "PurePath", "field", "version", "logging.getLogger", "getLogger", "os.environ.get", "partial", "functools.partial",
}  # fmt: skip
"""Calls that a module may make while it is imported: they only build a value."""
REGISTERED = {"AutoConfig.register", "AutoModelForImageTextToText.register", "AutoProcessor.register"}
"""How transformers learns of a model; done when ``medvlm.vlm`` is imported, as its users expect."""
METHODS = {"split", "join", "format", "encode", "fromkeys", "items", "keys", "values", "union", "resolve", "with_name", "with_suffix", "joinpath", "lower", "upper", "strip", "replace"}


def modules(house: Path) -> dict[str, Path]:
    """Dotted name -> file; 'medvlm.imaging' for imaging/__init__.py."""
    found = {}
    for path in sorted(house.rglob("*.py")):
        parts = [house.name, *path.relative_to(house).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]):
    """(line, absolute name) of everything that a module imports, at any depth of its code."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            for a in node.names:
                yield node.lineno, f"{full}.{a.name}" if f"{full}.{a.name}" in known or not node.module else full
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value).lstrip(".")


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def broken_rules(house: Path) -> list[str]:
    """One line for every rule that a module breaks."""
    known, wrong = modules(house), []
    for name, path in known.items():
        here, where = room(name), path.relative_to(house.parent)
        if here is None:  # medvlm/__init__.py gives names out lazily and imports nothing of its own
            wrong += [f"{where}:{line} imports {what}" for line, what in imports(name, path, known) if what.startswith(house.name + ".")]
            continue
        if here not in FLOORS:
            wrong.append(f"{where} stands on no floor: add {here!r} to FLOORS")
            continue
        for line, what in imports(name, path, known):
            if what.split(".")[0] in HEAVY and here in LIGHT:
                wrong.append(f"{where}:{line} imports {what} on a floor without torch")
            there = room(what) if what.split(".")[0] == house.name else None
            if there in FLOORS and FLOORS[there] > FLOORS[here]:
                wrong.append(f"{where}:{line} on floor {FLOORS[here]} imports {what} on floor {FLOORS[there]}")
        wrong += [f"{where}:{line} {text}" for line, text in work_at_import(path)]
    return wrong


def work_at_import(path: Path):
    """(line, what) of statements that do more than name things when the module is imported."""

    def statements(body):
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.Pass)):
                continue
            if isinstance(node, ast.ClassDef):
                yield from statements(node.body)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in REGISTERED:
                continue
            elif isinstance(node, ast.If) and (_is_main(node.test) or "TYPE_CHECKING" in ast.dump(node.test)):
                continue
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets):
                    yield node.lineno, "changes something else while it is imported"
                for call in ast.walk(node.value) if node.value else ():
                    if isinstance(call, ast.Call) and not _pure(call.func):
                        yield call.lineno, f"calls {ast.unparse(call.func)} while it is imported"
            else:
                yield node.lineno, f"runs a {type(node).__name__} while it is imported"

    yield from statements(ast.parse(path.read_text(), str(path)).body)


def _pure(func: ast.expr) -> bool:
    text = ast.unparse(func)
    last = text.rpartition(".")[2]
    made = last[:1].isupper()  # a class of ours: Recipe(...), InputSpec(...)
    return made or text in PURE or (isinstance(func, ast.Attribute) and last in METHODS)


def _is_main(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "__name__"


def test_the_house_keeps_its_rules():
    assert broken_rules(HOUSE) == []


@pytest.mark.parametrize(
    ("file", "source", "says"),
    [
        ("imaging/a.py", "from ..vlm import MedVLM", "floor 1 imports medvlm.vlm"),
        ("imaging/a.py", "def f():\n    from .. import vlm", "floor 1 imports medvlm.vlm"),
        ("imaging/a.py", "import medvlm.sample", "floor 1 imports medvlm.sample"),
        ("evaluate/a.py", "def f():\n    import torch.nn as nn", "without torch"),
        ("datasets/a.py", "from transformers import AutoModel", "without torch"),
        ("heads/a.py", "from ..recipes.x import y", "floor 5 imports medvlm.recipes"),
        ("attic/a.py", "x = 1", "no floor"),
        ("imaging/a.py", "import os\nos.environ['A'] = 'b'", "changes something else"),
        ("imaging/a.py", "x = open('y').read()", "calls open"),
        ("imaging/a.py", "print('hello')", "runs a Expr"),
        ("imaging/a.py", "for i in range(3):\n    x = i", "runs a For"),
        ("__init__.py", "from .vlm import MedVLM", "imports medvlm.vlm"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, file, source, says):
    house = tmp_path / "medvlm"
    for name, text in {"__init__.py": "", "vlm.py": "", "sample.py": "", "recipes/x.py": "y = 1", file: source}.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
    found = broken_rules(house)
    assert found and all(file in f for f in found) and says in found[-1]


def test_what_the_rules_allow(tmp_path):
    house = tmp_path / "medvlm"
    allowed = {
        "__init__.py": "from importlib import import_module\n_HOME = {'a': 'b'}",
        "errors.py": "HINTS = {'A': 'b'}\nclass E(Exception):\n    pass",
        "imaging/a.py": "import numpy as np\nfrom ..errors import E\nX = frozenset('A B'.split())\nif __name__ == '__main__':\n    print(X)",
        "recipes/a.py": "from ..train import loop\nfrom ..vlm import M\nRECIPE = Recipe(stages=(Stage('a'),))",
        "train/loop.py": "import torch",
        "vlm.py": "",
        "cli.py": "def f():\n    from .recipes import a",
    }
    for name, text in allowed.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
    assert broken_rules(house) == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    loaded = "import sys, medvlm; print(sorted({m.split('.')[0] for m in sys.modules} & set(%r)))"
    assert run(loaded % sorted(HEAVY | {"numpy", "scipy", "pydicom", "nibabel", "PIL", "rich"})) == "[]"


def test_the_lower_floors_load_no_torch():
    names = [n for n, p in modules(HOUSE).items() if room(n) in LIGHT]
    assert len(names) > 10
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\nprint(sorted({{m.split('.')[0] for m in sys.modules}} & set({sorted(HEAVY)!r})))"
    assert run(code) == "[]"


def test_every_public_name_has_a_home():
    import medvlm

    listed = medvlm._HOME
    assert set(medvlm.__all__) == {"__version__", *listed} and dir(medvlm) == sorted(medvlm.__all__)
    known = modules(HOUSE)
    for name, home in listed.items():
        assert f"medvlm.{home}" in known, f"{name} is said to live in {home}"
        tree = ast.parse(known[f"medvlm.{home}"].read_text())
        defined = {getattr(n, "name", None) for n in tree.body} | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        defined |= {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
        assert name in defined, f"{home} does not define {name}"
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = medvlm.nothing_like_this


def test_no_bare_except_and_no_code_from_data():
    """No ``except:``, no eval, exec, pickle or shell in the package."""
    wrong = []
    for path in modules(HOUSE).values():
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(HOUSE.parent)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{where} bare except")
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                safe = any(k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in node.keywords)
                if text in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system") or (text == "torch.load" and not safe):
                    wrong.append(f"{where} {text}")
                if any(k.arg == "shell" and isinstance(k.value, ast.Constant) and k.value.value for k in node.keywords):
                    wrong.append(f"{where} shell=True")
    assert wrong == []
