"""Hugging Face's DETR: folders with `config.json` and `model.safetensors`, as on the hub.

    facebook/detr-resnet-50                      backbone with timm's keys
    facebook/detr-resnet-50, revision no_timm    backbone with the keys of transformers' ResNet
    facebook/detr-resnet-50-panoptic             all keys but the mask head's begin with "detr."

The keys are those in files; transformers 5 has other names in memory. `auxiliary_loss` of the
config is ignored: with it transformers' decoder layers pass on normalised outputs, unlike the
paper's, and the published weights were trained without.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS
from vit_jax_zoo.systems.detr import weights_official as official
from vit_jax_zoo.weights import backbones as resnet
from vit_jax_zoo.weights import json_files
from vit_jax_zoo.weights import torch_layouts as layouts
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published

_BACKBONE = "model.backbone.conv_encoder.model."
_SUPPORTED = {
  "model_type": "detr",
  "activation_function": "relu",
  "backbone_config.hidden_act": "relu",
  "backbone_config.downsample_in_first_stage": False,
  "backbone_config.downsample_in_bottleneck": False,
}
"""Values of `config.json` that no array shows."""
_NO_LIMIT = 1_000_000  # transformers needs a `longest_edge`


def _side(side: str, attentions: Mapping[str, str]) -> list[Row]:
  norms = (*(f"{name}_layer_norm" for name in attentions), "final_layer_norm")
  theirs, ours, mlp = f"model.{side}.layers.{{i}}", f"transformer/{side}_{{i}}", ("fc1", "fc2")
  return layouts.block_rows(theirs, ours, attentions, norms=norms, qkv="{p}_proj.{leaf}", mlp=mlp)


def table(*, timm: bool, masks: bool) -> tuple[Row, ...]:
  """Returns the rows of files with timm's or transformers' backbone, with or without mask head."""
  layout = resnet.TORCHVISION if timm else resnet.HUGGING_FACE
  rows = (
    *resnet.rows(layout, _BACKBONE, "backbone/"),
    # Learned positions: of transformers 5, then of its version 4.
    *(
      Row(f"model.{place}.{axis}_embeddings.weight", f"{axis}_embedding")
      for place in ("position_embedding", "backbone.position_embedding")
      for axis in ("row", "column")
    ),
    *layouts.layer_rows("model.input_projection", "input_projection", layouts.CONVOLUTION),
    Row("model.query_position_embeddings.weight", "query_embedding"),
    *_side("encoder", {"self_attn": "attention"}),
    *_side("decoder", {"self_attn": "self_attention", "encoder_attn": "cross_attention"}),
    *layouts.norm_rows("model.decoder.layernorm", "transformer/decoder_norm"),
    *layouts.layer_rows("class_labels_classifier", "class_head"),
    *layouts.layer_rows("bbox_predictor.layers.{i}", "box_head_{i}"),
  )
  return official.with_mask_head(rows) if masks else rows


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are those of transformers' DETR."""
  return f"{_prefix(published)}model.query_position_embeddings.weight" in published


def _prefix(published: Mapping[str, np.ndarray]) -> str:
  return official.prefix_of(published, "class_labels_classifier.weight")


def _has_timm_keys(published: Mapping[str, np.ndarray]) -> bool:
  return f"{_prefix(published)}{_BACKBONE}conv1.weight" in published


def infer_fields(
  published: Mapping[str, np.ndarray], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
  """Returns a `Detr`'s fields; WeightsError for other models, KeyError for a missing array."""
  official.check_architecture(published, source)
  prefix = _prefix(published)
  layout = resnet.TORCHVISION if _has_timm_keys(published) else resnet.HUGGING_FACE
  backbone = resnet.infer_fields(published, layout, source, f"{prefix}{_BACKBONE}")
  hidden = f"{prefix}model.{{side}}.layers.{{i}}.fc1.weight"
  class_head = f"{prefix}class_labels_classifier.weight"
  queries = f"{prefix}model.query_position_embeddings.weight"
  # DC5 is `dilation` in transformers 4, `output_stride` in version 5.
  given = config.get("backbone_kwargs") or config.get("backbone_config") or {}
  stride = 16 if config.get("dilation") else given.get("output_stride") or 32
  fields, mlp_dims = official.infer_sizes(published, class_head, queries, hidden)
  encoder, decoder = (
    {"num_heads": config.get(f"{side}_attention_heads", 8), "mlp_dim": mlp_dim}
    for side, mlp_dim in mlp_dims.items()
  )
  return {
    **fields,
    **encoder,
    "decoder": {key: n for key, n in decoder.items() if n != encoder[key]} or None,
    "dropout_rate": config.get("dropout", 0.1),
    "position_embedding": config.get("position_embedding_type", "sine"),
    "backbone": {**backbone, "output_stride": stride},
  }


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a folder; WeightsError without a `config.json`, or for one of another model."""
  path, arrays = published.path, published.arrays
  json_files.check_config(published, _SUPPORTED)
  fields = infer_fields(arrays, published.config, path)
  prefix = _prefix(arrays)
  known = official.checkpoint_fields(fields, prefix)
  names = json_files.read_class_names(published.config, fields["num_classes"])
  known["task_fields"] = {**names, **known["task_fields"]}
  return Checkpoint(
    source=path,
    arrays=arrays,
    table=table(timm=_has_timm_keys(arrays), masks=bool(prefix)),
    preprocess=read_preprocess(published.processor, f"{path}/preprocessor_config.json"),
    **known,
  )


def read_preprocess(processor: Mapping[str, Any], source: str) -> Preprocess:
  """Returns the preprocessing of a `DetrImageProcessor`, from the file's content ({}: defaults)."""
  json_files.kind_of(processor, "Detr")
  padding = processor.get("do_pad", True) and processor.get("pad_size")
  size = processor.get("size") or 800
  size = {"shortest_edge": size} if isinstance(size, int) else size
  if isinstance(size, dict) and "shortest_edge" in size:
    # Before transformers 4.27 the limit was beside it.
    size = {"longest_edge": processor.get("max_size", 1333), **size}
  size = json_files.size_of(size, "size", _SIZES, source)
  if padding:
    height, width = json_files.size_of(padding, "pad_size", [("height", "width")], source).values()
    padding = height, width
  fit = _SIZES[tuple(size)] if processor.get("do_resize", True) else "none"
  first, second = size.values()
  by_side = fit == "shorter_side"
  return Preprocess(
    (first, first if by_side else second),
    *json_files.mean_and_std(processor, (IMAGENET_MEAN, IMAGENET_STD), source),
    fit=fit,
    interpolation=json_files.interpolation_of(processor, source),
    max_side=second if by_side and second < _NO_LIMIT else None,
    rounding="ratio",
    pad_size=padding or None,
  )


_SIZES: Mapping[tuple[str, ...], str] = {
  ("shortest_edge", "longest_edge"): "shorter_side",
  ("max_height", "max_width"): "inside",
  ("height", "width"): "squash",
}
"""`Preprocess.fit` by the keys of `size`, in transformers' order."""


def _processor_of(preprocess: Preprocess, *, masks: bool) -> dict[str, Any]:
  fits = {fit: keys for keys, fit in _SIZES.items()}
  values, padding = preprocess.image_size, preprocess.pad_size
  if preprocess.fit == "shorter_side":
    values = values[0], preprocess.max_side or _NO_LIMIT
  return {
    **json_files.processor_of(preprocess, "DetrImageProcessor", fits=("none", *fits)),
    "format": "coco_panoptic" if masks else "coco_detection",
    "size": dict(zip(fits.get(preprocess.fit, ("height", "width")), values, strict=True)),
    "do_pad": True,
    **({"pad_size": dict(zip(("height", "width"), padding, strict=True))} if padding else {}),
  }


def state_dict(variables: Mapping[str, np.ndarray], *, timm: bool = False) -> Flat:
  """Returns a DETR's variables, given by path with layers unrolled, under Hugging Face's keys."""
  masks = any(path.startswith("mask_head/") for path in variables)
  published = write(variables, table(timm=timm, masks=masks))
  if timm:  # timm's ResNet has counters in the shortcuts' norms, which transformers does not freeze
    published |= layouts.batch_counters(key for key in published if ".downsample.1." in key)
  return published


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a folder for `DetrForObjectDetection` or `DetrForSegmentation`.

  The backbone is transformers' own ResNet; timm's for DC5, as transformers' has no dilation.
  """
  fields = export.fields()
  config = config_of(fields, export.class_names)
  arrays = state_dict(export.variables, timm=config["use_timm_backbone"])
  processor = _processor_of(export.preprocess, masks=fields["mask_head"])
  json_files.write_folder(path, arrays, config=config, preprocessor_config=processor)


def config_of(fields: Mapping[str, Any], class_names: Sequence[str] = ()) -> dict[str, Any]:
  """Returns a `Detr`'s `config.json`; WeightsError if transformers has no such model."""
  backbone = resnet.check_plain(fields, "transformers")
  if fields["masked_backbone"]:
    text = "masked_backbone: transformers' DETR lacks it; predictions of padded images will differ"
    logging.warning(text)
  masks, decoder = fields["mask_head"], {**fields, **(fields["decoder"] or {})}
  return {
    "architectures": ["DetrForSegmentation" if masks else "DetrForObjectDetection"],
    "model_type": "detr",
    "d_model": fields["width"],
    "num_queries": fields["num_queries"],
    "encoder_layers": fields["encoder_depth"],
    "decoder_layers": fields["decoder_depth"],
    "encoder_attention_heads": fields["num_heads"],
    "decoder_attention_heads": decoder["num_heads"],
    "encoder_ffn_dim": fields["mlp_dim"],
    "decoder_ffn_dim": decoder["mlp_dim"],
    "num_hidden_layers": fields["encoder_depth"],
    "activation_function": "relu",
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), fields["dropout_rate"]),
    "position_embedding_type": fields["position_embedding"],
    "is_encoder_decoder": True,
    "auxiliary_loss": False,
    **_backbone_config(backbone, masks=masks),
    **json_files.label_fields(class_names, fields["num_classes"]),
  }


def _backbone_config(backbone: Mapping[str, Any], *, masks: bool) -> dict[str, Any]:
  if backbone["output_stride"] == 16:
    depths = {blocks: f"resnet{depth}" for depth, blocks in RESNET_BLOCKS.items() if depth < 200}
    name = depths.get(tuple(backbone["blocks"]))
    if name is None or tuple(backbone["widths"]) != (64, 128, 256, 512):
      given = f"blocks {backbone['blocks']} and widths {backbone['widths']}"
      wrong = f"backbone: transformers has no dilated ResNet with {given}"
      raise WeightsError(f"{wrong}; it has timm's ResNet-50, 101 and 152")
    return {"use_timm_backbone": True, "backbone": name, "dilation": True}
  stages = ["stage1", "stage2", "stage3", "stage4"]
  own = {
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": backbone["stem_width"],
    "hidden_sizes": [4 * width for width in backbone["widths"]],
    "depths": list(backbone["blocks"]),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "out_features": stages if masks else stages[-1:],
  }
  # Without `backbone` None, transformers 4 uses its default, timm's ResNet-50, beside a config.
  return {"use_timm_backbone": False, "backbone": None, "backbone_config": own, "dilation": False}
