"""The wheel and its console script `vit-jax-zoo`, away from the checkout."""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
from absl import flags
from PIL import Image

from tests import command
from tests.conftest import system_module
from vit_jax_zoo import __main__ as console
from vit_jax_zoo import __version__
from vit_jax_zoo import config as config_lib

system_module("vit")


def call(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["vit-jax-zoo", *arguments])
  console.main()


@pytest.fixture
def no_flags(monkeypatch):
  """A registry with the flags of libraries only, as in a new process."""
  registry = flags.FLAGS.__dict__
  others = {k: v for k, v in registry["__flags_by_module"].items() if not k.startswith("vit")}
  names = {
    name for found in others.values() for flag in found for name in (flag.name, flag.short_name)
  }
  kept = {name: flag for name, flag in registry["__flags"].items() if name in names}
  monkeypatch.setitem(registry, "__flags", kept)
  monkeypatch.setitem(registry, "__flags_by_module", {k: list(v) for k, v in others.items()})


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_commands_are_listed(arguments, monkeypatch, capsys):
  call(monkeypatch, *arguments)
  lines = capsys.readouterr().out.splitlines()
  listed = {words[0] for words in map(str.split, lines) if len(words) > 3}
  assert set(console.COMMANDS) <= listed
  assert lines[0].startswith("usage: vit-jax-zoo ")


def test_version(monkeypatch, capsys):
  call(monkeypatch, "--version")
  assert capsys.readouterr().out == f"{__version__}\n"


def test_misspelt_command(monkeypatch, capsys):
  with pytest.raises(SystemExit) as error:
    call(monkeypatch, "trian")
  assert error.value.code == 2
  assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", console.COMMANDS)
def test_command_runs_its_module(name, monkeypatch):
  ran = []
  monkeypatch.setattr(runpy, "run_module", lambda *a, **k: ran.append((a, k, list(sys.argv))))
  call(monkeypatch, name, "--x=1")
  module = console.COMMANDS[name][0]
  assert ran == [((module,), {"run_name": "__main__"}, [f"vit-jax-zoo {name}", "--x=1"])]
  assert importlib.util.find_spec(module) is not None


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", console.COMMANDS)
def test_help_shows_own_flags_with_defaults(name, no_flags, monkeypatch, capsys):
  with pytest.raises(SystemExit) as error:
    call(monkeypatch, name, "--help")
  assert error.value.code == 0
  text = capsys.readouterr().out
  assert f"usage: vit-jax-zoo {name} [" in text
  assert any(flag in text for flag in ("--model=", "--config=", "--dataset "))
  assert "default: " in text
  assert "verbosity" not in text  # a flag of absl
  assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("module", [module for module, _ in console.COMMANDS.values()])
def test_help_has_an_example(module):
  """In the module's docstring, which jaxtyping's import hook of the tests removes."""
  package = command.ROOT / module.replace(".", "/")
  path = next(p for p in (package.with_suffix(".py"), package / "__main__.py") if p.exists())
  assert f"\n    python -m {module} --" in ast.get_docstring(
    ast.parse(path.read_text()), clean=False
  )


def test_help_lists_every_flag(no_flags, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["vit-jax-zoo", "transfer", "--help"])
  monkeypatch.delitem(sys.modules, "vit_jax_zoo.transfer.__main__", raising=False)
  with pytest.raises(SystemExit):
    console.main()
  shown = [line.split("=")[0].strip() for line in capsys.readouterr().out.splitlines()]
  own = flags.FLAGS.flags_by_module_dict()["vit-jax-zoo transfer"]
  assert {f"--{flag.name}" for flag in own} <= set(shown)
  assert len(own) > 10


def build_wheel(folder):
  """Builds the wheel of a copy of the tracked files, without network; returns its path."""
  copy = folder / "source"
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("vit_jax_zoo", "configs"):
    shutil.copytree(command.ROOT / name, copy / name, ignore=ignore)
  for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(command.ROOT / name, copy)
  build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  subprocess.run(
    [sys.executable, "-c", build, str(folder)],
    cwd=copy, env=environment, check=True, capture_output=True, text=True,
  )  # fmt: skip
  shutil.rmtree(copy)
  return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_has_package_and_configs(wheel):
  with zipfile.ZipFile(wheel) as archive:
    found = {name for name in archive.namelist() if ".dist-info/" not in name}
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "vit-jax-zoo = vit_jax_zoo.__main__:main" in archive.read(entry).decode()
  root = command.ROOT
  files = [p for kind in ("*.py", "*.toml") for p in (root / "vit_jax_zoo").rglob(kind)]
  package = [p.relative_to(root).as_posix() for p in files]
  shipped = [f"vit_jax_zoo/shipped/configs/{p.name}" for p in (root / "configs").glob("*.py")]
  assert found == {*package, *shipped, "vit_jax_zoo/py.typed"}


def test_config_folder_of_checkout():
  assert config_lib.config_folder() == command.ROOT / "configs"


@pytest.mark.parametrize("name", ["vit", "vit.py", "configs/vit.py"])
def test_shipped_config_by_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(f"{name}:demo,num_steps=7").num_steps == 7
  own = "def get_config(arg=''):\n  import ml_collections\n  return ml_collections.ConfigDict({})\n"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "vit.py").write_text(own)  # takes precedence
  assert config_lib.load(name).num_steps is None


def test_copied_config_imports_common(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  shutil.copy(command.ROOT / "configs" / "vit.py", tmp_path / "mine.py")
  assert config_lib.load("mine:demo,num_steps=7").num_steps == 7


@pytest.mark.slow
def test_wheel_trains_and_predicts(wheel, tmp_path):
  """As installed, in a folder without a checkout: console script, shipped and copied configs."""
  site = tmp_path / "site"
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
  subprocess.run([*pip, str(wheel)], check=True)
  away = tmp_path / "away"
  away.mkdir()

  def run(*arguments):
    done = subprocess.run(
      [sys.executable, str(site / "bin" / "vit-jax-zoo"), *arguments],
      cwd=away, env=command.environment(PYTHONPATH=str(site)), capture_output=True, text=True,
      timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr

  assert "transfer" in run()
  short = ("--config=vit:demo,num_steps=4,batch_size=16", *command.TINY[1:])
  assert "test/accuracy" in run("train", *short, "--config.data.loader.num_workers=2")
  shutil.copy(site / "vit_jax_zoo" / "shipped" / "configs" / "vit.py", away / "mine.py")
  run("train", "--config=mine:demo,num_steps=2,batch_size=16", *command.TINY[1:])
  Image.new("L", (8, 8)).save(away / "a.png")
  for name in ("vit", "mine"):
    run("predict", f"--model=runs/{name}_demo_num_steps_{4 if name == 'vit' else 2}_batch_size_16",
        "--images=a.png", f"--output={name}")  # fmt: skip
    assert len(json.loads((away / name / "predictions.json").read_text())) == 1
