"""ResNets as backbones: the layout that torchvision and timm share, and Hugging Face's.

    torchvision, timm   conv1.weight, bn1.weight, layer1.0.conv1.weight, layer1.0.downsample.0. ...
    Hugging Face        embedder.embedder.convolution.weight, encoder.stages.0.layers.0.layer.0. ...

Classifier heads and PyTorch's batch counters are ignored. Norms fit the trained `BatchNorm` and the
frozen one, all of whose arrays are statistics.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.weights.key_map import STATISTICS, Row, WeightsError
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION, COUNTER, batch_norm_rows, norm_rows

IGNORE = (rf"(.*\.)?{COUNTER}", r"fc\.(weight|bias)", r"classifier\.1\.(weight|bias)")
"""Regular expressions of keys that are not part of a backbone."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """A library's names of a ResNet's parts; `{b}` is the number of a block in its stage.

  Attributes:
    stem: convolution and norm of the stem.
    block: prefix of a stage's blocks, by the stage's number from 0.
    convolutions: convolution and norm of each of a block's three layers, below `block`.
    shortcut: convolution and norm of the shortcut.
  """

  stem: tuple[str, str]
  block: tuple[str, str, str, str]
  convolutions: tuple[tuple[str, str], ...]
  shortcut: tuple[str, str]


TORCHVISION = Layout(
  stem=("conv1", "bn1"),
  block=("layer1.{b}", "layer2.{b}", "layer3.{b}", "layer4.{b}"),
  convolutions=(("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
  shortcut=("downsample.0", "downsample.1"),
)
HUGGING_FACE = Layout(
  stem=("embedder.embedder.convolution", "embedder.embedder.normalization"),
  block=(
    "encoder.stages.0.layers.{b}",
    "encoder.stages.1.layers.{b}",
    "encoder.stages.2.layers.{b}",
    "encoder.stages.3.layers.{b}",
  ),
  convolutions=tuple((f"layer.{i}.convolution", f"layer.{i}.normalization") for i in range(3)),
  shortcut=("shortcut.convolution", "shortcut.normalization"),
)


def rows(layout: Layout, published: str = "", ours: str = "") -> list[Row]:
  """Returns the table of a ResNet's convolutions and norms.

  Args:
    layout: of the file.
    published: prefix of the file's keys.
    ours: prefix of our paths.
  """
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
  """Infers the fields "blocks", "widths" and "stem_width" of a `ResNet` from its arrays.

  Raises:
    WeightsError: the arrays are not those of a ResNet of bottleneck blocks.
  """
  blocks, widths = [], []
  try:
    stem = published[f"{prefix}{layout.stem[0]}.weight"].shape[0]
    for block in layout.block:
      first = [f"{prefix}{block}.{names[0]}.weight" for names in layout.convolutions]
      widths.append(published[first[0].format(b=0)].shape[0])
      _ = published[first[2].format(b=0)]  # blocks of two convolutions have none
      count = 0
      while first[0].format(b=count) in published:
        count += 1
      blocks.append(count)
  except KeyError as error:
    raise WeightsError(f"{source} holds no ResNet of bottlenecks: it has no {error}") from error
  return {"blocks": tuple(blocks), "widths": tuple(widths), "stem_width": stem}


_LAYOUTS = ((TORCHVISION, ""), (HUGGING_FACE, ""), (HUGGING_FACE, "resnet."))


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether a file's keys are a ResNet's, by those of its first layer."""
  return _layout_of(published) is not None


def table_of(published: Mapping[str, np.ndarray], source: str) -> list[Row]:
  """Returns the rows between a file's keys and the paths of a `ResNet`.

  Raises:
    WeightsError: the file holds no ResNet.
  """
  found = _layout_of(published)
  if found is None:
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source} holds no ResNet; its keys begin with {keys}")
  return rows(*found)


def _layout_of(published: Mapping[str, np.ndarray]) -> tuple[Layout, str] | None:
  for layout, prefix in _LAYOUTS:
    if all(f"{prefix}{name}.weight" in published for name in layout.stem):
      return layout, prefix
  return None


_PLAIN = {
  "stem": "conv7",
  "shortcut": "conv",
  "se_ratio": 0.0,
  "activation": "relu",
  "norm_epsilon": 1e-5,
  "stride_in_1x1": False,
}


def check_plain(fields: Mapping[str, Any], library: str) -> dict[str, Any]:
  """Returns the backbone's "blocks", "widths", "stem_width" and "output_stride" of a detector.

  Args:
    fields: the detector's; "backbone" holds those of its `ResNet`.
    library: name of the code that the model is exported for.

  Raises:
    WeightsError: the backbone is not a plain ResNet.
  """
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
