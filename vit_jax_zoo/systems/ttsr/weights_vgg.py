"""torchvision's VGG-19: `vgg19-dcbb9e9d.pth`, in and out.

    features.0.weight   conv1_1; ReLUs and pools are counted, too
    classifier...       never used here

A perceptual loss looks through it, and TTSR's texture extractor starts as its first layers. Files
of the variant with batch norm are another network, and are refused.

In: the task's `vgg_file`, or `load_vgg`. Out: `export --format=pth-vgg19` of a run of TTSR's that
has a perceptual loss, or `write_vgg`. What is never used here, the layers behind relu5_1, does not
come back: torchvision's `vgg19().load_state_dict(file, strict=False)` takes the rest.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vit_jax_zoo.systems.ttsr.vgg import DEPTHS
from vit_jax_zoo.weights import hub
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError
from vit_jax_zoo.weights.readers import Published, read_published
from vit_jax_zoo.weights.torch_file import write_torch
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, contiguous, layer_rows, write_safetensors

CONVOLUTIONS = [f"conv{i}_{j}" for i, depth in enumerate(DEPTHS, 1) for j in range(1, depth + 1)]
"""Names of `layers.vgg.VGG19`'s layers, in order."""

COLLECTION = "vgg"
"""Where `tasks.super_resolution` keeps it."""

URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


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


def from_published(
  published: Mapping[str, np.ndarray], params: Mapping[str, Any], *, source: str = "the file"
) -> dict[str, Any]:
  """Returns the parameters of a `VGG19`, or of its first layers, from torchvision's vgg19.

  Args:
    published: the state dict, as numpy arrays.
    params: those of the network to fill; only their shapes matter.
    source: the file's name, for messages.

  Raises:
    WeightsError: the file does not fit; all that is wrong is listed.
  """
  if any(key.endswith("running_mean") for key in published):
    raise WeightsError(f"{source} is a VGG with batch norm; use torchvision's plain vgg19: {URL}")
  flat: Mapping[str, Any] = traverse_util.flatten_dict(params, sep="/")
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  found = table.read(published, TABLE, shapes, source=source, ignore=IGNORE)
  return traverse_util.unflatten_dict(found, sep="/")


def to_published(params: Mapping[str, Any]) -> Flat:
  """Returns the convolutions under torchvision's names."""
  flat: Mapping[str, Any] = traverse_util.flatten_dict(params, sep="/")
  return table.write(flat, TABLE)


def find_vgg(path: str) -> str:
  """Returns the local path of a file or URL; see `hub.resolve`.

  Raises:
    WeightsError: one line, about a file that is not there.
  """
  try:
    return hub.resolve(path)
  except WeightsError as error:
    raise _not_read(error) from error


def load_vgg(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
  """Reads a file, or a URL, into the parameters of a `VGG19`; see `from_published`.

  Raises:
    WeightsError: one line, about a file that is not there, or is another's.
  """
  found = find_vgg(path)
  try:
    published = read_published(found)
  except WeightsError as error:
    raise _not_read(error) from error
  return from_published(published.arrays, params, source=path)


def _not_read(error: WeightsError) -> WeightsError:
  return WeightsError(f"VGG-19: {error}; get it from {URL}")


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
