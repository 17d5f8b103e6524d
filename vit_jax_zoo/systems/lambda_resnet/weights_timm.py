"""timm's LambdaResNet checkpoints, such as `timm/lambda_resnet26t.c1_in1k`.

Weights of the paper's own LambdaResNets were never released.
"""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer
from vit_jax_zoo.systems.lambda_resnet.model import VARIANTS
from vit_jax_zoo.weights import json_files
from vit_jax_zoo.weights import torch_layouts as layouts
from vit_jax_zoo.weights.backbones import Backbone
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained, Size, outputs_of, side
from vit_jax_zoo.weights.hub import Entry
from vit_jax_zoo.weights.key_map import Array, Flat, Row, Transform, WeightsError, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published

# Arrays of another shape pass unchanged, and fail the shape check.
SCOPE = Transform(
  lambda array, _: array[..., 0].transpose(2, 3, 1, 0) if array.shape[4:] == (1,) else array,
  lambda array: array.transpose(3, 2, 0, 1)[..., None],
)
"""Position convolution, [k u h w 1] <-> [h w u k]."""
TABLE_OF_OFFSETS = Transform(
  lambda array, _: array[:, :, None] if array.ndim == 3 else array, lambda array: array[:, :, 0]
)
"""Relative position table, [h w k] <-> [h w 1 k]."""


def _conv_norm_rows(published: str, ours: str) -> list[Row]:
  convolution = Row(f"{published}.conv.weight", f"{ours}/conv/kernel", layouts.CONVOLUTION)
  return [convolution, *layouts.batch_norm_rows(f"{published}.bn", f"{ours}/norm")]


def _stage_rows(stage: int) -> list[Row]:
  theirs, ours = f"stages.{stage}.{{b}}", f"c{stage + 2}_block{{b}}"
  convolutions = {"conv1_1x1": "conv1", "conv2_kxk": "conv2", "conv3_1x1": "conv3"}
  rows = []
  for name, our_name in {**convolutions, "shortcut": "shortcut"}.items():
    rows += _conv_norm_rows(f"{theirs}.{name}", f"{ours}/{our_name}")
  rows += layouts.batch_norm_rows(f"{theirs}.post_attn", f"{ours}/lambda_norm")
  theirs, ours = f"{theirs}.self_attn", f"{ours}/lambda_layer"
  rows += layouts.batch_norm_rows(f"{theirs}.norm_q", f"{ours}/query_norm")
  rows += layouts.batch_norm_rows(f"{theirs}.norm_v", f"{ours}/value_norm")
  return [
    *rows,
    *layouts.layer_rows(f"{theirs}.qkv", f"{ours}/qkv", layouts.POINTWISE),
    Row(f"{theirs}.conv_lambda.weight", f"{ours}/position_embedding", SCOPE),
    Row(f"{theirs}.pos_emb", f"{ours}/position_embedding", TABLE_OF_OFFSETS),
    Row(f"{theirs}.conv_lambda.bias", f"{ours}/position_bias"),
  ]


TABLE = (
  *_conv_norm_rows("stem.conv{i}", "stem/conv{i}"),
  *(row for stage in range(4) for row in _stage_rows(stage)),
  *layouts.layer_rows("head.fc", "head"),
)
IGNORE = (rf".*\.{layouts.COUNTER}",)
TIMM = {name: fields for name, fields in VARIANTS.items() if fields.get("stem") == "tiered"}
"""Variants of timm's; the stages' widths at width_factor 1 are 64, 128, 256, 512."""


def is_of(arrays: Mapping[str, Array]) -> bool:
  """Returns whether a state dict is one of timm's networks with lambda layers."""
  has_stem = any(re.match(r"stem\.conv\d\.", key) for key in arrays)
  return has_stem and any(".self_attn.norm_v." in key for key in arrays)


def recognize_backbone(arrays: Mapping[str, Array]) -> Backbone | None:
  """Returns the backbone of a timm LambdaResNet's file."""
  return Backbone(dict(arrays), TABLE, (*IGNORE, r"head\.fc\..*")) if is_of(arrays) else None


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a file, and the preprocessing from its `config.json` if there is one."""
  fields, arrays = infer_fields(published.arrays, published.path), published.arrays
  # timm's model cards: 256 pixels, bicubic, center crop of 94 % (50ts: 95 %).
  crop_pct = 0.95 if fields["activation"] == "silu" else 0.94
  default = Preprocess((256, 256), IMAGENET_MEAN, IMAGENET_STD, crop_pct=crop_pct)
  settings = json_files.read_timm(published, default)
  fields |= _stated_fields(published)
  tables = _size_of_tables(arrays)
  if size := settings["image_size"] or tables:
    settings |= {"preprocess": settings["preprocess"].at_size(size), "image_size": size}
  checkpoint = Checkpoint(
    published.path,
    "lambda_resnet",
    arrays,
    TABLE,
    fields,
    first_kernels=("stem/conv1/conv/kernel",),
    ignore=IGNORE,
    **settings,
  )
  # Relative position tables keep the map size that they were made for.
  return checkpoint.replace(inputs=checkpoint.example_inputs(tables)) if tables else checkpoint


_SUPPORTED = {
  "act_layer": ("relu", "silu"), "global_pool": ("avg", "fast"), "output_stride": (32,)
}  # fmt: skip
_FROM_ARRAYS = ("img_size", "in_chans", "num_classes", "width_factor", "stem_chs")
_FROM_ARRAYS += ("self_attn_kwargs", "drop_rate", "drop_path_rate")
"""Arguments of timm's networks that arrays determine, or that have no effect in use."""


def _stated_fields(published: Published) -> dict[str, Any]:
  stated = published.config.get("model_args") or {}
  for name, value in stated.items():
    known = _SUPPORTED.get(name, ())
    if value is not None and value not in known and name not in _FROM_ARRAYS:
      expected = f"expected {' or '.join(map(str, known or ['none']))}"
      raise WeightsError(f"{published.path}: config.json: {name} is {value!r}; {expected}")
  return {"activation": stated["act_layer"]} if stated.get("act_layer") else {}


def _size_of_tables(arrays: Mapping[str, Array]) -> Size | None:
  for key, array in arrays.items():
    if re.match(r"stages\.2\..*\.self_attn\.pos_emb", key) and array.ndim == 3:
      return 8 * (array.shape[0] + 1), 8 * (array.shape[1] + 1)
  return None


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a folder that `timm.create_model("local-dir:<path>", pretrained=True)` loads."""
  fields = export.fields()
  identity = _identity(fields)
  name = next((name for name, variant in TIMM.items() if _identity(variant) == identity), None)
  if name is None:
    raise WeightsError(f"timm has no LambdaResNet with these blocks; it has {', '.join(TIMM)}")
  arguments: dict[str, Any] = {}
  if fields["widths"][0] != 64:
    arguments["width_factor"] = fields["widths"][0] / 64
  layer, usual = (
    {theirs: _layer_field(f, ours) for ours, theirs in _ARGUMENTS.items()}
    for f in (fields, TIMM[name])
  )
  if layer != usual:
    arguments["self_attn_kwargs"] = layer
  arrays, others = write_flat(export.variables), dict(arguments)
  if size := _size_of_tables(arrays):
    arguments["img_size"] = list(size)
  json_files.write_timm(path, arrays, export, (name, others), arguments)


_ARGUMENTS = {"receptive_field": "r", "num_heads": "num_heads", "dim_k": "dim_head"}
"""Field of `LambdaLayer` -> argument of timm's layer."""


def _layer_field(fields: Mapping[str, Any], name: str) -> Any:
  return (fields["lambda_layer"] or {}).get(name, getattr(LambdaLayer, name))


def _identity(fields: Mapping[str, Any]) -> tuple[Any, ...]:
  """Returns what tells timm's networks from each other, and from others."""
  own = [fields[key] for key in ("blocks", "stem", "shortcut", "se_ratio", "activation")]
  layer = [_layer_field(fields, key) for key in ("position_bias", "pool_size")]
  return own, _chosen(fields), layer, _layer_field(fields, "receptive_field") is None


def _chosen(fields: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
  return tuple(
    tuple(range(count)) if chosen == "all" else () if chosen == "none" else tuple(chosen)
    for count, chosen in zip(fields["blocks"], fields["lambda_blocks"], strict=True)
  )


def write_flat(flat: Mapping[str, Array]) -> Flat:
  """Returns variables by path as timm's state dict; PyTorch's batch counters are zero."""
  has_scope = any(path.endswith("/position_bias") for path in flat)
  published = write(flat, [row for row in TABLE if has_scope or row.transform is not SCOPE])
  return {**published, **layouts.batch_counters(published)}


def infer_fields(published: Mapping[str, Array], source: str) -> dict[str, Any]:
  """Returns the fields of a state dict's `LambdaResNet`; WeightsError if it is none of timm's."""
  blocks, chosen = (
    tuple(_block_indices(published, rf"stages\.{stage}\.(\d+)\.{layer}") for stage in range(4))
    for layer in ("", r"self_attn\.")
  )
  is_global = not any(key.endswith(".conv_lambda.weight") for key in published)
  for fields in TIMM.values():
    layer, sizes = fields["lambda_layer"], tuple(map(len, blocks))
    same = (fields["blocks"], _chosen(fields)) == (sizes, chosen)
    if same and is_global == (layer["receptive_field"] is None):
      break
  else:
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source}: none of timm's LambdaResNets; first keys: {keys}")
  widths = (_outputs_of(published, rf"stages\.{stage}\.\d+\.conv1_1x1") for stage in range(4))
  attention = r".*\.self_attn\."
  scope, table = (rf"{attention}conv_lambda\.weight", 5), (rf"{attention}pos_emb", 3)
  dim_k = side(published, (*scope, 0), (*table, 2)) or LambdaLayer.dim_k
  queries = side(published, (rf"{attention}norm_q\.\w+", 1, 0)) or 0
  sizes = {"dim_k": dim_k, "num_heads": queries // dim_k or LambdaLayer.num_heads}
  return {
    **fields,
    "num_classes": outputs_of(published, "head.fc"),
    "widths": tuple(width or 64 << stage for stage, width in enumerate(widths)),
    "stem_width": _outputs_of(published, r"stem\.conv3") or 64,
    "lambda_layer": {**layer, **sizes, "receptive_field": side(published, (*scope, 2))},
  }


def _block_indices(published: Mapping[str, Array], pattern: str) -> tuple[int, ...]:
  return tuple(sorted({int(m[1]) for key in published if (m := re.match(pattern, key))}))


def _outputs_of(published: Mapping[str, Array], layer: str) -> int | None:
  return side(published, (rf"{layer}\.conv\.weight", 4, 0), (rf"{layer}\.bn\.\w+", 1, 0))


_RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download"
_CARD, _PAPER = "timm's model card", "2102.08602"

# timm's tag; file of its releases; start of the file's SHA-256; accuracy at 256.
_RELEASED = {
  "lambda_resnet26t": ("c1_in1k", "lambda_resnet26t_c_256", "e5a5c857", "79.126"),
  "lambda_resnet26rpt_256": ("c1_in1k", "lambda_resnet26rpt_c_256", "ab00292d", "78.960"),
  "lambda_resnet50ts": ("a1h_in1k", "lambda_resnet50ts_a1h_256", "b87370f7", "81.184"),
}

PUBLISHED: dict[str, Entry] = {}
for _model, (_tag, _file, _sha256, _accuracy) in _RELEASED.items():
  _scored = {"score": f"{_accuracy} % at 256", "source": _CARD}
  _url = f"{_RELEASES}/v0.1-attn-weights/{_file}-{_sha256}.pth"
  PUBLISHED[f"{_model}_imagenet"] = Entry(_model, (_url,), sha256=_sha256, **_scored)
  PUBLISHED[f"{_model}_imagenet_hub"] = Entry(_model, hub=f"timm/{_model}.{_tag}", **_scored)

_SCORES = {
  160: {"50": "79.2"},
  192: {"101": "81.9"},
  224: {"101_c4": "82.6", "50_llll": "78.4", "50_clll": "78.3", "50_ccll": "78.3",
        "50_cccl": "77.3", "50_cccc": "76.9"},
  256: {"152": "83.8", "270": "84.2"},
  320: {"350": "84.7", "420": "84.9", "152_c4": "84.0", "200_c4": "84.3"},
}  # fmt: skip
"""Accuracies by image size and model."""

PAPER_SCORES: dict[str, tuple[str, str]] = {
  **{
    f"lambda_resnet_{name}": (f"{score} % at {side}", _PAPER)
    for side, scores in _SCORES.items()
    for name, score in scores.items()
  },
  **{model: (f"{row[-1]} % at 256", _CARD) for model, row in _RELEASED.items()},
  "mask_rcnn_lambda_resnet_101": ("49.4 box AP, 43.5 mask AP (COCO)", _PAPER),
  "mask_rcnn_lambda_resnet_152": ("50.0 box AP, 43.9 mask AP (COCO)", _PAPER),
}
