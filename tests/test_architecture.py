"""The layers of the source, held against the imports that it really has."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from paretune import registry

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "src" / "paretune"
TOP = 99  # the package itself and `python -m paretune` stand above everything
EVERYWHERE = {"errors"}
TABLES = (registry.RUNNERS, registry.ATTENTION, registry.TRANSFORMS, registry.FORMATS)


# Packages and modules by layer, from the bottom. Imports point to lower layers only; packages of one layer do not
# import each other. `a.b` stands apart from the rest of `a`. docs/architecture.md says what each is for.
LAYERS = {
    unit: layer
    for layer, units in enumerate(
        [
            ["clock", "process", "stats", "native_build", "registry", "option", "files", "assets"],
            ["ops"],
            ["model", "hardware"],
            [
                "transforms",
                "engine.runners",
                "engine.decode.drafts",
                "engine.cache",
                "engine.cache_formats",
                "engine.sampling",
            ],
            ["recipe"],
            ["engine"],
            ["records"],
            ["measure", "evaluate"],
            ["train"],
            ["report"],
            ["tune"],
            ["studies", "api"],
            ["cli"],
        ]
    )
    for unit in units
} | {"": TOP, "__main__": TOP}


def unit_of(module: str, layers: dict[str, int]) -> str:
    """Which unit of the layers a module belongs to: the longest path that it begins with, else its first part."""
    parts = module.split(".")
    paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((path for path in paths if path in layers), parts[0])


@dataclass(frozen=True)
class Import:
    line: int
    target: str  # dotted, without the leading `paretune`; "" is the package itself
    name: str  # what is taken from it, "" for the module
    for_types: bool  # under `if TYPE_CHECKING`


def modules(root: Path) -> dict[str, Path]:
    """Dotted names below the package -> files. The package itself is ""."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool, known: set[str]) -> list[Import]:
    """Every import of this package, at module level and inside functions."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []

    def add(node: ast.AST, dotted: str, name: str = "") -> None:
        if dotted != "paretune" and not dotted.startswith("paretune."):
            return
        target = dotted.removeprefix("paretune").removeprefix(".")
        deeper = f"{target}.{name}".removeprefix(".")
        target, name = (deeper, "") if name and deeper in known else (target, name)
        found.append(Import(node.lineno, target, name, id(node) in for_types))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(node, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["paretune", *module.split(".")] if module else ["paretune"]
                up = node.level - (1 if is_package else 0)
                base = ".".join([*here[: len(here) - up], *([base] if base else [])])
            for alias in node.names:
                add(node, base, alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                add(node, first.value)
    return found


def registered(path: Path) -> dict[str, set[str]]:
    """The modules that each table of `registry.py` names."""
    tables: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))) if path.is_file() else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "register":
            target = node.args[1]
            assert isinstance(target, ast.Constant), "a registration is written out"
            module = str(target.value).partition(":")[0].removeprefix("paretune.")
            tables.setdefault(ast.unparse(node.func.value), set()).add(module)
    return tables


def registry_reads(source: str, tables: dict[str, set[str]]) -> list[Import]:
    """What a module imports by way of a registry: every target of a table that it mentions."""
    return [
        Import(node.lineno, target, "", False)
        for node in ast.walk(ast.parse(source))
        if (name := node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")) in tables
        for target in sorted(tables[name])
    ]


def constants(path: Path) -> set[str]:
    """Names that a file binds at module level by plain assignment (`__version__`)."""
    if not path.is_file():
        return set()
    targets = [
        target
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def violations(root: Path, layers: dict[str, int]) -> list[str]:
    """Imports that do not point down, and modules without a layer, one line each."""
    known = modules(root)
    plain = constants(root / "__init__.py")
    tables = registered(root / "registry.py")
    bad = []
    for module, path in known.items():
        unit = unit_of(module, layers)
        where = f"{path.relative_to(root)}"
        if unit not in layers and unit not in EVERYWHERE:
            bad.append(f"{where}: {unit} has no layer in tests/test_architecture.py")
            continue
        mine = -1 if unit in EVERYWHERE else layers[unit]
        text = path.read_text("utf-8")
        found = imports(text, module, path.name == "__init__.py", set(known))
        if unit != "registry":
            found += registry_reads(text, tables)
        for i in found:
            other = unit_of(i.target, layers)
            if other == unit or other in EVERYWHERE or (other == "" and i.name in plain):
                continue
            theirs = layers.get(other, TOP)
            is_inside = theirs == mine and other.partition(".")[0] == unit.partition(".")[0]
            if theirs < mine or is_inside or (theirs == mine and i.for_types) or {unit, other} == {"", "__main__"}:
                continue
            bad.append(f"{where}:{i.line}: {unit} (layer {mine}) imports {other or 'paretune'} (layer {theirs})")
    return bad


def calls(source: str) -> list[tuple[int, str]]:
    """Line and dotted name of each attribute, and `module.name` of each `from module import name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


NUMBER_FORMATS = {"int8", "fp8"}  # words for numbers too, wherever they are stored


def mechanism_names() -> set[str]:
    """Names of runners, attention functions, transforms and weight formats."""
    return {name for table in TABLES for name in table.names()} - NUMBER_FORMATS


def test_nobody_asks_for_the_name_of_a_mechanism():
    """Operators know the layouts of their own formats, and a mechanism's file its own names."""
    own = {target.partition(":")[0] for t in TABLES for target in t.targets.values()}
    bad = {
        str(path.relative_to(SOURCE)): found
        for module, path in modules(SOURCE).items()
        if module.partition(".")[0] != "ops" and f"paretune.{module}" not in own
        if (found := name_tests(path.read_text("utf-8"), mechanism_names(), in_tables=False))
    }
    assert bad == {}


@pytest.mark.parametrize(
    "source",
    [
        "if runner.name == 'native': pass",
        "x = kind != 'eager'",
        "x = t.name in ('precision', 'nf4')",
        "x = 'compile' == mode.runner",
        "x = choice[3].startswith('compile')",
        "match runner:\n    case 'native':\n        pass",
        "x = [t for t in recipe if t['name'] not in {'mechanism'}]",
    ],
)
def test_a_planted_test_of_a_mechanism_is_caught(source):
    assert name_tests(source, mechanism_names(), in_tables=False)
    assert not name_tests("x = kind == other; y = runner.compiled; z = name == 'sdpas'", mechanism_names())


CLOCKS = r"time\.(time|perf_counter|monotonic|process_time|thread_time|sleep)(_ns)?|timeit(\..*)?"
PICKLES = r"(c?pickle|_pickle|dill|shelve|joblib|marshal)(\..*)?|torch\.(load|save)"


def matches(source: str, pattern: str) -> list[str]:
    return [f"{line}: {name}" for line, name in calls(source) if re.fullmatch(pattern, name)]


# Of a family, what stands above one: everything else in the folder is one family's own.
SHARED = {f"model.families.{name}" for name in ("base", "fold", "gguf")}
TABLE_LOOKUPS = {"get", "pop", "setdefault"}
LOOKUPS = TABLE_LOOKUPS | {"startswith", "endswith", "removeprefix", "removesuffix", "index", "count"}


def name_tests(source: str, names: set[str], in_tables: bool = True) -> list[str]:
    """Lines that decide by a literal name: comparisons, membership, `match`, look-ups in tables and by them.

    Args:
        in_tables: False for names that are words of results too (`attention`), which stand in many a table.
    """

    def literal(node: ast.AST | None) -> bool:
        if isinstance(node, ast.Constant):
            return node.value in names
        if isinstance(node, ast.Dict):
            return any(literal(key) for key in node.keys)
        return isinstance(node, ast.Tuple | ast.List | ast.Set) and any(literal(e) for e in node.elts)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            is_test = any(literal(side) for side in (node.left, *node.comparators))
        elif isinstance(node, ast.MatchValue):
            is_test = literal(node.value)
        elif isinstance(node, ast.Subscript) and in_tables:
            is_test = literal(node.slice)  # a `Dict` is caught below
        elif isinstance(node, ast.Dict) and in_tables:
            is_test = literal(node)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LOOKUPS - (set() if in_tables else TABLE_LOOKUPS)
        ):
            is_test = any(literal(argument) for argument in node.args)
        else:
            continue
        if is_test:
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_each_unit_has_one_layer_and_is_explained():
    paths = [unit.replace(".", "/") for unit in LAYERS if LAYERS[unit] != TOP]
    assert len(paths) > 25
    assert [p for p in paths if not (SOURCE / p).is_dir() and not (SOURCE / f"{p}.py").is_file()] == []
    page = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    assert [p for p in paths if f"`{p}/`" not in page and f"`{p}.py`" not in page] == []
    assert not EVERYWHERE & LAYERS.keys()


def test_imports_point_down():
    assert violations(SOURCE, LAYERS) == []


def test_the_source_was_seen():
    """The rule above would also hold for an empty folder."""
    found = [
        (module, i.target)
        for module, path in modules(SOURCE).items()
        for i in imports(path.read_text("utf-8"), module, path.name == "__init__.py", set(modules(SOURCE)))
    ]
    assert ("engine.generate", "clock") in found  # `from package import module`
    assert ("engine.cache", "ops.attention.spec") in found
    assert ("measure.worker", "engine.load") in found  # inside a function
    assert ("recipe.recipe", "transforms.base") in found  # for types
    assert len(found) > 100


PLANTED = {
    "up at module level": ("engine/x.py", "from paretune.tune import goal"),
    "up, a plain import": ("engine/x.py", "import paretune.tune.goal"),
    "up inside a function": ("ops/x.py", "def f():\n    from paretune import model"),
    "up inside a method": ("ops/x.py", "class A:\n    def f(self):\n        import paretune.tune as t"),
    "up, relative": ("engine/x.py", "from ..tune import goal"),
    "up, relative from a package": ("engine/__init__.py", "from ..tune.goal import y"),
    "up for types": ("engine/x.py", "if TYPE_CHECKING:\n    from paretune.tune import goal"),
    "up by name": ("engine/x.py", "import importlib\nimportlib.import_module('paretune.tune.goal')"),
    "sideways": ("model/x.py", "from paretune import hardware"),
    "sideways between modules": ("hardware.py", "from paretune.model import config"),
    "bottom layer sideways": ("clock.py", "from paretune import files"),
    "the errors import something": ("errors.py", "from paretune import clock"),
    "the lazy front door": ("engine/x.py", "from paretune import load"),
    "up by a registry": ("ops/x.py", "from paretune.registry import THINGS\nTHINGS.get('a')"),
    "up by a registry's module": ("ops/x.py", "from paretune import registry\nregistry.THINGS.get('a')"),
    "a part of a package that stands lower": ("engine/runners/x.py", "from paretune.engine import y"),
    "no layer": ("helpers.py", ""),
    "a folder without a layer": ("utils/x.py", ""),
}
ALLOWED = {
    "down": ("engine/x.py", "from paretune import clock\nfrom paretune.model import config"),
    "down by a registry": ("tune/x.py", "from paretune.registry import THINGS\nTHINGS.get('a')"),
    "down to a part of the own package": ("engine/x.py", "from paretune.engine.runners import z"),
    "errors from the bottom": ("clock.py", "from paretune.errors import UsageError"),
    "inside one package": ("engine/x.py", "from paretune.engine.y import z\nfrom . import y"),
    "sideways for types": (
        "recipe.py",
        "if TYPE_CHECKING:\n    from paretune.transforms.base import Context",
    ),
    "a name that only sounds like it": ("engine/x.py", "from tune import x\nimport paretunes.tune"),
    "the version": ("engine/x.py", "from paretune import __version__"),
    "main starts the command line": ("__main__.py", "from paretune.cli import app"),
}


@pytest.fixture
def small(tmp_path):
    """A small package in which a line can be planted."""
    root = tmp_path / "paretune"
    (root / "__init__.py").parent.mkdir()
    (root / "__init__.py").write_text("__version__ = '1'\n\n\ndef __getattr__(name):\n    from paretune import api\n")
    for folder, module in (
        ("tune", "goal"),
        ("engine", "y"),
        ("model", "config"),
        ("transforms", "base"),
        ("cli", "app"),
    ):
        (root / folder).mkdir()
        (root / folder / "__init__.py").touch()
        (root / folder / f"{module}.py").touch()
    for module in ("clock", "files", "errors", "hardware"):
        (root / f"{module}.py").touch()
    (root / "engine" / "runners").mkdir()
    (root / "engine" / "runners" / "__init__.py").touch()
    (root / "registry.py").write_text('THINGS.register("a", "paretune.engine.runners.z:A")\n')

    def plant(name: str, text: str) -> list[str]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
        return violations(root, LAYERS)

    assert violations(root, LAYERS) == []
    return plant


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_caught(small, case):
    name, text = PLANTED[case]
    assert len(small(name, text)) == 1, text


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_allowed_passes(small, case):
    assert small(*ALLOWED[case]) == []


def test_one_clock():
    bad = {
        str(path.relative_to(SOURCE)): found
        for path in modules(SOURCE).values()
        if path.name != "clock.py" and (found := matches(path.read_text("utf-8"), CLOCKS))
    }
    assert bad == {}
    assert matches((SOURCE / "clock.py").read_text("utf-8"), CLOCKS)  # the search finds the one that is there


def test_no_pickle():
    bad = {
        str(path.relative_to(SOURCE)): found
        for path in modules(SOURCE).values()
        if (found := matches(path.read_text("utf-8"), PICKLES))
    }
    assert bad == {}
    arrays = [p for p in modules(SOURCE).values() if re.search(r"allow_pickle\s*=\s*True", p.read_text("utf-8"))]
    assert arrays == []


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("import time\ntime.sleep(1)", CLOCKS),
        ("from time import perf_counter", CLOCKS),
        ("import time\nnow = time.perf_counter_ns", CLOCKS),
        ("import pickle", PICKLES),
        ("from pickle import loads", PICKLES),
        ("import torch\ntorch.load('x')", PICKLES),
    ],
)
def test_the_searches_catch(source, pattern):
    assert matches(source, pattern)


def test_nobody_asks_for_the_name_of_a_family():
    """What a family is like, it declares (`model/families/base.py`)."""
    names = set(registry.FAMILIES.names())
    bad = [
        f"{path.relative_to(SOURCE)}:{line}"
        for module, path in modules(SOURCE).items()
        if module != "registry" and not module.startswith("model.families")
        for line in name_tests(path.read_text("utf-8"), names)
    ]
    assert bad == []


def test_nobody_imports_one_family():
    """Not even `isinstance(model, GPT2)`: what all have in common stands in `SHARED`."""
    known = set(modules(SOURCE))
    assert known >= SHARED
    bad = [
        f"{path.relative_to(SOURCE)}:{i.line}: {i.target}"
        for module, path in modules(SOURCE).items()
        if not module.startswith("model.families")
        for i in imports(path.read_text("utf-8"), module, path.name == "__init__.py", known)
        if i.target.startswith("model.families.") and i.target not in SHARED
    ]
    assert bad == []


@pytest.mark.parametrize(
    "source",
    [
        "a = config.family == 'gpt2'",
        "a = 'gpt2' != config.family",
        "a = c['family'] in ('llama', 'mistral')",
        "a = family not in ['mistral']",
        "match family:\n    case 'gpt2' | 'x':\n        pass",
        "a = {'gpt2': 1, 'llama': 2}[family]",
        "TABLE = {'llama': 2}",
        "a = TABLE['llama']",
        "a = TABLE.get('gpt2', 0)",
        "a = family.startswith(('x', 'gpt2'))",
    ],
)
def test_a_planted_name_test_is_caught(source):
    assert name_tests(source, {"gpt2", "llama", "mistral"})
    assert not name_tests(source, {"another"})


@pytest.mark.parametrize("source", ["DEFAULT = 'gpt2'", "KNOWN = ('gpt2', 'llama')", "a = family in peer.families"])
def test_naming_a_family_without_a_test_is_allowed(source):
    assert not name_tests(source, {"gpt2", "llama", "mistral"})


def test_the_command_line_starts_without_torch():
    names = ["paretune", "paretune.cli"] + ["paretune.__main__"] * (SOURCE / "__main__.py").is_file()
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"{name} imports torch"
    assert "numpy" not in sys.modules, f"{name} imports numpy"
"""
    done = run(code, *names)
    assert done.returncode == 0, done.stderr
    assert run(code, "paretune.engine.cache").returncode != 0  # the check can fail


def test_every_module_imports_without_the_test_extras():
    names = [f"paretune.{m}".removesuffix(".") for m in modules(SOURCE)]
    code = """
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformers", "hypothesis", "pytest", "_pytest", "pytest_timeout", "triton"}:
            raise ModuleNotFoundError(f"{name} is a test extra", name=name)

sys.meta_path.insert(0, Refuse())
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    sys.exit("the extras are not blocked")
bad = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        if name.endswith(".triton") and getattr(error, "name", None) == "triton":
            continue  # kernels, imported where Triton runs and nowhere else
        bad.append(f"{name}: {type(error).__name__}: {error}")
sys.exit("\\n".join(bad) or None)
"""
    done = run(code, *names)
    assert done.returncode == 0, done.stderr
    assert len(names) > 40
