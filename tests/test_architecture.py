"""The house rules of ``src/cellweave``, checked by reading its source.

Protects the picture in ``docs/developer/architecture.md``: rooms import only from lower floors, model families do not
know each other, tensor rooms never see AnnData, private names of scvi-tools live in one file, files and functions
stay small, and every public name is documented. Each rule is a small function that is also tried on a file that
breaks it, so that a rule cannot quietly stop working.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "cellweave"
FILES = sorted(SOURCE.rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
# Functions that may be longer: "path::qualified name" -> reason. An entry that is no longer needed fails the test.
LONG_FUNCTIONS: dict[str, str] = {}

# ----------------------------------------------------------------------------------------------------- the table

# A room imports from lower floors, or from itself. The four files of the ground floor count as one room.
GROUND = ("_keys", "_types", "_docs", "_compat")
FLOOR = {
    **dict.fromkeys(GROUND, 1),
    **dict.fromkeys(("nn", "flow", "objective", "stats"), 2),
    **dict.fromkeys(("module", "data", "train"), 3),
    "io": 4,
    "model": 5,
    **dict.fromkeys(("pp", "tl", "pl", "datasets"), 6),
    "__init__": 7,
    "cli": 8,
}
PUBLIC_ROOMS = ("model", "pp", "tl", "pl", "io", "datasets")

# Rooms that may use only these packages (and the standard library).
TENSORS = {"torch", "numpy", "scvi.distributions"}
ONLY = {
    **dict.fromkeys(("nn", "flow", "objective", "stats"), TENSORS),
    "module": TENSORS | {"scvi.module.base"},
}
# Rooms that may use anything but these.
NEVER = {
    "train": {"anndata", "mudata", "scanpy"},
    "pl": {"torch", "lightning", "scvi", "pyro"},
}
# `pl` draws from AnnData keys: of the house it knows the names of the keys and nothing else.
PL_MAY_USE = {"_keys", "_types", "_docs", "pl"}

# Start of the file names of a family; files of one family never import files of another.
FAMILIES = ("stack", "ccfm", "scyan", "scgpt", "geneformer")

# Import name -> name in pyproject.toml, where they differ.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "scvi": "scvi-tools", "pyro": "pyro-ppl", "scib_metrics": "scib-metrics"}

# Packages that `import cellweave` must not load: they cost seconds, and most users need none of them.
HEAVY = ("torch", "scvi", "jax", "polars", "dask", "annbatch")


# ----------------------------------------------------------------------------------------------------- reading


class Import(NamedTuple):
    """One imported module and the name taken from it (empty for a plain ``import``)."""

    module: str
    name: str
    top_level: bool  # false inside a function: such an import may use an optional dependency


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands; ``path`` is relative to ``src/cellweave``."""
    tree = ast.parse(source)
    bodies = (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef))
    inside = {id(node) for body in bodies for node in ast.walk(body)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute_module(node, path)
            yield from (Import(module, alias.name, id(node) not in inside) for alias in node.names)


def absolute_module(node: ast.ImportFrom, path: str) -> str:
    """Full module name of ``from ... import``: ``from ._base`` in ``objective/_x.py`` is cellweave.objective._base."""
    if not node.level:
        return node.module or ""
    package = ("cellweave", *Path(path).parts[:-1])
    kept = package[: len(package) - (node.level - 1)]
    return ".".join((*kept, *([node.module] if node.module else [])))


def room_of(path: str) -> str:
    """Room of a file: its folder, or its stem for the files that stand directly in ``src/cellweave``."""
    parts = Path(path).with_suffix("").parts
    return parts[0]


def target_room(item: Import) -> str:
    """Room that an import of cellweave reaches; ``__init__`` for the package itself."""
    parts = item.module.split(".")[1:]
    if parts:
        return parts[0]
    return item.name if item.name in FLOOR else "__init__"


def family_of(name: str) -> str | None:
    """Model family that a file or object belongs to by its name, if any."""
    bare = name.strip("_").lower()
    return next((family for family in FAMILIES if bare.startswith(family)), None)


def families_reached(item: Import) -> set[str]:
    """Families whose files or objects an import of cellweave names."""
    names = (*item.module.split(".")[1:], item.name)
    return {family for name in names if (family := family_of(name)) is not None}


def is_part_of(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def is_standard(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


# ----------------------------------------------------------------------------------------------------- the rules


def broken_import_rules(source: str, path: str) -> list[str]:
    """Sentences about the imports of one file that break the table; empty when all is well."""
    found = []
    for item in imports(source, path):
        own = item.module.split(".")[0] == "cellweave"
        rule = broken_house_rule(item, path) if own else broken_package_rule(item, path)
        if rule:
            found.append(f"{path} imports {item.module} {item.name}".rstrip() + f": {rule}")
    return found


def broken_house_rule(item: Import, path: str) -> str | None:
    room, target = room_of(path), target_room(item)
    if target not in FLOOR:
        return f"`{target}` is no room of the house; add it to the table"
    if room == "pl" and target not in PL_MAY_USE:
        return "pl draws from AnnData keys and may use only " + ", ".join(sorted(PL_MAY_USE))
    same_room = room == target or (room in GROUND and target in GROUND)
    if not same_room and FLOOR[target] >= FLOOR[room]:
        return f"{room} (floor {FLOOR[room]}) must not reach {target} (floor {FLOOR[target]})"
    family = family_of(Path(path).stem)
    if family and families_reached(item) - {family}:
        return f"the family {family} must not know another family"
    return None


def broken_package_rule(item: Import, path: str) -> str | None:
    room, full = room_of(path), f"{item.module}.{item.name}" if item.name else item.module
    if item.module.split(".")[0] == "scvi" and room != "_compat" and re.search(r"\._(?!_)", full):
        return "private names of scvi-tools belong in _compat.py"
    if is_standard(item.module):
        return None
    if room in ONLY and not (is_part_of(item.module, ONLY[room]) or is_part_of(full, ONLY[room])):
        return f"{room} may use only " + ", ".join(sorted(ONLY[room]))
    if is_part_of(item.module, NEVER.get(room, set())):
        return f"{room} must not use it"
    return None


def private_attributes(source: str) -> list[str]:
    """Private names of scvi-tools that are reached by attribute, such as ``scvi.model._utils``."""
    chains = (ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return [chain for chain in chains if re.fullmatch(r"scvi(\.\w+)*\._(?!_)\w+", chain)]


def undeclared_packages(source: str, path: str, required: set[str], optional: set[str]) -> list[str]:
    """Imported packages that pyproject.toml does not install; optional ones may be imported inside functions."""
    found = []
    for item in imports(source, path):
        package = item.module.split(".")[0]
        name = DISTRIBUTIONS.get(package, package)
        allowed = required if item.top_level else required | optional
        if package != "cellweave" and not is_standard(package) and name not in allowed:
            found.append(f"{path} imports {package}, which is not among the dependencies")
    return found


def functions(source: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            name = f"{prefix}{child.name}" if named else prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, child
            yield from walk(child, f"{name}." if named else prefix)

    yield from walk(ast.parse(source), "")


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_functions(source: str, path: str) -> dict[str, int]:
    """Functions longer than the limit: "path::name" -> lines."""
    lengths = {f"{path}::{name}": body_lines(function) for name, function in functions(source)}
    return {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}


def useless_warnings(source: str) -> list[int]:
    """Lines that build a warning and do nothing with it (``UserWarning("...")`` alone warns nobody)."""
    calls = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call))
    return [call.lineno for call in calls if called_name(call).endswith("Warning")]


def prints(source: str) -> list[int]:
    """Lines that call ``print``."""
    calls = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call))
    return [call.lineno for call in calls if called_name(call) == "print"]


def called_name(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def documentation_gaps(name: str, thing: object) -> list[str]:
    """What is missing in the docstring of one public object: text, a parameter, or a text snippet left unfilled."""
    text = inspect.getdoc(thing) or ""
    if not text.strip():
        return [f"{name} has no docstring"]
    gaps = [f"{name} shows the unfilled snippet {match}" for match in re.findall(r"%\(\w*\)?s?", text)]
    if inspect.isclass(thing):
        # the parameters of a class are documented in the class docstring
        text += inspect.getdoc(thing.__init__) or ""
    # numpydoc: a line of its own that holds one name, or several with commas
    lines = re.findall(r"^\s*([\w*]+(?:, [\w*]+)*)(?: :.*)?$", text, flags=re.MULTILINE)
    documented = {name for line in lines for name in line.split(", ")}
    return gaps + [f"{name} does not document its parameter `{p}`" for p in parameters(thing) if p not in documented]


def parameters(thing: object) -> list[str]:
    """Named parameters of a function or class, without ``self`` and without ``*args`` and ``**kwargs``."""
    if not callable(thing) or is_tuple_type(thing):
        return []
    try:
        signature = inspect.signature(thing)
    except ValueError:  # a builtin
        return []
    named = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in named if name not in ("self", "cls") and not name.startswith("_")]


def is_tuple_type(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, tuple)


def public_objects(room: ModuleType) -> Iterator[tuple[str, object]]:
    """Functions and classes in ``__all__`` of a room, and the public methods that cellweave itself wrote."""
    for name in room.__all__:
        thing = getattr(room, name)
        if not callable(thing):
            continue
        yield f"{room.__name__}.{name}", thing
        for method_name, method in inspect.getmembers(thing) if inspect.isclass(thing) else ():
            ours = getattr(method, "__module__", None) or ""
            if not method_name.startswith("_") and inspect.isroutine(method) and ours.startswith("cellweave"):
                yield f"{room.__name__}.{name}.{method_name}", method


# ----------------------------------------------------------------------------------------------------- the house


def relative(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def existing_rooms() -> list[str]:
    return [room for room in PUBLIC_ROOMS if (SOURCE / room / "__init__.py").is_file()]


every_file = pytest.mark.parametrize("file", FILES, ids=relative)


def test_there_is_a_house():
    """The other tests would pass on an empty folder."""
    assert {"model", "datasets"} <= set(existing_rooms())
    assert len(FILES) > 10


@every_file
def test_imports_follow_the_floors(file: Path):
    """A room that reaches upwards or sideways makes the picture of the architecture untrue."""
    assert broken_import_rules(file.read_text(), relative(file)) == []
    assert relative(file) == "_compat.py" or private_attributes(file.read_text()) == []


@every_file
def test_imported_packages_are_installed(file: Path):
    """A package that only a developer happens to have would break at the first user."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {package_name(d) for d in project["dependencies"]}
    optional = {package_name(d) for extra in project["optional-dependencies"].values() for d in extra}
    assert undeclared_packages(file.read_text(), relative(file), required, optional) == []


def package_name(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0]


@every_file
def test_files_and_functions_are_small(file: Path):
    """A reader should be able to hold a file, and see a function, at once."""
    source = file.read_text()
    n_lines = len(source.splitlines())
    assert n_lines <= MAX_FILE_LINES, f"{relative(file)} has {n_lines} lines; the limit is {MAX_FILE_LINES}"
    too_long = {name: n for name, n in long_functions(source, relative(file)).items() if name not in LONG_FUNCTIONS}
    assert too_long == {}, f"longer than {MAX_FUNCTION_LINES} lines: {too_long}"


def test_no_stale_exception_for_long_functions():
    """An exception that nobody needs any more would hide the next long function of that name."""
    longer = {name for file in FILES for name in long_functions(file.read_text(), relative(file))}
    assert set(LONG_FUNCTIONS) <= longer


@every_file
def test_warnings_are_really_given(file: Path):
    """``UserWarning("...")`` as a statement creates a warning and throws it away."""
    assert useless_warnings(file.read_text()) == []


@every_file
def test_only_the_command_line_prints(file: Path):
    """A library that prints cannot be silenced; it logs or warns instead."""
    if relative(file) == "cli.py" or relative(file).startswith("cli/"):
        pytest.skip("the command line talks to a person")
    assert prints(file.read_text()) == []


@pytest.mark.parametrize("room", existing_rooms())
def test_public_names_are_documented(room: str):
    """What a user can call is explained, parameter by parameter."""
    objects = public_objects(importlib.import_module(f"cellweave.{room}"))
    gaps = [gap for name, thing in objects for gap in documentation_gaps(name, thing)]
    assert not gaps, "\n".join(gaps)


@pytest.mark.parametrize("room", existing_rooms())
def test_public_rooms_are_in_the_api_reference(room: str):
    """A room that the API page forgets does not exist for its readers."""
    assert re.search(rf"^\s*cellweave\.{room}$", (ROOT / "docs/api/index.md").read_text(), flags=re.MULTILINE)


def loaded_by(statement: str) -> set[str]:
    """Heavy packages that are loaded in a fresh Python after one statement."""
    code = f"import sys; {statement}; sys.stdout.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_import_cellweave_is_light():
    """``import cellweave`` and ``cellweave --help`` must not cost the seconds that torch and scvi-tools need."""
    assert loaded_by("import cellweave") == set()


@pytest.mark.skipif("pl" not in existing_rooms(), reason="this version has no plotting room")
def test_figures_need_no_torch():
    """Figures can be drawn from a stored AnnData on a machine without torch."""
    assert "torch" not in loaded_by("import cellweave.pl")


# ----------------------------------------------------------------------------------------------------- the rules work


@pytest.mark.parametrize(
    ("path", "line", "reason"),
    [
        ("nn/_x.py", "from cellweave.module import StackModule", "nn (floor 2) must not reach module (floor 3)"),
        ("nn/_x.py", "from cellweave.flow import path", "nn (floor 2) must not reach flow (floor 2)"),
        ("nn/_x.py", "import anndata as ad", "nn may use only numpy, scvi.distributions, torch"),
        ("objective/_x.py", "from scvi.nn import FCLayers", "objective may use only"),
        ("module/_stack.py", "from anndata import AnnData", "module may use only"),
        ("module/_stack.py", "from cellweave.data import loader", "module (floor 3) must not reach data (floor 3)"),
        ("module/_stack.py", "from cellweave.module._ccfm import velocity", "must not know another family"),
        ("model/_stack.py", "from cellweave.module import ScyanModule", "must not know another family"),
        ("model/_scyan.py", "from ._stack import StackModel", "must not know another family"),
        ("model/_stack.py", "from cellweave import tl", "model (floor 5) must not reach tl (floor 6)"),
        ("model/_stack.py", "from cellweave import __version__", "must not reach __init__ (floor 7)"),
        ("data/_x.py", "def f():\n    from cellweave.model import StackModel", "data (floor 3) must not reach model"),
        ("train/_plan.py", "import anndata", "train must not use it"),
        ("train/_plan.py", "from cellweave.data import loader", "train (floor 3) must not reach data (floor 3)"),
        ("pl/_x.py", "import torch", "pl must not use it"),
        ("pl/_x.py", "from cellweave.model import StackModel", "pl draws from AnnData keys"),
        ("model/_stack.py", "from scvi.model._utils import parse_device_args", "belong in _compat.py"),
        ("model/_stack.py", "from scvi.model import _utils", "belong in _compat.py"),
        ("model/_stack.py", "import scvi.data._constants", "belong in _compat.py"),
        ("_keys.py", "from .nn import layers", "_keys (floor 1) must not reach nn (floor 2)"),
        ("tl/_x.py", "from cellweave.attic import old", "`attic` is no room of the house"),
    ],
)
def test_a_forbidden_import_is_caught(path: str, line: str, reason: str):
    """The table is worth nothing if a file that breaks it passes."""
    [message] = broken_import_rules(line, path)
    assert reason in message
    assert message.startswith(path)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nn/_x.py", "import math\nimport torch.nn.functional as F\nimport numpy as np"),
        ("objective/_x.py", "from scvi.distributions import NegativeBinomial\nfrom ._base import Objective"),
        ("module/_stack.py", "from scvi.module.base import LossOutput\nfrom cellweave.nn import Layer"),
        ("module/__init__.py", "from ._stack import StackModule\nfrom ._ccfm import CCFMModule"),
        ("model/_stack_getters.py", "from ._stack import StackModel\nfrom cellweave.module._stack import StackModule"),
        ("train/_plan.py", "import lightning\nfrom cellweave.objective import Objective"),
        ("_compat.py", "from scvi.model._utils import use_distributed_sampler\nfrom ._keys import REGISTRY_KEYS"),
        ("pl/_x.py", "import matplotlib.pyplot as plt\nfrom cellweave._keys import OUTPUT_KEYS"),
        ("cli.py", "import typer\nimport cellweave.model\nfrom cellweave import datasets"),
    ],
)
def test_an_allowed_import_is_left_alone(path: str, line: str):
    """A rule that also refuses good code would soon be switched off."""
    assert broken_import_rules(line, path) == []


def test_a_private_attribute_of_scvi_tools_is_caught():
    """``import scvi`` followed by ``scvi.model._utils`` is the same trespass as importing it."""
    assert private_attributes("scvi.model._utils.f(); scvi.__version__; self._scvi; scvi.settings.seed") == [
        "scvi.model._utils"
    ]


def test_an_undeclared_package_is_caught():
    """Optional packages may be imported inside a function, unknown ones nowhere."""
    needed = {"required": {"numpy", "scikit-learn"}, "optional": {"scib-metrics"}}
    fine = "import os, numpy, sklearn.metrics\ndef f():\n    import scib_metrics"
    assert undeclared_packages(fine, "tl/_x.py", **needed) == []
    assert undeclared_packages("import scib_metrics", "tl/_x.py", **needed) == [
        "tl/_x.py imports scib_metrics, which is not among the dependencies"
    ]
    assert len(undeclared_packages("def f():\n    import polars", "tl/_x.py", **needed)) == 1


def test_a_long_function_is_caught():
    """Signature and docstring do not count, the body does, also in methods."""
    body = "\n".join(f"        x{i} = {i}" for i in range(MAX_FUNCTION_LINES))
    source = f'class A:\n    def f(\n        self,\n    ):\n        """Text."""\n{body}\n'
    assert long_functions(source, "nn/_x.py") == {}
    longer = f"{source}        return 1\n"
    assert long_functions(longer, "nn/_x.py") == {"nn/_x.py::A.f": MAX_FUNCTION_LINES + 1}


def test_a_useless_warning_and_a_print_are_caught():
    """Given warnings and raised errors are fine."""
    assert useless_warnings("UserWarning('lost')\nwarnings.warn('given', UserWarning)\nraise UserWarning('x')") == [1]
    assert prints("log('x')\nprint('x')") == [2]


def test_documentation_gaps_are_caught():
    """No text, an undocumented parameter, and a snippet that nobody filled in."""

    def silent(x): ...

    def partial(x, y):
        """Adds numbers.

        Parameters
        ----------
        x
            The first number, %(param_x)s.
        """

    assert documentation_gaps("silent", silent) == ["silent has no docstring"]
    assert documentation_gaps("partial", partial) == [
        "partial shows the unfilled snippet %(param_x)s",
        "partial does not document its parameter `y`",
    ]
