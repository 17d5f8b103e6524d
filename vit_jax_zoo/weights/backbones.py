"""Published backbones of detectors and segmenters.

ResNets with the keys of torchvision and timm, or of Hugging Face, and those that systems recognise
(`System.backbone_readers`). Files with "caffe" in their name, as resnet50_caffe.pth, have Caffe's
weights, of BGR images, under torchvision's keys: their first kernel is reversed to RGB. Their
blocks have the stride in the first convolution, which no file states: set the backbone's
`stride_in_1x1`. Classifier heads and PyTorch's batch counters are ignored. Norms fit the trained
`BatchNorm` and the frozen one, all of whose arrays are statistics.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from vit_jax_zoo.registry import load_from_each
from vit_jax_zoo.weights import key_map
from vit_jax_zoo.weights.key_map import STATISTICS, Flat, Row, WeightsError
from vit_jax_zoo.weights.readers import read_published
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, COUNTER, batch_norm_rows, norm_rows


class Backbone(NamedTuple):
  """A published backbone."""

  arrays: Flat  # by published key
  rows: Sequence[Row]  # key table, paths relative to the backbone
  ignore: Sequence[str]  # regular expressions of keys that may stay unused


def read_backbone(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns a backbone's arrays by path, as in `Checkpoint.table`, from a file."""
  arrays = read_published(path).arrays
  found = (recognize(arrays) for recognize in load_from_each("backbone_readers"))
  backbone = next(filter(None, found), None) or _recognize_resnet(arrays, path)
  if backbone is None:
    keys = ", ".join(sorted(arrays)[:3])
    raise WeightsError(f"{path} holds no known backbone; its keys begin with {keys}")
  table = _in_any_norm(backbone.rows)
  return key_map.read(backbone.arrays, table, shapes, source=path, ignore=backbone.ignore)


def _in_any_norm(rows: Sequence[Row]) -> list[Row]:
  """Adds the rows of frozen norms to those of trained norms, and the reverse."""
  found = list(rows)
  for row in rows:
    if re.search(r"norm\w*/(scale|bias)$", row.ours):
      is_frozen = row.ours.startswith(STATISTICS)
      ours = row.ours.removeprefix(STATISTICS) if is_frozen else STATISTICS + row.ours
      found.append(Row(row.published, ours, row.transform))
  return found


_IGNORE = (rf"(.*\.)?{COUNTER}", r"fc\.(weight|bias)", r"classifier\.1\.(weight|bias)")
"""Regular expressions of keys that are not part of a backbone."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """A library's names of a ResNet's parts: convolutions, each with its norm."""

  stem: tuple[str, str]
  block: tuple[str, ...]  # prefix of a stage's blocks, by stage; `{b}` is the number of a block
  convolutions: tuple[tuple[str, str], ...]  # of a block's three layers, below `block`
  shortcut: tuple[str, str]


TORCHVISION = Layout(
  stem=("conv1", "bn1"),
  block=tuple(f"layer{stage}.{{b}}" for stage in range(1, 5)),
  convolutions=tuple((f"conv{i}", f"bn{i}") for i in range(1, 4)),
  shortcut=("downsample.0", "downsample.1"),
)
HUGGING_FACE = Layout(
  stem=("embedder.embedder.convolution", "embedder.embedder.normalization"),
  block=tuple(f"encoder.stages.{stage}.layers.{{b}}" for stage in range(4)),
  convolutions=tuple((f"layer.{i}.convolution", f"layer.{i}.normalization") for i in range(3)),
  shortcut=("shortcut.convolution", "shortcut.normalization"),
)


def rows(layout: Layout, published: str = "", ours: str = "") -> list[Row]:
  """Returns the table of a ResNet's convolutions and norms, with prefixes of keys and paths."""
  found = _conv_norm_rows(published, layout.stem, f"{ours}stem/conv1")
  for stage, block in enumerate(layout.block):
    theirs, path = f"{published}{block}.", f"{ours}c{stage + 2}_block{{b}}"
    for index, names in enumerate(layout.convolutions, start=1):
      found += _conv_norm_rows(theirs, names, f"{path}/conv{index}")
    found += _conv_norm_rows(theirs, layout.shortcut, f"{path}/shortcut")
  return found


def _conv_norm_rows(prefix: str, names: tuple[str, str], ours: str) -> list[Row]:
  convolution, norm = (prefix + name for name in names)
  return [
    Row(f"{convolution}.weight", f"{ours}/conv/kernel", CONVOLUTION),
    # Scale and bias are parameters of a trained norm, and statistics of a frozen one.
    *batch_norm_rows(norm, f"{ours}/norm"),
    *norm_rows(norm, f"{STATISTICS}{ours}/norm"),
  ]


def infer_fields(
  published: Mapping[str, np.ndarray], layout: Layout, source: str, prefix: str = ""
) -> dict[str, Any]:
  """Infers the fields "blocks", "widths" and "stem_width" of a `ResNet` from its arrays."""
  blocks, widths = [], []
  try:
    stem = published[f"{prefix}{layout.stem[0]}.weight"].shape[0]
    for block in layout.block:
      first = [f"{prefix}{block}.{names[0]}.weight" for names in layout.convolutions]
      widths.append(published[first[0].format(b=0)].shape[0])
      _ = published[first[2].format(b=0)]  # blocks of two convolutions have none
      blocks.append(next(n for n in itertools.count() if first[0].format(b=n) not in published))
  except KeyError as error:
    raise WeightsError(f"{source} holds no ResNet of bottlenecks: it has no {error}") from error
  return {"blocks": tuple(blocks), "widths": tuple(widths), "stem_width": stem}


_PLAIN = {
  "stem": "conv7", "shortcut": "conv", "se_ratio": 0.0, "activation": "relu", "norm_epsilon": 1e-5,
  "stride_in_1x1": False,
}  # fmt: skip


def check_plain(fields: Mapping[str, Any], library: str) -> dict[str, Any]:
  """Returns the sizes of a detector's `ResNet`; WeightsError if `library` has no such network."""
  given = dict(fields["backbone"] or {})
  other = [f"{k}={given[k]!r}" for k, plain in _PLAIN.items() if given.get(k, plain) != plain]
  if given.get("norm") == "group_norm":
    other.append("norm='group_norm'")
  if given.get("output_stride", 32) not in (16, 32):
    other.append(f"output_stride={given['output_stride']}")
  if other:
    raise WeightsError(f"backbone: {library} has no ResNet with {', '.join(other)}")
  sizes = {"blocks": (3, 4, 6, 3), "widths": (64, 128, 256, 512), "stem_width": 64}
  return {**sizes, "output_stride": 32, **given}


def _recognize_resnet(arrays: Flat, path: str) -> Backbone | None:
  for layout, prefix in ((TORCHVISION, ""), (HUGGING_FACE, ""), (HUGGING_FACE, "resnet.")):
    if all(f"{prefix}{name}.weight" in arrays for name in layout.stem):
      if "caffe" in epath.Path(path).name.lower():
        arrays = {**arrays, "conv1.weight": arrays["conv1.weight"][:, ::-1]}
      return Backbone(arrays, rows(layout, prefix), _IGNORE)
  return None
