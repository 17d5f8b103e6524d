"""All configs: resolved values, and the existence of everything that they name."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import sys

import jax.numpy as jnp
import pytest

from tests.configs.recipes import CASES, SYSTEMS, differences, fields, resolve
from tests.conftest import golden_folder
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.training.optim import create_optimizer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
KERNELS = ("head/kernel", "head/bias")


def splits(config):
  return [config.data.train, *config.data.eval.values()]


@pytest.mark.parametrize("system", SYSTEMS)
def test_resolved_configs_golden(system, golden_text):
  configs = {variant: resolve(system, variant).to_dict() for s, variant in CASES if s == system}
  golden_text(golden_folder("configs") / f"{system}.txt", differences(configs))


def test_golden_text_shows_every_field_change():
  config = resolve(SYSTEMS[0], "demo").to_dict()
  before = differences({"demo": config})
  for path in fields(config):
    *sections, name = path
    section = functools.reduce(dict.__getitem__, sections, config)
    value = section[name]
    for other in ("other", {"new": value}):
      section[name] = other
      assert differences({"demo": config}) != before, path
    del section[name]
    assert differences({"demo": config}) != before, path
    section[name] = value
  assert differences({"demo": config}) == before


@pytest.mark.parametrize("system", [s for s in SYSTEMS if (s, "demo") in CASES])
def test_default_is_demo_on_embedded_data(system):
  config = resolve(system)
  assert config == resolve(system, "demo")
  assert config.data.train.source.startswith("demo:")


@pytest.mark.parametrize(("system", "variant"), CASES)
def test_named_parts_exist(system, variant):
  config = resolve(system, variant)
  num_classes = len(config.task.get("class_weights", ())) or 10
  known = {"num_classes": num_classes, "class_names": ()}
  fields = {
    section: {k: known.get(k) if v is None else v for k, v in config[section].to_dict().items()}
    for section in ("model", "task")
  }
  create_task(model=create_model(**fields["model"]), **fields["task"])
  for split in splits(config):
    assert build_transforms(split.transforms)
  params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
  for section in optimizers(config.optimizer.to_dict()):
    known = [r for r in section.get("rules") or () if any(re.fullmatch(r[0], k) for k in KERNELS)]
    # Rules of several optimizers match other parameters.
    rules = [] if "generator" in config.optimizer else known
    optimizer = create_optimizer({**section, "rules": rules}, params, num_steps=100_000)
    assert float(optimizer.schedule(20_000)) >= 0
  assert (config.num_steps is None) != (config.num_epochs is None)


def optimizers(section):
  """Returns one optimizer section, or one per network."""
  return [section] if "name" in section else list(section.values())


TFDS_CASES = [
  case for case in CASES if resolve(*case).data.train.source.startswith("tfds:")
]  # fmt: skip


@pytest.mark.parametrize(("system", "variant"), TFDS_CASES)
def test_data_dir_of_all_splits(system, variant):
  specs = splits(resolve(system, f"{variant},data_dir=gs://bucket/data"))
  assert len(specs) > 1
  assert {spec.data_dir for spec in specs} == {"gs://bucket/data"}
  config = resolve(system, variant)
  assert all(spec.data_dir is None for spec in splits(config))
  config.lock().data.train.data_dir = "elsewhere"
  for spec in config.data.eval.values():
    spec.data_dir = "elsewhere"  # as a flag may set it
    with pytest.raises(TypeError):
      spec.data_dir = 3


@pytest.mark.parametrize(
  ("system", "variant"),
  [("vit", "s16_imagenet"), ("vit", "b16_finetune"), ("lambda_resnet", "r50_cccl")],
)
def test_data_dir_only_for_tfds(system, variant):
  config = resolve(system, f"{variant},source=folder:/images")
  for spec in splits(config):
    assert spec.source == "folder:/images"
    assert "data_dir" not in spec
  with pytest.raises(ValueError, match="data_dir='/data'"):
    resolve(system, f"{variant},source=folder:/images,data_dir=/data")


@pytest.mark.parametrize("system", SYSTEMS)
def test_error_about_renamed_variant_names_an_existing_one(system):
  module = importlib.import_module(f"configs.{system}")
  for old, new in getattr(module, "RENAMED", {}).items():
    with pytest.raises(ValueError, match=re.escape(f"{old!r} is now {new!r}")):
      module.get_config(old)
    file, _, variant = new.rpartition(":")
    assert (
      variant in importlib.import_module(f"configs.{pathlib.Path(file).stem or system}").VARIANTS
    )


@pytest.mark.parametrize(("system", "variant"), CASES)
def test_docstring_entries(system, variant):
  page = importlib.import_module(f"configs.{system}").VARIANTS[variant]
  for entry in ("Paper:", "Hardware:", "Expected"):
    assert entry in page.__doc__
  assert ("Not yet run here." in page.__doc__) == (not variant.startswith("demo"))


@pytest.mark.parametrize(("system", "variant"), CASES)
def test_recipe_section_ignores_batch_size_and_learning_rate(system, variant):
  settable = inspect.signature(
    importlib.import_module(f"configs.{system}").VARIANTS[variant]
  ).parameters
  changed = {"batch_size": 7, "learning_rate": 7.0}
  fields = ",".join(f"{name}={value}" for name, value in changed.items() if name in settable)
  assert resolve(system, f"{variant},{fields}").recipe == resolve(system, variant).recipe


@pytest.mark.parametrize(
  "name", sorted(p.stem for p in CONFIGS.glob("[!_]*.py") if p.stem != "common")
)
def test_config_imports(name):
  tree = ast.parse((CONFIGS / f"{name}.py").read_text())
  modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
  modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
  packages = {module.partition(".")[0] for module in modules}
  assert packages <= sys.stdlib_module_names | {"configs", "ml_collections"}
