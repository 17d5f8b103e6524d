"""README.md and docs/ match the code: commands, flags, configs, extras, files and Python.

Static checks run by default; test_readme_commands.py (`-m slow`) runs every command in a fresh
clone and virtual environment.
"""

import ast
import configparser
import pathlib
import re
import shlex
import subprocess

import pytest

import vit_jax_zoo
from vit_jax_zoo import config as config_lib
from vit_jax_zoo.__main__ import COMMANDS
from vit_jax_zoo.inference.base import list_options

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = {  # pages with commands and code to paste
  page.stem: page.read_text()
  for folder in ("guides", "systems", ".")
  for page in sorted((ROOT / "docs" / folder).glob("*.md"))
  if page.stem not in ("add_a_model", "MODELS", "PLANS", "RECIPES")
} | {"README": README}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("python -m", "vit-jax-zoo ")
INLINE = re.compile(r"`([^`\n]+)`")


def blocks(language, page=README):
  return [text for name, text in BLOCK.findall(page) if name == language]


def commands(page=README):
  """Returns the commands of a page's shell blocks as lists of words, continued lines joined."""
  lines = "\n".join(blocks("sh", page)).replace("\\\n", " ").splitlines()
  parts = [part for line in lines for part in line.split("&&")]
  return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def spans(page):
  """Returns the text of every `code span` of a page outside its blocks, without line breaks."""
  prose = BLOCK.sub("", page)
  return [span for line in prose.split("\n\n") for span in INLINE.findall(line.replace("\n", " "))]


def module_of(words):
  """Returns the module that a command runs, or None."""
  if words[0] == "vit-jax-zoo":
    return COMMANDS[words[1]][0] if len(words) > 1 else None
  return words[words.index("-m") + 1] if "-m" in words else None


def flags_of(module):
  """Returns the names of the flags that a module's source, and predictors' options, define."""
  path = ROOT / (module.replace(".", "/") + ".py")
  path = path if path.exists() else path.with_suffix("") / "__main__.py"
  calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
  defined = [
    c for c in calls if getattr(c.func, "attr", "").startswith(("DEFINE_", "add_argument"))
  ]
  names = [c.args[0].value for c in defined if isinstance(c.args[0], ast.Constant)]
  options = [option.name for option in list_options()] if module.endswith(".predict") else []
  return {name.lstrip("-").replace("-", "_") for name in [*names, *options]}


def package_commands():
  """Returns the distinct commands of the package in all blocks and spans."""
  pages = GUIDES.values()
  found = [words for page in pages for words in commands(page)]
  found += [shlex.split(s) for page in pages for s in spans(page) if s.startswith(PROGRAMS)]
  run = {tuple(w): w for w in found if (module_of(w) or "").startswith("vit_jax_zoo.")}
  return [pytest.param(words, id=" ".join(words[2:])[:70]) for words in run.values()]


@pytest.mark.parametrize("words", package_commands())
def test_command_flags_exist(words):
  given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
  given = {flag for flag in given if not flag.startswith("config.")}
  assert given <= flags_of(module_of(words)), f"flags of {module_of(words)}"


def config_arguments():
  """Returns the config arguments in all commands and spans."""
  words = [word for page in GUIDES.values() for command in commands(page) for word in command]
  words += [word for page in GUIDES.values() for span in spans(page) for word in span.split()]
  given = [word.removeprefix("--config=") for word in words]
  return sorted({w for w in given if re.fullmatch(r"configs/\w+\.py(:[\w.,=:/+-]+)?", w)})


@pytest.mark.parametrize("argument", config_arguments())
def test_config_arguments_resolve(argument, monkeypatch):
  monkeypatch.chdir(ROOT)
  config_lib.load(argument)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page):
  targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
  local = [target for target in targets if not target.startswith("http")]
  assert [target for target in local if not (page.parent / target).exists()] == []


def test_named_functions_exist():
  named = {m for page in GUIDES.values() for m in re.findall(r"`(\w+/[\w/]+\.py):(\w+)`", page)}
  named = {(file, name) for file, name in named if not file.startswith("configs/")}
  assert len(named) > 50
  missing = []
  for file, name in named:
    text = (ROOT / "vit_jax_zoo" / file).read_text()
    if not re.search(rf"^(class|def) {name}\b", text, re.MULTILINE):
      missing.append(f"{file}:{name}")
  assert missing == []


def test_named_extras_exist():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  known, pages = set(setup["options.extras_require"]), "".join(GUIDES.values())
  named = {extra for group in re.findall(r"\.\[([\w,]+)\]", pages) for extra in group.split(",")}
  assert named
  assert named <= known


def test_launch_commands_dry_run():
  launches = [words for words in commands() if words[0] == "./launch_tpu.sh" and "..." not in words]
  assert launches
  for words in launches:
    split = words.index("--") if "--" in words else len(words)
    dry = [*words[:split], *(["--dry-run"] * ("--dry-run" not in words)), *words[split:]]
    result = subprocess.run(["bash", *dry], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert words[1] != "all" or "v5e:4x4: 16 devices, mesh data=16, batch" in result.stderr


def test_python_attributes_exist():
  trees = [ast.parse(text) for page in GUIDES.values() for text in blocks("python", page)]
  assert trees
  attributes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
  used = {n.attr for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "zoo"}
  assert used
  assert [name for name in used if not hasattr(vit_jax_zoo, name)] == []
