"""torchvision's VGG-19, `vgg19-dcbb9e9d.pth`.

`export --format=pth-vgg19` writes the VGG-19 of a run with a perceptual loss, without layers after
relu5_1: load such a file into torchvision's `vgg19()` with `strict=False`.
"""

from collections.abc import Mapping

import numpy as np

from vit_jax_zoo.systems.ttsr.losses import VGG_DEPTHS
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.hub import Entry
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, read, write
from vit_jax_zoo.weights.readers import Published, read_published, write_state_dict
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, layer_rows

VGG_LAYERS = [f"conv{i}_{j}" for i, n in enumerate(VGG_DEPTHS, 1) for j in range(1, n + 1)]
URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"

PUBLISHED = {"vgg19_imagenet": Entry("", (URL,), sha256="dcbb9e9d", source="torchvision")}

# Index in torchvision's `features`: ReLUs and the pools after each stage count, too.
TABLE: tuple[Row, ...] = tuple(
  row
  for i, name in enumerate(VGG_LAYERS)
  for row in layer_rows(f"features.{2 * i + int(name[4]) - 1}", name, CONVOLUTION)
)
"""torchvision's keys and paths of `VGG19`."""

IGNORE = (r"classifier\..*", r"features\.\d+\..*")  # also layers after the last one used


def read_vgg(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns the parameters of a `VGG19`, or of its first layers, by path, for these shapes."""
  published = read_published(path).arrays
  if any(key.endswith("running_mean") for key in published):
    raise WeightsError(f"{path}: VGG with batch norm; expected torchvision's plain vgg19, {URL}")
  return read(published, TABLE, shapes, source=path, ignore=IGNORE)


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are VGG-19's: no other VGG has a convolution at index 16."""
  return {"features.0.weight", "features.16.weight", "features.28.weight"} <= published.keys()


def read_checkpoint(published: Published) -> Checkpoint:
  """Raises WeightsError: a VGG-19 is not a model here, but a part of TTSR's losses."""
  wrong = f"{published.path}: torchvision's VGG-19 is no model here, but a part of TTSR's losses"
  raise WeightsError(f"{wrong}; use --config.task.vgg_file")


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes the VGG-19 of a run's perceptual loss: `.safetensors`, else PyTorch (needs torch)."""
  parts = {k.removeprefix("vgg/"): v for k, v in export.variables.items() if k.startswith("vgg/")}
  if not parts:
    wrong = "pth-vgg19: this TTSR has no VGG-19"
    raise WeightsError(f"{wrong}; expected a run with a perceptual loss. Published files have none")
  write_state_dict(path, write(parts, TABLE))
