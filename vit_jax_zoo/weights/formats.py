"""Whose file is it? One line a format; a new one is a module beside this one, and a line here.

A format's module has three functions:

* `is_of(arrays) -> bool`: whether a file with these keys is one of its own;
* `read_checkpoint(published) -> Checkpoint`: from what `published.read_published` found;
* `write_checkpoint(path, export)`: the inverse, a file or a folder at `path`; `WeightsError` where
  the format has no such model. A format that is only read leaves it out.
"""

import dataclasses
from importlib import import_module
from types import ModuleType
from typing import Any

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export
from vit_jax_zoo.weights.key_map import WeightsError
from vit_jax_zoo.weights.readers import read_published


@dataclasses.dataclass(frozen=True)
class Format:
  """How a family's weights are published.

  Attributes:
    family: a key of `models.registry.FAMILIES`.
    name: behind `export --format=`.
    module: below `vit_jax_zoo.weights`; imported when it is needed.
    described: for people, in messages.
  """

  family: str
  name: str
  module: str
  described: str

  def load(self) -> ModuleType:
    """Returns the module."""
    return import_module(f"vit_jax_zoo.weights.{self.module}")


FORMATS = (
  Format("vit", "npz", "vit_npz", "Google's .npz of ViT"),
  Format("vit", "hf", "vit_hf", "Hugging Face's ViT"),
  Format("vit", "safetensors-timm", "vit_timm", "timm's ViT"),
  Format("lambda_resnet", "safetensors-timm", "lambda_resnet_timm", "timm's LambdaResNet"),
  Format("igpt", "hf", "igpt_hf", "Hugging Face's ImageGPT"),
  Format("igpt", "tf", "igpt_tf", "OpenAI's image-gpt"),
  Format("detr", "pth", "detr_official", "the official code's DETR"),
  Format("detr", "hf", "detr_hf", "Hugging Face's DETR"),
  Format("ttsr", "pt", "ttsr_pt", "the official code's TTSR"),
  Format("ttsr", "pth-vgg19", "vgg_torchvision", "torchvision's VGG-19"),
  Format("faster_rcnn", "pth-torchvision", "rcnn_torchvision", "torchvision's R-CNN"),
  Format("faster_rcnn", "pth", "rcnn_fpt", "the official code's detectors with FPT"),
  Format("fpt_pyramid", "pth", "fpt_pt", "the official code's FPT"),
  Format("faster_rcnn", "pth-fpt", "fpt_pt", "the official code's FPT"),
)
"""In the order in which they are asked whether a file is theirs."""


def read_checkpoint(path: str) -> Checkpoint:
  """Reads a published file or folder, whatever its format.

  Raises:
    WeightsError: one line: it cannot be read, or belongs to no known format.
    ImportError: reading it takes a package that is not installed.
  """
  published = read_published(path)
  for form in FORMATS:
    module = form.load()
    if module.is_of(published.arrays):
      return _guarded(module.read_checkpoint, published, form)
  keys = ", ".join(sorted(published.arrays)[:3]) or "none"
  known = ", ".join(dict.fromkeys(form.described for form in FORMATS))
  raise WeightsError(f"{path} holds no weights of {known}; its keys begin with {keys}")


def _guarded(read: Any, published: Any, form: Format) -> Checkpoint:
  """Sizes are read off single arrays; one that is missing or misshapen must not end in a trace."""
  try:
    return read(published)
  except WeightsError:
    raise
  except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
    what = f"no {error}" if isinstance(error, KeyError) else f"a wrong shape somewhere ({error})"
    raise WeightsError(
      f"{published.path} looks like {form.described}, but its sizes cannot be told: there is {what}"
    ) from None


def find_format(family: str, name: str) -> Format:
  """Returns how a family's weights are written in a format.

  Raises:
    ValueError: the family is not published like that; the message lists how it is.
  """
  known = {form.name: form for form in FORMATS if form.family == family}
  if name not in known:
    raise ValueError(unknown_name(f"format of {family}", name, known))
  return known[name]


def write_checkpoint(path: str, name: str, export: Export) -> None:
  """Writes a model in a published format.

  Raises:
    WeightsError: the format has no such model.
    ValueError: the family is not published in it.
  """
  module = find_format(export.family, name).load()
  if not hasattr(module, "write_checkpoint"):
    raise ValueError(f"{name} of {export.family} can be read here, but not written")
  module.write_checkpoint(path, export)
