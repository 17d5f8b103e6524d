"""Reads published backbones, in whatever format, into the backbone of a detector or segmenter.

    torchvision, timm    conv1.weight, layer1.0.conv1.weight, ...       a ResNet
    Hugging Face         embedder.embedder.convolution.weight, ...      a ResNet
    resnet50_caffe.pth   torchvision's names for Caffe's weights

and those that the systems recognise (`System.backbone_readers`: a LambdaResNet, Caffe's and
Detectron's files). Caffe's networks take BGR; their first convolutions are reversed, so that ours
take RGB. In a file with torchvision's names only "caffe" in the file's name tells. Caffe's have
their stride in the blocks' first convolution: set the backbone's `stride_in_1x1`, as no file tells.
Heads of classifiers are ignored.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from vit_jax_zoo.registry import load_from_each
from vit_jax_zoo.weights import key_map, resnet_torchvision
from vit_jax_zoo.weights.key_map import STATISTICS, Flat, Row, WeightsError
from vit_jax_zoo.weights.readers import read_published


class Backbone(NamedTuple):
  """A published backbone.

  Attributes:
    arrays: by published key.
    rows: key table, paths relative to the backbone.
    ignore: regular expressions of keys that may stay unused.
  """

  arrays: Flat
  rows: Sequence[Row]
  ignore: Sequence[str]


def read_backbone(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns a backbone's arrays by path.

  Args:
    path: of the file.
    shapes: of the backbone's variables, by path as in `Checkpoint.table`.

  Raises:
    WeightsError: the file holds no known backbone, or another than `shapes` needs; everything that
      does not fit is listed.
  """
  backbone = _recognize(read_published(path).arrays, path)
  return key_map.read(backbone.arrays, backbone.rows, shapes, source=path, ignore=backbone.ignore)


def _recognize(arrays: Flat, path: str) -> Backbone:
  for recognize in load_from_each("backbone_readers"):
    if found := recognize(arrays):
      return found._replace(rows=_in_any_norm(found.rows))
  if resnet_torchvision.is_of(arrays):
    if "caffe" in epath.Path(path).name.lower():
      arrays = {**arrays, "conv1.weight": arrays["conv1.weight"][:, ::-1]}
    rows = resnet_torchvision.table_of(arrays, path)
    return Backbone(arrays, rows, resnet_torchvision.IGNORE)
  keys = ", ".join(sorted(arrays)[:3])
  raise WeightsError(f"{path} holds no known backbone; its keys begin with {keys}")


def _in_any_norm(rows: Sequence[Row]) -> list[Row]:
  """Adds to the rows of a trained norm's scale and bias those of a frozen one, and the reverse."""
  found = list(rows)
  for row in rows:
    if re.search(r"norm\w*/(scale|bias)$", row.ours):
      is_frozen = row.ours.startswith(STATISTICS)
      ours = row.ours.removeprefix(STATISTICS) if is_frozen else STATISTICS + row.ours
      found.append(Row(row.published, ours, row.transform))
  return found
