"""TTSR's checkpoints, `TTSR.pt` and `TTSR-rec.pt` (researchmm/TTSR), and torchvision's VGG-19.

The released files are bare state dicts: the main network and the texture extractor, and beside them
the extractor's fixed normalisation, which is no parameter here. The critic was not released.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_jax_zoo.layers.vgg import DEPTHS
from vit_jax_zoo.models.ttsr import TTSR
from vit_jax_zoo.weights import table
from vit_jax_zoo.weights.table import Flat, Row, WeightsError
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, layer_rows

_EXTRACTOR = ("slice1.0", "slice2.2", "slice2.5", "slice3.7", "slice3.10")
_STAGES = {
  "shallow": ("SFE.RBs", "SFE.conv_tail"),
  "stage1": ("RB11", "conv11_tail"),
  **{
    f"stage{stage}_{i}": (f"RB{stage}{i}", f"conv{stage}{i}_tail")
    for stage in (2, 3)
    for i in range(1, stage + 1)
  },
}
_SINGLE = {
  "SFE.conv_head": "head",
  "conv12": "up2",
  "conv23": "up3",
  **{f"conv{i}{i}_head": f"attend{i}" for i in (1, 2, 3)},
  **{f"ex12.conv{i}{j}": f"exchange2/from{i}_to{j}" for i, j in ((1, 2), (2, 1))},
  **{f"ex12.conv_merge{i}": f"exchange2/merge{i}" for i in (1, 2)},
  **{
    f"ex123.conv{i}{j}": f"exchange3/from{i}_to{j}"
    for i, j in ((1, 2), (1, 3), (2, 1), (2, 3), (3, 2))
  },
  "ex123.conv31_1": "exchange3/from3_to1a",
  "ex123.conv31_2": "exchange3/from3_to1b",
  **{f"ex123.conv_merge{i}": f"exchange3/merge{i}" for i in (1, 2, 3)},
  "merge_tail.conv13": "merge_tail/from1",
  "merge_tail.conv23": "merge_tail/from2",
  "merge_tail.conv_merge": "merge_tail/merge",
  "merge_tail.conv_tail1": "merge_tail/narrow",
  "merge_tail.conv_tail2": "merge_tail/image",
}
_VGG_CONVS = [f"conv{i}_{j}" for i, depth in enumerate(DEPTHS, 1) for j in range(1, depth + 1)]


def _conv(published: str, ours: str) -> list[Row]:
  return layer_rows(published, ours, CONVOLUTION)


def _stage(ours: str, blocks: str, tail: str) -> list[Row]:
  rows = _conv(f"MainNet.{tail}", f"{ours}/tail")
  for name in ("conv1", "conv2"):
    rows += _conv(f"MainNet.{blocks}.{{i}}.{name}", f"{ours}/block_{{i}}/{name}")
  return rows


TABLE: tuple[Row, ...] = (
  *(row for ours, (blocks, tail) in _STAGES.items() for row in _stage(ours, blocks, tail)),
  *(row for key, ours in _SINGLE.items() for row in _conv(f"MainNet.{key}", ours)),
  *(
    row
    for key, name in zip(_EXTRACTOR, _VGG_CONVS, strict=False)
    for row in _conv(f"LTE.{key}", f"extractor/{name}")
  ),
)
"""Between the keys of TTSR.pt and the paths of `models.ttsr.TTSR`, layers unrolled."""


def _vgg_indices() -> list[int]:
  """Places of the convolutions in torchvision's `features`: ReLUs and pools are counted, too."""
  places, place = [], 0
  for depth in DEPTHS:
    places += [place + 2 * i for i in range(depth)]
    place += 2 * depth + 1
  return places


VGG_TABLE: tuple[Row, ...] = tuple(
  row
  for index, name in zip(_vgg_indices(), _VGG_CONVS, strict=True)
  for row in _conv(f"features.{index}", name)
)
"""Between the keys of torchvision's vgg19 and the paths of `layers.vgg.VGG19`."""

# Each channel is divided by its deviation after its mean is subtracted, written as a convolution.
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_NORMALISATION = {
  "LTE.sub_mean.weight": (np.eye(3, dtype=np.float32) / _STD[:, None]).reshape(3, 3, 1, 1),
  "LTE.sub_mean.bias": -_MEAN / _STD,
}
IGNORE = (r"LTE\.sub_mean\.(weight|bias)", r"LTE_copy\..*")
"""Constants, and a copy of the extractor that the training code keeps."""
VGG_IGNORE = (r"classifier\..*", r"features\.\d+\..*")
"""The classifier, and convolutions after the last that is used."""


def infer_fields(published: Mapping[str, np.ndarray], source: str = "the file") -> dict[str, Any]:
  """Returns the fields of the `TTSR` that a file fits.

  Raises:
    WeightsError: the file holds no TTSR.
  """
  try:
    width = published["MainNet.SFE.conv_head.weight"].shape[0]
    textures = [published[f"LTE.{key}.weight"].shape[0] for key in _EXTRACTOR[::2]]
  except KeyError as error:
    raise WeightsError(f"{source} is no checkpoint of TTSR: it has no {error}") from error
  depths = [
    sum(key.startswith(f"MainNet.{blocks}.") and key.endswith(".conv1.bias") for key in published)
    for blocks in ("SFE.RBs", "RB11", "RB21", "RB31")
  ]
  return {"width": width, "depths": tuple(depths), "texture_widths": tuple(textures)}


def from_published(
  published: Mapping[str, np.ndarray], *, source: str = "the file", **overrides: Any
) -> tuple[TTSR, dict[str, Any]]:
  """Returns the model and its variables.

  Args:
    published: the state dict, as numpy arrays.
    source: the file's name, for messages.
    **overrides: fields of `TTSR`, such as `dtype`.

  Raises:
    WeightsError: the file does not fit; all that is wrong is listed.
  """
  model = TTSR(**{**infer_fields(published, source), **overrides})
  small, large = jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 4, 4, 3))
  abstract = jax.eval_shape(model.init, jax.random.key(0), small, large, large, large)
  params = _read(published, TABLE, abstract["params"], source, IGNORE)
  return model, {"params": params}


def to_published(params: Mapping[str, Any]) -> Flat:
  """Returns the state dict that the official code loads."""
  flat = {path: np.asarray(array) for path, array in _flatten(params).items()}
  return {**table.write(table.unroll(flat), TABLE), **_NORMALISATION}


def vgg_from_torchvision(
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
  return _read(published, VGG_TABLE, params, source, VGG_IGNORE)


def vgg_to_torchvision(params: Mapping[str, Any]) -> Flat:
  """Returns the convolutions under torchvision's names."""
  return table.write(_flatten(params), VGG_TABLE)


def _read(
  published: Mapping[str, np.ndarray],
  rows: Sequence[Row],
  params: Mapping[str, Any],
  source: str,
  ignore: Sequence[str],
) -> dict[str, Any]:
  shapes = {path: leaf.shape for path, leaf in _flatten(params).items()}
  layers = table.read(published, rows, table.unroll_shapes(shapes), source=source, ignore=ignore)
  return traverse_util.unflatten_dict(table.stack(layers, shapes), sep="/")


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(params, sep="/")
