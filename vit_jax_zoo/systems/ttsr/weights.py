"""TTSR's checkpoints, `TTSR.pt` and `TTSR-rec.pt` (researchmm/TTSR), without discriminator."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.systems.ttsr.weights_vgg import VGG_LAYERS
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import WeightsError, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published, write_state_dict
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, layer_rows

TRAINED_SIZE = (160, 160)  # of the training images of the released weights

# The released files have no stable URL.
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
  """Reads TTSR.pt or TTSR-rec.pt, or their arrays as safetensors."""
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
