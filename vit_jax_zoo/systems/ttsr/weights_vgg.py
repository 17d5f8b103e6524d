"""torchvision's VGG-19: `vgg19-dcbb9e9d.pth`, in and out.

    features.0.weight   conv1_1; ReLUs and pools are counted, too
    classifier...       never used here

A perceptual loss looks through it, and TTSR's texture extractor starts as its first layers. Files
of the variant with batch norm are another network, and are refused.

In: the task's `vgg_file`. Out: `export --format=pth-vgg19` of a run of TTSR's that
has a perceptual loss, or `write_vgg`. What is never used here, the layers behind relu5_1, does not
come back: torchvision's `vgg19().load_state_dict(file, strict=False)` takes the rest.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vit_jax_zoo.systems.ttsr.vgg import DEPTHS
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError
from vit_jax_zoo.weights.model_index import Entry
from vit_jax_zoo.weights.readers import Published, read_published
from vit_jax_zoo.weights.torch_file import write_torch
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, contiguous, layer_rows, write_safetensors

CONVOLUTIONS = [f"conv{i}_{j}" for i, depth in enumerate(DEPTHS, 1) for j in range(1, depth + 1)]
"""Names of `layers.vgg.VGG19`'s layers, in order."""

COLLECTION = "vgg"
"""Where `tasks.super_resolution` keeps it."""

URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"

PUBLISHED = {"vgg19_imagenet": Entry("ttsr", (URL,), sha256="dcbb9e9d", source="torchvision")}


def _indices() -> list[int]:
  """Places of the convolutions in torchvision's `features`: ReLUs and pools are counted, too."""
  places, place = [], 0
  for depth in DEPTHS:
    places += [place + 2 * i for i in range(depth)]
    place += 2 * depth + 1
  return places


TABLE: tuple[Row, ...] = tuple(
  row
  for index, name in zip(_indices(), CONVOLUTIONS, strict=True)
  for row in layer_rows(f"features.{index}", name, CONVOLUTION)
)
"""Between torchvision's keys and the paths of `layers.vgg.VGG19`."""

IGNORE = (r"classifier\..*", r"features\.\d+\..*")
"""The classifier, and convolutions after the last that is used."""


def to_published(params: Mapping[str, Any]) -> Flat:
  """Returns the convolutions under torchvision's names."""
  flat: Mapping[str, Any] = traverse_util.flatten_dict(params, sep="/")
  return table.write(flat, TABLE)


def read_vgg(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns the parameters of a `VGG19`, or of its first layers, by path.

  Args:
    path: of a file with torchvision's vgg19.
    shapes: of the network's parameters, by path.

  Raises:
    WeightsError: the file is not VGG-19, or is one with batch norm.
  """
  published = read_published(path).arrays
  if any(key.endswith("running_mean") for key in published):
    raise WeightsError(f"{path} is a VGG with batch norm; use torchvision's plain vgg19: {URL}")
  return table.read(published, TABLE, shapes, source=path, ignore=IGNORE)


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Tells whether a file's keys are VGG-19's: no other VGG has a convolution in place 16."""
  return {"features.0.weight", "features.16.weight", "features.28.weight"} <= published.keys()


def read_checkpoint(published: Published) -> Checkpoint:
  """Says what VGG-19 is for: alone it is no model of this package.

  Raises:
    WeightsError: always.
  """
  raise WeightsError(
    f"{published.path} is torchvision's VGG-19, which a TTSR begins from and its loss looks "
    "through; name it in --config.task.vgg_file"
  )


def write_checkpoint(path: str, export: Export) -> None:
  """Writes the VGG-19 through which a run's perceptual loss looks; see `write_vgg`.

  Raises:
    WeightsError: it has none.
  """
  prefix = f"{COLLECTION}/"
  flat = {k.removeprefix(prefix): v for k, v in export.variables.items() if k.startswith(prefix)}
  if not flat:
    raise WeightsError(
      "there is no VGG-19 beside this TTSR: published files hold none, nor do runs without a "
      "perceptual loss"
    )
  write_vgg(path, traverse_util.unflatten_dict(flat, sep="/"))


def write_vgg(path: str, params: Mapping[str, Any]) -> None:
  """Writes a state dict: `.safetensors`, else a file of PyTorch's, which must be installed."""
  arrays = contiguous(to_published(jax.tree.map(np.asarray, params)))
  write = write_safetensors if path.endswith(".safetensors") else write_torch
  write(path, arrays)
