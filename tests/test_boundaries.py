"""One folder per system: nothing outside names it, and the package works without it."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import command

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vit_jax_zoo"

SYSTEM_NAMES = re.compile(
  r"(?<![a-z])(vit|igpt|lambda_?resnet|detr|ttsr|rcnn|fpt)(?![a-z])|"
  r"(vit|detr)image|image-?gpt|vision_?transformer",
  re.I,
)
SYSTEM_ATTRIBUTES = re.compile(
  r"patch_side|token_stride|num_positions|num_queries|generator_|critic|discriminator|palette|"
  r"clusters|num_colors|vgg|anchor_|roi_|rpn_|transferal|adversarial|residual_scale|lambda_|"
  r"pre_norm|fc_norm|proposals|mask_attention|prefix_fraction|cls_token|pre_logits|representation_size|neck_file|"
  r"mask_logits|box_masks|original_masks|masks_below|mask_paste|target_boxes"
)
EXCEPTIONS = re.compile(r"vit[_-]jax[_-]zoo|VIT_JAX_ZOO|configs/vit\.py|jax\._src\.clusters")


def core_modules():
  return [p for p in PACKAGE.rglob("*.py") if "systems" not in p.relative_to(PACKAGE).parts]


def code_words(path):
  """Yields identifiers, imports and strings of a module with their line, without docstrings."""
  tree = ast.parse(path.read_text())
  docstrings = {
    id(node.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      yield node.lineno, node.id
    elif isinstance(node, ast.Attribute):
      yield node.lineno, node.attr
    elif isinstance(node, ast.arg | ast.keyword):
      yield node.lineno, node.arg or ""
    elif isinstance(node, ast.alias):
      yield node.lineno, f"{node.name} {node.asname or ''}"
    elif isinstance(node, ast.ImportFrom):
      yield node.lineno, node.module or ""
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.lineno, node.name
    elif isinstance(node, ast.Constant) and id(node) not in docstrings:
      yield node.lineno, str(node.value)


@pytest.mark.parametrize("path", core_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_names_no_system(path):
  found = [
    f"{path.relative_to(ROOT)}:{line}: {word}"
    for line, word in code_words(path)
    if SYSTEM_NAMES.search(EXCEPTIONS.sub("", word))
    or SYSTEM_ATTRIBUTES.search(EXCEPTIONS.sub("", word))
  ]
  assert not found, "\n".join(found)


DELETIONS = {
  "vit": ["vit"],
  "igpt": ["igpt"],
  "lambda_resnet": ["lambda_resnet"],
  "detr": ["detr"],
  "ttsr": ["ttsr"],
  "fpt": ["fpt"],
  "rcnn": ["rcnn", "fpt"],  # FPT's detectors are R-CNNs
}
FAST_TESTS = "test_names.py or test_adam.py or (test_registry.py and not parameter_counts)"


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name == "ttsr" else pytest.mark.slow) for name in DELETIONS],
)
def test_package_works_without_system(name, tmp_path):
  copy = tmp_path / "copy"
  ignore = shutil.ignore_patterns("*.pyc.*", ".git", "goldens", "runs")  # half-written .pyc
  for folder in ("vit_jax_zoo", "configs", "tests"):
    shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
  (copy / "tests" / "goldens").symlink_to(ROOT / "tests" / "goldens")
  for entry in ("setup.cfg", "pyproject.toml", "README.md", "benchmarks", "docs", "colabs"):
    (copy / entry).symlink_to(ROOT / entry)
  for system in DELETIONS[name]:
    shutil.rmtree(copy / "vit_jax_zoo" / "systems" / system)
    shutil.rmtree(copy / "tests" / "systems" / system)
    (copy / "configs" / f"{system}.py").unlink(missing_ok=True)
  run = command.TINY if name != "vit" else ("--config=configs/lambda_resnet.py",)
  short = ("--config.num_steps=2", "--config.batch_size=8", "--config.eval_every=0")
  short += ("--config.data.eval.test.split=test[:8]",)
  python(copy, "-c", IMPORT_ALL_TRAIN_AND_TEST, *run, *short)
  if name == "rcnn":  # LambdaResNet's detectors are R-CNNs, too
    variant = "--config=configs/lambda_resnet.py:mask_rcnn_lambda_resnet_101_coco"
    plan = ("-m", "vit_jax_zoo.plan", variant, "--topology=v5litepod-8", "--nocompile")
    error = python(copy, *plan, expect=2)
    assert len(error.splitlines()) == 1
    assert "unknown model 'mask_rcnn_lambda_resnet_101'" in error


IMPORT_ALL_TRAIN_AND_TEST = f"""
import importlib, pkgutil, pytest, vit_jax_zoo
for module in pkgutil.walk_packages(vit_jax_zoo.__path__, "vit_jax_zoo."):
  if not module.name.endswith("__main__"):
    importlib.import_module(module.name)
assert len(vit_jax_zoo.list_models()) > 10
try:
  vit_jax_zoo.cli.run(vit_jax_zoo.main.main)
except SystemExit as ended:
  assert not ended.code, ended.code
options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
options += ["--assert=plain"]  # 300 files are collected, and few of their assertions run
assert pytest.main([*options, "-k", {FAST_TESTS!r}]) == 0  # every file must be collected
"""


def python(folder, *arguments, expect=0):
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    env=command.environment(PYTHONPATH=str(folder)),
    timeout=900,
  )
  assert done.returncode == expect, (
    f"{' '.join(arguments[:3])}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
  )
  return done.stderr
