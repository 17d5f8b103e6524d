"""Repository rules: sizes, docstrings, declared dependencies, no machine-specific paths."""

import ast
import configparser
import functools
import importlib.metadata
import importlib.util
import pathlib
import re
import sys

import ml_collections
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "vit_jax_zoo").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 650
# `path` or `path:function`. Keep it empty: split the function or the file.
TOO_LONG = frozenset()

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def parsed(path):
  return ast.parse(path.read_text())


def name_of(path):
  return path.relative_to(ROOT).as_posix()


def length(node):
  """Returns the lines of a function, decorators included."""
  first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
  return node.end_lineno - first + 1


def long_functions(tree):
  nodes = [n for n in ast.walk(tree) if isinstance(n, FUNCTION)]
  return [(n.name, length(n)) for n in nodes if length(n) > MAX_FUNCTION_LINES]


def test_function_length():
  found = {
    f"{name_of(path)}:{name}": lines
    for path in PACKAGE + CONFIGS + BENCHMARKS
    for name, lines in long_functions(parsed(path))
  }
  assert {k: v for k, v in found.items() if k not in TOO_LONG} == {}


def test_long_functions_found():
  body = "\n".join("  x = 1" for _ in range(MAX_FUNCTION_LINES))
  long, short = ast.parse(f"@decorator\ndef f():\n{body}"), ast.parse("def f():\n  x = 1")
  assert long_functions(long) == [("f", MAX_FUNCTION_LINES + 2)]
  assert long_functions(short) == []


def test_file_length():
  files = PACKAGE + CONFIGS + BENCHMARKS
  lengths = {name_of(p): len(p.read_text().splitlines()) for p in files}
  too_long = {k: v for k, v in lengths.items() if v > MAX_FILE_LINES and k not in TOO_LONG}
  assert too_long == {}


def test_every_module_has_docstring():
  modules = PACKAGE + CONFIGS + BENCHMARKS
  undocumented = [name_of(p) for p in modules if not ast.get_docstring(parsed(p))]
  assert undocumented == []


def text_files():
  folders = ["vit_jax_zoo", "configs", "tests", "benchmarks", "colabs", ".ci", ".github", "docs"]
  # In a worktree .git is a file.
  files = [p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]
  files += [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
  suffixes = {"", ".py", ".md", ".cfg", ".toml", ".sh", ".yml", ".json", ".ipynb", ".txt"}
  return [p for p in files if p.suffix in suffixes and "__pycache__" not in p.parts]


# Paths of one machine, or a private package index.
FOREIGN = re.compile(r"(?<![\w.~/])/(?:work|opt|root|home)/\w|(?:index-url|find-links)[ =]")


def test_no_machine_specific_paths():
  assert FOREIGN.search("see " + "/".join(["", "work", "x"]))
  found = [
    f"{name_of(path)}:{number}: {line.strip()[:80]}"
    for path in text_files()
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
    if FOREIGN.search(line)
  ]
  assert found == []


def test_no_todo_markers():
  marker = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
  left = [name_of(p) for p in PACKAGE + CONFIGS if marker.search(p.read_text())]
  assert left == []


def test_goldens_size():
  files = [p for p in (ROOT / "tests" / "goldens").rglob("*") if p.is_file()]
  size = sum(p.stat().st_size for p in files)
  assert size < 60e6


def test_every_golden_has_readme():
  folders = {p.parent for p in (ROOT / "tests" / "goldens").rglob("*.npz")}
  assert folders
  assert sorted(p.name for p in folders if not (p / "README.md").is_file()) == []


SKIP = re.compile(r"pytest\.skip\(|importorskip|mark\.skip|SkipTest|skipTest|@(unittest\.)?skip")
MAY_SKIP = {
  "tests/conftest.py": 1,  # in a tree without a system, see test_boundaries
  "tests/drills/test_commands_under_stress.py": 2,  # without root, no file system is mounted
  "tests/inference/test_onnx.py": 2,  # without the extra onnx
  "tests/inference/test_serving.py": 1,  # without the extra onnx
  "tests/systems/rcnn/test_model.py": 1,  # in a tree without lambda_resnet, see test_boundaries
  "tests/training/test_loggers.py": 3,  # without the extras wandb, mlflow, comet
  "tests/training/test_host.py": 1,  # without glibc
}
"""Skips in default tests by file; `test_parity.py` needs the extra `parity`."""


def test_no_skips_for_missing_files_or_packages():
  tests = [p for p in (ROOT / "tests").rglob("*.py") if p.name != "test_parity.py"]
  found = {name_of(p): len(SKIP.findall(p.read_text())) for p in tests if p.name != "test_house.py"}
  assert {name: count for name, count in found.items() if count > MAY_SKIP.get(name, 0)} == {}


@pytest.mark.parametrize(
  "line",
  [
    "pytest.skip('no file')",
    "np = pytest.importorskip('numpy')",
    "@pytest.mark.skipif(True, reason='')",
    "pytestmark = pytest.mark.skip",
  ],
)
def test_skip_pattern_finds_skips(line):
  assert SKIP.search(line)


def test_changelog_headings():
  headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  version = r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}"
  assert headings[0] == "[Unreleased]" or re.fullmatch(version, headings[0])
  assert all(re.fullmatch(version, h) for h in headings[1:])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_loads(path):
  sys.modules.pop("_config_under_test", None)
  spec = importlib.util.spec_from_file_location("_config_under_test", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if path.name == "__init__.py" or path.stem.endswith("common"):
    return
  config = module.get_config()
  assert isinstance(config, ml_collections.ConfigDict)
  assert {"model", "task", "data", "optimizer"} <= set(config)


# --- dependencies ------------------------------------------------------------------------------


def imported_packages(tree):
  """Yields top-level imports, also those in `if` and `try`, but not inside functions."""
  for node in tree.body if hasattr(tree, "body") else []:
    if isinstance(node, ast.Import):
      yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      yield node.module.partition(".")[0]
    elif not isinstance(node, FUNCTION):
      yield from imported_packages(node)
      for block in ("orelse", "finalbody", "handlers"):
        for inner in getattr(node, block, []):
          yield from imported_packages(ast.Module(body=[inner], type_ignores=[]))


def canonical(name):
  return re.sub(r"[-_.]+", "-", name).lower()


def declared(section="options", option="install_requires"):
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  names = [re.match(r"[\w.-]+", line) for line in setup[section][option].splitlines()]
  return {canonical(n.group()) for n in names if n}


def optional():
  """Returns optional packages: used if installed, or needed by one command."""
  return set.union(*(declared("options.extras_require", x) for x in ("fast", "app", "hf")))


def test_imported_packages_in_all_blocks():
  source = """
import os.path
from a.b import c
from . import sibling
if True:
  import d
try:
  import e
except ImportError:
  import f
else:
  import g
class K:
  import h
def function():
  import lazy
"""
  assert sorted(imported_packages(ast.parse(source))) == ["a", "d", "e", "f", "g", "h", "os"]


def test_every_import_declared():
  distributions = importlib.metadata.packages_distributions()
  allowed = declared() | optional()
  undeclared = {}
  for path in PACKAGE:
    for name in set(imported_packages(parsed(path))):
      if name in sys.stdlib_module_names or name == "vit_jax_zoo":
        continue
      owners = {canonical(d) for d in distributions.get(name, [name])}
      if not owners & allowed:
        undeclared.setdefault(name, []).append(name_of(path))
  assert undeclared == {}
