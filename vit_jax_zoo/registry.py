"""Registries by name, and the `System` that each folder of `systems` registers."""

import collections
import dataclasses
import fnmatch
import functools
import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from vit_jax_zoo.errors import check_fields, check_names, unknown_name


class Registry(collections.UserDict[str, Any]):
  """Objects by name, each given as "module:attribute" and imported at its first use."""

  def __init__(self, kind: str, references: Mapping[str, str]) -> None:
    super().__init__(references)
    self._kind = kind

  def __getitem__(self, key: str) -> Any:
    """Returns the object of this name; ValueError, with the closest name, if there is none."""
    return getattr(self.module(key), self.data[key].partition(":")[2])

  def module(self, name: str) -> ModuleType:
    """Returns the module that holds the object of this name."""
    if name not in self.data:
      raise ValueError(unknown_name(self._kind, name, self.data))
    return import_module(self.data[name].partition(":")[0])


@dataclasses.dataclass(frozen=True)
class Format:
  """A published checkpoint format; `weights.load` documents its functions."""

  name: str  # of `export --format=`
  family: str  # of its models, a key of `System.models`
  module: str  # or "module:class"
  description: str  # for error messages: "timm's ViT"


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of predictors, and the flag of `predict`."""

  name: str
  type: type  # int, float, bool, or pathlib.Path: an image, given to the predictor decoded
  default: Any
  help: str
  old_name: str = ""  # of the flag


@dataclasses.dataclass(frozen=True)
class System:
  """Registration of one paper's folder. References are "module:attribute" in the folder.

  Names of models begin with their family's. The module of a model's class has `VARIANTS` (model
  name -> fields) and `SHARDING_RULES`. A neck maps a feature pyramid to another one, and may have
  `explain(run, batch, size_multiple)` and `draw_explanation(explanation, level_names)`.
  """

  models: Mapping[str, str] = dataclasses.field(default_factory=dict)  # family -> class
  # Model family, of any system -> a further table of variants.
  variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tasks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> class
  predictors: Mapping[str, str] = dataclasses.field(default_factory=dict)  # task name -> class
  options: tuple[Option, ...] = ()  # of its predictors, besides those of `CORE`
  formats: tuple[Format, ...] = ()
  published: str = ""  # checkpoint name -> `weights.hub.Entry`
  paper_scores: str = ""  # model name -> (reported score, source)
  # Path of a part ("*/backbone") -> function, see `weights.finetune_init`.
  part_readers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  backbone_readers: tuple[str, ...] = ()  # see `weights.backbones`
  # Of detectors: name -> class, which returns a dict of feature maps.
  backbones: Mapping[str, str] = dataclasses.field(default_factory=dict)
  necks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of detectors: name -> class
  other_names: tuple[tuple[str, str], ...] = ()  # see `model_name`: pattern, replacement
  several_inputs: tuple[str, ...] = ()  # families of models with inputs besides images
  parts: tuple[str, ...] = ()  # families that are parts of other models, without a task
  heads: tuple[str, ...] = ()  # sub-trees that depend on the task; see `weights.finetune_init`
  below_heads: tuple[str, ...] = ()  # sub-trees without which heads are newly initialised
  scanned_layers: tuple[str, ...] = ()  # patterns of their names; see `weights.key_map`
  extra_tokens: tuple[str, ...] = ()  # parameters with position rows before the grid's
  # Patterns of the paths of renamed config fields, and their new names; see `config.RENAMED`.
  renamed_fields: tuple[tuple[str, str], ...] = ()
  # Patterns of the paths of removed fields, and the values that they must have in saved runs.
  removed_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CORE = System(
  tasks={"classification": "tasks.classification:Classification"},
  predictors={"classification": "inference.classification:ClassificationPredictor"},
  options=(
    Option("top_k", int, None, "number of classes to list (5), or of values to sample from (all)"),
    Option("threshold", float, 0.5, "minimum score"),
    Option("explain", bool, False, "also draw attention maps"),
    Option("seed", int, 0, "random seed"),
  ),
  heads=("head/",),
  part_readers={"*/backbone": "weights.backbones:read_backbone"},
  backbones={"resnet": "nn.resnet:ResNet"},
)
"""What two or more systems share; references are in the package."""


@functools.cache
def systems() -> Mapping[str, System]:
  """Returns the systems by name: every folder of `vit_jax_zoo/systems`."""
  folder = import_module("vit_jax_zoo.systems")
  names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if module.ispkg)
  return {name: import_module(f"{folder.__name__}.{name}").SYSTEM for name in names}


def load_reference(system: str, reference: str) -> Any:
  """Returns the object of "module:attribute", or the module of "module", in a system's folder."""
  module, _, attribute = reference.partition(":")
  loaded = import_module(f"vit_jax_zoo.systems.{system}.{module}")
  return getattr(loaded, attribute) if attribute else loaded


def registry_of(kind: str, field: str) -> Registry:
  """Returns the registry of a field of `CORE` and all systems; `kind` is a noun for errors."""
  entries = {key: f"vit_jax_zoo.{ref}" for key, ref in getattr(CORE, field).items()}
  for name, system in systems().items():
    references: Mapping[str, str] = getattr(system, field)
    entries |= {key: f"vit_jax_zoo.systems.{name}.{ref}" for key, ref in references.items()}
  return Registry(kind, entries)


def load_from_each(field: str) -> list[Any]:
  """Returns the objects of a field of references, one or several, of all systems."""
  fields = {name: getattr(system, field) for name, system in systems().items()}
  several = {name: [value] if isinstance(value, str) else value for name, value in fields.items()}
  return [load_reference(name, ref) for name, refs in several.items() for ref in refs if ref]


def model_classes() -> Registry:
  """Returns the model classes by family."""
  return registry_of("model family", "models")


def create_model(name: str, **overrides: Any) -> Any:
  """Returns the Linen module of this name, of `list_models()` or another library's.

  `overrides` are fields of the model's class; ValueError for an unknown name or field.
  """
  name = model_name(name)
  family = _family(name)
  kind = model_classes()[family]
  check_fields(name, kind, overrides, "name")
  if isinstance(overrides.get("dtype"), str | float | tuple):
    dtypes = ("float32", "bfloat16", "float16", "float64")
    check_names(f"dtype of {name}", [str(overrides["dtype"])], dtypes)
  return kind(**{**variants(family)[name], **overrides})


# Substitutions in other libraries' model names until it is a name here, before `other_names`.
_OTHER_NAMES = (
  (r"^[\w-]+/(?=[a-z])|\.\w+$|-in21k$", ""),  # owner, timm's tag
  (r"(?<=\d)[-_](224|256|384|512)$", ""),  # image size
  (r"[-/]", "_"),
  (r"resnet_?(?=\d)", "r"),
)


def model_name(name: str) -> str:
  """Returns a model's name in this package, given another library's: "vit_base_patch16_224".

  >>> model_name("google/vit-base-patch16-224-in21k"), model_name("facebook/detr-resnet-50-dc5")
  ('vit_b16', 'detr_r50_dc5')
  """
  result, models = name.strip().lower(), list_models()
  of_systems = (pair for system in systems().values() for pair in system.other_names)
  for pattern, replacement in (*_OTHER_NAMES, *of_systems):
    if result in models:
      break
    result = re.sub(pattern, replacement, result)
  return result if result in models else name


def family_of(model: Any) -> str:
  """Returns the family of a model; ValueError if its class belongs to none."""
  for family, kind in model_classes().items():
    if kind is type(model):
      return family
  raise ValueError(f"{type(model).__name__}: not a model class of this package")


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
  """Returns the model names that match a shell pattern such as "vit_*", sorted.

  With `pretrained`, the names of published weights, which `load_pretrained` and `predictor` take.
  """
  if pretrained:
    every = (n for table in load_from_each("published") for n, e in table.items() if e.model)
  else:
    every = (name for family in model_classes() for name in variants(family))
  return sorted(fnmatch.filter(every, pattern))


def variants(family: str) -> Mapping[str, Mapping[str, Any]]:
  """Returns the fields of each variant of a family, by model name."""
  table = dict(model_classes().module(family).VARIANTS)
  for name, system in systems().items():
    if family in system.variants:
      table |= load_reference(name, system.variants[family])
  return {name: fields for name, fields in table.items() if name.startswith(family)}


def sharding_rules(name: str) -> tuple[tuple[str, Any], ...]:
  """Returns the parameter sharding rules of a model's family."""
  return model_classes().module(_family(model_name(name))).SHARDING_RULES


def _family(name: str) -> str:
  for family in model_classes():
    if name.startswith(family) and name in variants(family):
      return family
  raise ValueError(unknown_name("model", name, list_models()))
