"""README.md says nothing that is not so: commands, flags, configs, extras, files and code in it.

What takes no longer than reading is checked always; `-m slow` runs every command as a newcomer
would, in a fresh clone and a fresh virtual environment.
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

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def blocks(language):
  return [text for name, text in BLOCK.findall(README) if name == language]


def commands():
  """Every command of the README's shell blocks as a list of words, continued lines joined."""
  lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
  parts = [part for line in lines for part in line.split("&&")]
  return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def spans():
  """The text of every `code span` of the README outside its blocks, line breaks taken out."""
  prose = BLOCK.sub("", README)
  return [span for line in prose.split("\n\n") for span in INLINE.findall(line.replace("\n", " "))]


def module_of(words):
  """The module that a command runs, or None."""
  return words[words.index("-m") + 1] if "-m" in words else None


def flags_of(module):
  """The names of the flags that a module defines, by reading its source."""
  path = ROOT / (module.replace(".", "/") + ".py")
  path = path if path.exists() else path.with_suffix("") / "__main__.py"
  calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
  defined = [
    c for c in calls if getattr(c.func, "attr", "").startswith(("DEFINE_", "add_argument"))
  ]
  return {c.args[0].value.lstrip("-").replace("-", "_") for c in defined}


def of_the_package():
  run = [words for words in commands() if (module_of(words) or "").startswith("vit_jax_zoo")]
  return [pytest.param(words, id=" ".join(words[2:])[:70]) for words in run]


@pytest.mark.parametrize("words", of_the_package())
def test_flags_of_the_commands_exist(words):
  given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
  given = {flag for flag in given if not flag.startswith("config.")}
  assert given <= flags_of(module_of(words)), f"flags of {module_of(words)}"


def config_arguments():
  """What stands behind --config= anywhere in the README, and the configs that its tables name."""
  words = [word for command in commands() for word in command]
  words += [word for span in spans() for word in span.split()]
  given = [word.removeprefix("--config=") for word in words]
  return sorted({word for word in given if word.startswith("configs/") and ".py" in word})


@pytest.mark.parametrize("argument", config_arguments())
def test_configs_resolve(argument, monkeypatch):
  monkeypatch.chdir(ROOT)
  config_lib.load(argument)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
  local = [target for target in targets if not target.startswith("http")]
  assert [target for target in local if not (page.parent / target).exists()] == []


def test_extras_exist():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  known = set(setup["options.extras_require"])
  named = {extra for group in re.findall(r"\.\[([\w,]+)\]", README) for extra in group.split(",")}
  assert named
  assert named <= known


def test_launch_script_takes_its_arguments():
  launches = [words for words in commands() if words[0] == "./launch_tpu.sh" and "..." not in words]
  assert launches
  for words in launches:
    split = words.index("--") if "--" in words else len(words)
    dry = [*words[:split], *(["--dry-run"] * ("--dry-run" not in words)), *words[split:]]
    result = subprocess.run(["bash", *dry], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_python_uses_what_the_package_has():
  trees = [ast.parse(text) for text in blocks("python")]
  assert trees
  attributes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
  used = {n.attr for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "zoo"}
  assert used
  assert [name for name in used if not hasattr(vit_jax_zoo, name)] == []
