"""Reads published backbones of all formats into the backbone of a detector or segmenter.

    torchvision, timm    conv1.weight, layer1.0.conv1.weight, ...       a ResNet
    Hugging Face         embedder.embedder.convolution.weight, ...      a ResNet
    resnet50_caffe.pth   torchvision's names for Caffe's weights

and those that the systems recognise (`System.backbone_readers`: LambdaResNet, Caffe and Detectron).
The inputs of Caffe's networks are BGR; their first kernels are reversed to RGB. A file of Caffe's
weights with torchvision's names is recognised by "caffe" in the file's name only. Caffe's blocks
have their stride in the first convolution, which no file states: set the backbone's
`stride_in_1x1`. Classifier heads are ignored.
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
  """A published backbone."""

  arrays: Flat  # by published key
  rows: Sequence[Row]  # key table, paths relative to the backbone
  ignore: Sequence[str]  # regular expressions of keys that may stay unused


def read_backbone(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns a backbone's arrays by path, as in `Checkpoint.table`, from a file."""
  arrays = read_published(path).arrays
  found = (recognize(arrays) for recognize in load_from_each("backbone_readers"))
  if backbone := next(filter(None, found), None):
    rows = _in_any_norm(backbone.rows)
    return key_map.read(backbone.arrays, rows, shapes, source=path, ignore=backbone.ignore)
  rows = resnet_torchvision.table_of(arrays)
  if rows is None:
    keys = ", ".join(sorted(arrays)[:3])
    raise WeightsError(f"{path} holds no known backbone; its keys begin with {keys}")
  if "caffe" in epath.Path(path).name.lower():
    arrays = {**arrays, "conv1.weight": arrays["conv1.weight"][:, ::-1]}
  return key_map.read(arrays, rows, shapes, source=path, ignore=resnet_torchvision.IGNORE)


def _in_any_norm(rows: Sequence[Row]) -> list[Row]:
  """Adds the rows of frozen norms to those of trained norms, and the reverse."""
  found = list(rows)
  for row in rows:
    if re.search(r"norm\w*/(scale|bias)$", row.ours):
      is_frozen = row.ours.startswith(STATISTICS)
      ours = row.ours.removeprefix(STATISTICS) if is_frozen else STATISTICS + row.ours
      found.append(Row(row.published, ours, row.transform))
  return found
