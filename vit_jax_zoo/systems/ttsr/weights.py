"""TTSR's checkpoints, `TTSR.pt` and `TTSR-rec.pt` (researchmm/TTSR), and torchvision's VGG-19."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.systems.ttsr.losses import VGG_DEPTHS
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.hub import Entry
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, read, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published, read_published, write_state_dict
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, layer_rows

TRAINED_SIZE = (160, 160)  # of the training images of the released weights

VGG_LAYERS = [f"conv{i}_{j}" for i, n in enumerate(VGG_DEPTHS, 1) for j in range(1, n + 1)]
VGG_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"

# TTSR's own files have no stable URL.
PUBLISHED = {"vgg19_imagenet": Entry("", (VGG_URL,), sha256="dcbb9e9d", source="torchvision")}
PAPER_SCORES = {"ttsr": ("27.09 dB with l1 alone (CUFED5, five references)", "2006.04139")}

_EXTRACTOR = ("slice1.0", "slice2.2", "slice2.5", "slice3.7", "slice3.10")
_STAGES = {
  "shallow": ("SFE.RBs", "SFE.conv_tail"),
  "stage1": ("RB11", "conv11_tail"),
  **{f"stage{i}_{j}": (f"RB{i}{j}", f"conv{i}{j}_tail") for i in (2, 3) for j in range(1, i + 1)},
}
_SINGLE = {
  "SFE.conv_head": "head",
  "conv12": "up2",
  "conv23": "up3",
  **{f"conv{i}{i}_head": f"attend{i}" for i in (1, 2, 3)},
  **{f"ex12.conv{i}{j}": f"exchange2/from{i}_to{j}" for i, j in ("12", "21")},
  **{f"ex12.conv_merge{i}": f"exchange2/merge{i}" for i in (1, 2)},
  **{f"ex123.conv{i}{j}": f"exchange3/from{i}_to{j}" for i, j in ("12", "13", "21", "23", "32")},
  "ex123.conv31_1": "exchange3/from3_to1a",
  "ex123.conv31_2": "exchange3/from3_to1b",
  **{f"ex123.conv_merge{i}": f"exchange3/merge{i}" for i in (1, 2, 3)},
  "merge_tail.conv13": "merge_tail/from1",
  "merge_tail.conv23": "merge_tail/from2",
  "merge_tail.conv_merge": "merge_tail/merge",
  "merge_tail.conv_tail1": "merge_tail/narrow",
  "merge_tail.conv_tail2": "merge_tail/image",
}

_LAYERS = {
  **{f"MainNet.{key}": ours for key, ours in _SINGLE.items()},
  **{f"MainNet.{tail}": f"{ours}/tail" for ours, (_, tail) in _STAGES.items()},
  **{
    f"MainNet.{blocks}.{{i}}.conv{j}": f"{ours}/block_{{i}}/conv{j}"
    for ours, (blocks, _) in _STAGES.items()
    for j in (1, 2)
  },
  **{f"LTE.{key}": f"extractor/{name}" for key, name in zip(_EXTRACTOR, VGG_LAYERS, strict=False)},
}
TABLE = tuple(row for layer in _LAYERS.items() for row in layer_rows(*layer, CONVOLUTION))
"""Keys of TTSR.pt and paths of `TTSR`, layers unrolled."""


# (x - mean) / std as a 1x1 convolution.
_STD = np.asarray(IMAGENET_STD, np.float32)
_NORMALISATION = {
  "LTE.sub_mean.weight": (np.eye(3, dtype=np.float32) / _STD[:, None]).reshape(3, 3, 1, 1),
  "LTE.sub_mean.bias": -np.asarray(IMAGENET_MEAN, np.float32) / _STD,
}
IGNORE = (r"LTE\.sub_mean\.(weight|bias)", r"LTE_copy\..*")
"""Constants, and the training code's copy of the extractor."""


def _infer_fields(published: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  try:
    width = published["MainNet.SFE.conv_head.weight"].shape[0]
    textures = [published[f"LTE.{key}.weight"].shape[0] for key in _EXTRACTOR[::2]]
  except KeyError as error:
    raise WeightsError(f"{source}: no {error}; expected a checkpoint of TTSR") from error
  depths = [
    sum(key.startswith(f"MainNet.{blocks}.") and key.endswith(".conv1.bias") for key in published)
    for blocks in ("SFE.RBs", "RB11", "RB21", "RB31")
  ]
  return {"width": width, "depths": tuple(depths), "texture_widths": tuple(textures)}


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are TTSR's."""
  return "MainNet.SFE.conv_head.weight" in published


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads TTSR.pt or TTSR-rec.pt, or their arrays as safetensors; there is no discriminator."""
  small, large = (np.zeros((1, side, side, 3), np.float32) for side in (1, 4))
  return Checkpoint(
    source=published.path,
    family="ttsr",
    arrays=dict(published.arrays),
    table=TABLE,
    fields=_infer_fields(published.arrays, published.path),
    preprocess=Preprocess(TRAINED_SIZE),
    task="super_resolution",
    ignore=IGNORE,
    heads=(),
    inputs=(small, large, large, large),
    image_size=TRAINED_SIZE,
    trained_network="generator",
  )


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes the generator, of a run too, to a safetensors or (with torch) a PyTorch file."""
  prefix, given = "generator/", export.variables
  of_run = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
  write_state_dict(path, {**write(of_run or given, TABLE), **_NORMALISATION})


# Index in torchvision's `features`: ReLUs and the pools after each stage count, too.
VGG_TABLE: tuple[Row, ...] = tuple(
  row
  for i, name in enumerate(VGG_LAYERS)
  for row in layer_rows(f"features.{2 * i + int(name[4]) - 1}", name, CONVOLUTION)
)
"""torchvision's keys and paths of `VGG19`."""

VGG_IGNORE = (r"classifier\..*", r"features\.\d+\..*")  # also layers after the last one used


def read_vgg(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns the parameters of a `VGG19`, or of its first layers, by path, for these shapes."""
  published = read_published(path).arrays
  if any(key.endswith("running_mean") for key in published):
    raise WeightsError(
      f"{path}: VGG with batch norm; expected torchvision's plain vgg19, {VGG_URL}"
    )
  return read(published, VGG_TABLE, shapes, source=path, ignore=VGG_IGNORE)


class VggFormat:
  """`vgg19-dcbb9e9d.pth`, and the VGG-19 of a run with a perceptual loss.

  `export --format=pth-vgg19` writes the latter without layers after relu5_1: load such a file into
  torchvision's `vgg19()` with `strict=False`.
  """

  @staticmethod
  def is_of(published: Mapping[str, np.ndarray]) -> bool:
    """Returns whether the keys are VGG-19's: no other VGG has a convolution at index 16."""
    return {"features.0.weight", "features.16.weight", "features.28.weight"} <= published.keys()

  @staticmethod
  def read_checkpoint(published: Published) -> Checkpoint:
    """Raises WeightsError: a VGG-19 is not a model here, but a part of TTSR's losses."""
    wrong = f"{published.path}: torchvision's VGG-19 is no model here, but a part of TTSR's losses"
    raise WeightsError(f"{wrong}; use --config.task.vgg_file")

  @staticmethod
  def write_checkpoint(path: str, export: Pretrained) -> None:
    """Writes `.safetensors`, else a PyTorch file (needs torch)."""
    parts = {k.removeprefix("vgg/"): v for k, v in export.variables.items() if k.startswith("vgg/")}
    if not parts:
      expected = "expected a run with a perceptual loss. Published files have none"
      raise WeightsError(f"pth-vgg19: this TTSR has no VGG-19; {expected}")
    write_state_dict(path, write(parts, VGG_TABLE))
