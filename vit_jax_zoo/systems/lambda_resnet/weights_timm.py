"""timm's LambdaResNet checkpoints, such as `timm/lambda_resnet26t.c1_in1k`.

Paths are relative to `params`; those of running statistics begin with "batch_stats/".
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer
from vit_jax_zoo.systems.lambda_resnet.model import VARIANTS
from vit_jax_zoo.weights import timm_config
from vit_jax_zoo.weights.backbones import Backbone
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export, Size
from vit_jax_zoo.weights.infer import outputs_of, side
from vit_jax_zoo.weights.key_map import (
  KEEP,
  STATISTICS,
  Array,
  Flat,
  Row,
  Transform,
  WeightsError,
  read,
  write,
)
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_layouts import COUNTER, batch_counters, batch_norm_rows, contiguous


def _transposed(*axes: int) -> Transform:
  """Permutes axes; arrays of another rank pass unchanged, and fail the shape check."""
  back = tuple(int(axis) for axis in np.argsort(axes))
  return Transform(
    lambda array, _: array.transpose(axes) if array.ndim == len(axes) else array,
    lambda array: array.transpose(back),
  )


def _with_unit_axes(inner: Transform, *unit_axes: int) -> Transform:
  """Drops axes of length 1 from the published array, then applies `inner`."""

  def read_array(array: Array, shape: tuple[int, ...]) -> Array:
    fits = array.ndim > max(unit_axes) and all(array.shape[axis] == 1 for axis in unit_axes)
    return inner.read(array.squeeze(unit_axes), shape) if fits else array

  return Transform(read_array, lambda array: np.expand_dims(inner.write(array), unit_axes))


DENSE = _transposed(1, 0)
CONVOLUTION = _transposed(2, 3, 1, 0)
"""[out in h w] <-> [h w in out]."""
POINTWISE = _with_unit_axes(DENSE, 2, 3)
SCOPE = _with_unit_axes(CONVOLUTION, 4)
"""Position convolution, [k u h w 1] <-> [h w u k]."""
TABLE_OF_OFFSETS = Transform(
  lambda array, _: array[:, :, None] if array.ndim == 3 else array, lambda array: array[:, :, 0]
)
"""Relative position table, [h w k] <-> [h w 1 k]."""


def _conv_norm_rows(published: str, ours: str) -> list[Row]:
  convolution = Row(f"{published}.conv.weight", f"{ours}/conv/kernel", CONVOLUTION)
  return [convolution, *batch_norm_rows(f"{published}.bn", f"{ours}/norm")]


def _stage_rows(stage: int) -> list[Row]:
  theirs, ours = f"stages.{stage}.{{b}}", f"c{stage + 2}_block{{b}}"
  rows = []
  for name, our_name in (
    ("conv1_1x1", "conv1"),
    ("conv2_kxk", "conv2"),
    ("conv3_1x1", "conv3"),
    ("shortcut", "shortcut"),
  ):
    rows += _conv_norm_rows(f"{theirs}.{name}", f"{ours}/{our_name}")
  rows += batch_norm_rows(f"{theirs}.post_attn", f"{ours}/lambda_norm")
  theirs, ours = f"{theirs}.self_attn", f"{ours}/lambda_layer"
  rows += batch_norm_rows(f"{theirs}.norm_q", f"{ours}/query_norm")
  rows += batch_norm_rows(f"{theirs}.norm_v", f"{ours}/value_norm")
  return [
    *rows,
    Row(f"{theirs}.qkv.weight", f"{ours}/qkv/kernel", POINTWISE),
    Row(f"{theirs}.qkv.bias", f"{ours}/qkv/bias"),
    Row(f"{theirs}.conv_lambda.weight", f"{ours}/position_embedding", SCOPE),
    Row(f"{theirs}.conv_lambda.bias", f"{ours}/position_bias"),
  ]


def _table(*, has_scope: bool) -> tuple[Row, ...]:
  stages = [row for stage in range(4) for row in _stage_rows(stage)]
  if not has_scope:
    stages = [
      Row(row.published.replace("conv_lambda.weight", "pos_emb"), row.ours, TABLE_OF_OFFSETS)
      if row.transform is SCOPE
      else row
      for row in stages
    ]
  return (
    *_conv_norm_rows("stem.conv{i}", "stem/conv{i}"),
    *stages,
    Row("head.fc.weight", "head/kernel", DENSE),
    Row("head.fc.bias", "head/bias", KEEP),
  )


TABLE = _table(has_scope=True)
"""Lambda convolutions: lambda_resnet26t, lambda_resnet50ts."""
RELATIVE_TABLE = _table(has_scope=False)
"""Relative position tables: lambda_resnet26rpt_256."""


IGNORE = (rf".*\.{COUNTER}",)


def is_of(arrays: Mapping[str, Array]) -> bool:
  """Returns whether a state dict is one of timm's networks with lambda layers."""
  has_stem = any(re.match(r"stem\.conv\d\.", key) for key in arrays)
  return has_stem and any(".self_attn.norm_v." in key for key in arrays)


def recognize_backbone(arrays: Mapping[str, Array]) -> Backbone | None:
  """Returns the backbone of a timm LambdaResNet's file."""
  if not is_of(arrays):
    return None
  return Backbone(dict(arrays), table_of(arrays), (*IGNORE, r"head\.fc\..*"))


class LambdaCheckpoint(Checkpoint):
  """A timm LambdaResNet; relative position tables keep the map size that they were made for."""

  def example_inputs(self, size: Size) -> tuple[np.ndarray, ...]:
    """Returns an image of the size that the relative position tables were made for."""
    return super().example_inputs(_size_of_tables(self.arrays) or size)


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a file, and the preprocessing from its `config.json` if there is one.

  Raises:
    WeightsError: it is of something else.
  """
  fields = infer_fields(published.arrays, published.path)
  # timm's model cards: 256 pixels, bicubic, center crop of 94 % (50ts: 95 %).
  crop_pct = 0.95 if fields["activation"] == "silu" else 0.94
  settings = timm_config.read(
    published, size=(256, 256), mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=crop_pct
  )
  arrays = published.arrays
  size = settings.stated_size
  if not _has_scope(arrays) and size is None:
    size = _size_of_tables(arrays)
  preprocess = settings.preprocess if size is None else settings.preprocess.at_size(size)
  return LambdaCheckpoint(
    source=published.path,
    family="lambda_resnet",
    arrays=arrays,
    table=table_of(arrays),
    fields=fields,
    preprocess=preprocess,
    task_fields=settings.task_fields,
    first_kernels=("stem/conv1/conv/kernel",),
    ignore=IGNORE,
    image_size=size,
  )


def _size_of_tables(arrays: Mapping[str, Array]) -> tuple[int, int] | None:
  """Returns the image size of the relative position tables: stage 2 has stride 16."""
  for key, array in arrays.items():
    if re.match(r"stages\.2\..*\.self_attn\.pos_emb", key) and array.ndim == 3:
      return 8 * (array.shape[0] + 1), 8 * (array.shape[1] + 1)
  return None


VARIANT_WIDTH = 64
"""Bottleneck width of the first stage at width_factor 1."""

_ARCHITECTURES = ("lambda_resnet26t", "lambda_resnet26rpt_256", "lambda_resnet50ts")


def write_checkpoint(path: str, export: Export) -> None:
  """Writes a folder that `timm.create_model("local-dir:<path>", pretrained=True)` loads.

  Raises:
    WeightsError: timm has no such network.
  """
  fields = export.fields()
  name = next((name for name in _ARCHITECTURES if _is_like(fields, VARIANTS[name])), None)
  if name is None:
    raise WeightsError(
      f"timm has no LambdaResNet with these blocks; it has {', '.join(_ARCHITECTURES)}"
    )
  arguments: dict[str, Any] = {}
  share = fields["widths"][0] / VARIANT_WIDTH
  if share != 1:
    arguments["width_factor"] = share
  layer, usual = ({key: _layer_field(f, key) for key in _LAYER} for f in (fields, VARIANTS[name]))
  if layer != usual:
    arguments["self_attn_kwargs"] = {_LAYER[key]: value for key, value in layer.items()}
  arrays = contiguous(write_flat(export.variables))
  size = _size_of_tables(arrays)
  if size is not None:
    arguments["img_size"] = list(size)
  timm_config.write(path, arrays, export, name, arguments)


_LAYER = {
  "receptive_field": "r", "num_heads": "num_heads", "dim_k": "dim_head", "qkv_bias": "qkv_bias"
}  # fmt: skip
"""Field of `LambdaLayer` -> argument of timm's layer."""


def _layer_field(fields: Mapping[str, Any], name: str) -> Any:
  return (fields["lambda_layer"] or {}).get(name, getattr(LambdaLayer, name))


def _is_like(fields: Mapping[str, Any], variant: Mapping[str, Any]) -> bool:
  """Returns whether fields are a variant's, apart from widths and number of classes."""
  layer = fields["lambda_layer"] or {}
  scope = variant["lambda_layer"]
  same = all(
    fields[key] == variant[key] for key in ("blocks", "stem", "shortcut", "se_ratio", "activation")
  )
  return (
    same
    and _chosen(fields) == _chosen(variant)
    and all(layer.get(key) == scope[key] for key in ("position_bias", "pool_size"))
    and (layer.get("receptive_field") is None) == (scope["receptive_field"] is None)
  )


def _chosen(fields: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
  return tuple(
    tuple(range(count)) if chosen == "all" else () if chosen == "none" else tuple(chosen)
    for count, chosen in zip(fields["blocks"], fields["lambda_blocks"], strict=True)
  )


def read_variables(
  published: Mapping[str, Array], variables: Mapping[str, Any], source: str
) -> dict[str, Any]:
  """Converts a state dict to a model's variables.

  Args:
    published: timm's state dict.
    variables: the model's `params` and `batch_stats`, arrays or shapes.
    source: name of the file, for error messages.

  Raises:
    WeightsError: the arrays do not fit the model; lists all differences.
  """
  shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(variables).items()}
  flat = read(published, table_of(published), shapes, source=source, ignore=IGNORE)
  tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
  for path, array in flat.items():
    collection = "batch_stats" if path.startswith(STATISTICS) else "params"
    tree[collection][path.removeprefix(STATISTICS)] = array
  return {name: traverse_util.unflatten_dict(leaves, sep="/") for name, leaves in tree.items()}


def write_variables(variables: Mapping[str, Any]) -> Flat:
  """Returns `params` and `batch_stats` as timm's state dict; PyTorch's batch counters are zero.

  Raises:
    WeightsError: timm has no name for a variable.
  """
  return write_flat({path: np.asarray(array) for path, array in _flatten(variables).items()})


def write_flat(flat: Mapping[str, Array]) -> Flat:
  """Returns variables by path as timm's state dict; see `write_variables`."""
  has_scope = any(path.endswith("/position_bias") for path in flat)
  published = write(flat, TABLE if has_scope else RELATIVE_TABLE)
  return {**published, **batch_counters(published)}


def infer_fields(published: Mapping[str, Array], source: str) -> dict[str, Any]:
  """Returns the fields of the `LambdaResNet` of a state dict.

  The activation is that of timm's model with the same blocks.

  Raises:
    WeightsError: it is none of timm's LambdaResNets.
  """
  blocks, lambda_blocks = _layout(published)
  for name, fields in VARIANTS.items():
    if fields.get("stem") != "tiered" or fields["blocks"] != blocks:
      continue
    if _chosen(fields) == lambda_blocks and ("rpt" in name) == (not _has_scope(published)):
      break
  else:
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source}: none of timm's LambdaResNets; first keys: {keys}")
  return {
    **fields,
    "num_classes": outputs_of(published, "head.fc"),
    "widths": tuple(
      _outputs_of(published, rf"stages\.{stage}\.\d+\.conv1_1x1") or VARIANT_WIDTH << stage
      for stage in range(4)
    ),
    "stem_width": _outputs_of(published, r"stem\.conv3") or VARIANT_WIDTH,
    "lambda_layer": {**fields["lambda_layer"], **_infer_lambda_layer(published)},
  }


def _outputs_of(published: Mapping[str, Array], layer: str) -> int | None:
  """Returns the output channels of a convolution with batch norm whose name matches."""
  return side(published, (rf"{layer}\.conv\.weight", 4, 0), (rf"{layer}\.bn\.\w+", 1, 0))


def _infer_lambda_layer(published: Mapping[str, Array]) -> dict[str, Any]:
  layer = r".*\.self_attn\."
  scope, table = (rf"{layer}conv_lambda\.weight", 5), (rf"{layer}pos_emb", 3)
  dim_k = side(published, (*scope, 0), (*table, 2)) or LambdaLayer.dim_k
  queries = side(published, (rf"{layer}norm_q\.\w+", 1, 0)) or 0
  return {
    "dim_k": dim_k,
    "num_heads": queries // dim_k or LambdaLayer.num_heads,
    "receptive_field": side(published, (*scope, 2)),
    "qkv_bias": any(key.endswith(".self_attn.qkv.bias") for key in published),
  }


def _layout(published: Mapping[str, Array]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
  """Returns the number of blocks of each stage, and the indices of those with a lambda layer."""
  found: dict[int, dict[int, bool]] = {stage: {} for stage in range(4)}
  for key in published:
    if match := re.match(r"stages\.([0-3])\.(\d+)\.", key):
      stage, block = found[int(match[1])], int(match[2])
      stage[block] = stage.get(block, False) or ".self_attn." in key
  return (
    tuple(len(stage) for stage in found.values()),
    tuple(tuple(sorted(b for b, has in stage.items() if has)) for stage in found.values()),
  )


def _has_scope(published: Mapping[str, Array]) -> bool:
  return any(key.endswith(".conv_lambda.weight") for key in published)


def table_of(published: Mapping[str, Array]) -> tuple[Row, ...]:
  """Returns the key map of a state dict."""
  return TABLE if _has_scope(published) else RELATIVE_TABLE


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  params = traverse_util.flatten_dict(variables["params"], sep="/")
  statistics = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
  return {**params, **{STATISTICS + path: leaf for path, leaf in statistics.items()}}
