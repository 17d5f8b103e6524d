"""Hugging Face's DETR: folders with `config.json` and `model.safetensors`, as on the hub.

    facebook/detr-resnet-50                      the backbone has timm's names
    facebook/detr-resnet-50, revision no_timm    it has those of transformers' own ResNet
    facebook/detr-resnet-50-panoptic             everything but the mask head begins with "detr."

What transformers 5 calls parameters in memory is different; these are the names in files. Of
DetrConfig's fields `auxiliary_loss` is not read: set, transformers' decoder layers hand on what the
paper's do not (each normalised), and the published weights were trained without.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS
from vit_jax_zoo.weights import hf_config
from vit_jax_zoo.weights import resnet_torchvision as resnet
from vit_jax_zoo.weights.checkpoint import Checkpoint, Export
from vit_jax_zoo.weights.detection_layouts import (
  MASK_ROWS,
  check_backbone,
  heads_of,
  ignored,
  prefixed,
  stuff_of,
)
from vit_jax_zoo.weights.key_map import Flat, Row, WeightsError, write
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_layouts import (
  CONVOLUTION,
  FROM_HEADS,
  HEADS_BIAS,
  TO_HEADS,
  batch_counters,
  contiguous,
  layer_rows,
  norm_rows,
  write_safetensors,
)

_BACKBONE = "model.backbone.conv_encoder.model."
_KNOWN_BACKBONE = {
  "hidden_act": "relu",
  "downsample_in_first_stage": False,
  "downsample_in_bottleneck": False,
}
"""What our ResNet does; of transformers' `backbone_config`."""
_CLASSES = {False: "DetrForObjectDetection", True: "DetrForSegmentation"}


def _attention_rows(published: str, ours: str) -> list[Row]:
  rows = []
  for theirs, part in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
    rows += layer_rows(f"{published}.{theirs}", f"{ours}/{part}", TO_HEADS, HEADS_BIAS)
  return rows + layer_rows(f"{published}.out_proj", f"{ours}/out", FROM_HEADS)


def _side_rows(side: str, attentions: Mapping[str, str]) -> list[Row]:
  theirs, ours = f"model.{side}.layers.{{i}}", f"transformer/{side}_{{i}}"
  rows = []
  for published, name in attentions.items():
    rows += _attention_rows(f"{theirs}.{published}", f"{ours}/{name}")
    rows += norm_rows(f"{theirs}.{published}_layer_norm", f"{ours}/{name}_norm")
  rows += layer_rows(f"{theirs}.fc1", f"{ours}/mlp/hidden")
  rows += layer_rows(f"{theirs}.fc2", f"{ours}/mlp/out")
  return rows + norm_rows(f"{theirs}.final_layer_norm", f"{ours}/mlp_norm")


def _position_rows() -> list[Row]:
  """Learned positions: as transformers 5 has them, then as its version 4."""
  return [
    Row(f"model.{place}.{theirs}_embeddings.weight", f"{ours}_embedding")
    for place in ("position_embedding", "backbone.position_embedding")
    for theirs, ours in (("row", "row"), ("column", "column"))
  ]


def table(*, timm: bool, masks: bool) -> tuple[Row, ...]:
  """Returns the rows between a file's keys and our paths, layers unrolled.

  Args:
    timm: whether the backbone has timm's names.
    masks: whether it is a model with a mask head.
  """
  layout = resnet.TORCHVISION if timm else resnet.HUGGING_FACE
  rows = [
    *resnet.rows(layout, _BACKBONE, "backbone/"),
    *_position_rows(),
    *layer_rows("model.input_projection", "input_projection", CONVOLUTION),
    Row("model.query_position_embeddings.weight", "query_embedding"),
    *_side_rows("encoder", {"self_attn": "attention"}),
    *_side_rows("decoder", {"self_attn": "self_attention", "encoder_attn": "cross_attention"}),
    *norm_rows("model.decoder.layernorm", "transformer/decoder_norm"),
    *layer_rows("class_labels_classifier", "class_head"),
    *layer_rows("bbox_predictor.layers.{i}", "box_head_{i}"),
  ]
  return (*prefixed("detr.", rows), *MASK_ROWS) if masks else tuple(rows)


def is_of(published: Mapping[str, np.ndarray]) -> bool:
  """Tells whether a file's keys are Hugging Face's, as far as some of its layers go."""
  return f"{_prefix(published)}model.query_position_embeddings.weight" in published


def _prefix(published: Mapping[str, np.ndarray]) -> str:
  return "detr." if "detr.class_labels_classifier.weight" in published else ""


def _has_timm_names(published: Mapping[str, np.ndarray]) -> bool:
  return f"{_prefix(published)}{_BACKBONE}conv1.weight" in published


def infer_fields(
  published: Mapping[str, np.ndarray], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
  """Returns the fields of the `Detr` that a folder holds.

  Args:
    published: the arrays, as they lie in the file.
    config: `config.json`; it alone knows the heads, the activation and the dilation.
    source: the folder's name, for the message.

  Raises:
    WeightsError: the config asks for what our model has not.
    KeyError: an array is missing from which a size is read.
  """
  if config.get("activation_function", "relu") != "relu":
    raise WeightsError(f"{source} has activation {config['activation_function']!r}; known is relu")
  _check_backbone_config(config.get("backbone_config") or {}, source)
  prefix = _prefix(published)
  layout = resnet.TORCHVISION if _has_timm_names(published) else resnet.HUGGING_FACE
  backbone = resnet.infer_fields(published, layout, source, f"{prefix}{_BACKBONE}")
  classes, width = published[f"{prefix}class_labels_classifier.weight"].shape
  sides = {}
  for side in ("encoder", "decoder"):
    first = published[f"{prefix}model.{side}.layers.0.fc1.weight"]
    heads = config.get(f"{side}_attention_heads", 8)
    sides[side] = {"num_heads": heads, "mlp_dim": first.shape[0]}
  other = {key: n for key, n in sides["decoder"].items() if n != sides["encoder"][key]}
  return {
    "num_classes": classes - 1,
    "num_queries": published[f"{prefix}model.query_position_embeddings.weight"].shape[0],
    "width": width,
    "encoder_depth": _depth(published, f"{prefix}model.encoder.layers"),
    "decoder_depth": _depth(published, f"{prefix}model.decoder.layers"),
    **sides["encoder"],
    "decoder": other or None,
    "dropout_rate": float(config.get("dropout", 0.1)),
    "position_embedding": config.get("position_embedding_type", "sine"),
    "mask_head": "mask_head.lay1.weight" in published,
    "backbone": {**backbone, "output_stride": _output_stride(config)},
  }


def _check_backbone_config(config: Mapping[str, Any], source: str) -> None:
  """Raises WeightsError for a ResNet of transformers' whose difference no array shows."""
  for key, known in _KNOWN_BACKBONE.items():
    if (given := config.get(key, known)) != known:
      raise WeightsError(f"the backbone of {source} has {key} {given!r}; known is {known!r}")


def _depth(published: Mapping[str, np.ndarray], layers: str) -> int:
  return sum(bool(re.fullmatch(rf"{re.escape(layers)}\.\d+\.fc1\.weight", k)) for k in published)


def _output_stride(config: Mapping[str, Any]) -> int:
  """Returns 16 for DC5, which is said in three ways: transformers 4's, and two of version 5."""
  if config.get("dilation"):
    return 16
  stated = config.get("backbone_kwargs") or config.get("backbone_config") or {}
  return stated.get("output_stride") or 32


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads what lies in a folder with its `config.json`.

  Raises:
    WeightsError: there is no such file, or it asks for what our model has not.
  """
  path, arrays = published.path, published.arrays
  if not published.has_config:
    raise WeightsError(f"{path} has Hugging Face's keys, but there is no config.json beside it")
  fields = infer_fields(arrays, published.config, path)
  prefix = _prefix(arrays)
  return Checkpoint(
    source=path,
    family="detr",
    arrays=arrays,
    table=table(timm=_has_timm_names(arrays), masks=bool(prefix)),
    fields=fields,
    preprocess=_read_preprocess(published.processor),
    task="detection",
    task_fields={**hf_config.read_class_names(published.config), **stuff_of(fields)},
    ignore=ignored(prefix),
    heads=heads_of(has_masks=fields["mask_head"]),
  )


def _read_preprocess(processor: Mapping[str, Any]) -> Preprocess:
  """Returns what `DetrImageProcessor` is told; 800 and 1333 by default."""
  size = processor.get("size") or {}
  if isinstance(size, int):  # of old: the shorter side, and beside it the longer one's limit
    size = {"shortest_edge": size, "longest_edge": processor.get("max_size", 1333)}
  side = int(size.get("shortest_edge", 800))
  return Preprocess(
    (side, side),
    mean=tuple(processor.get("image_mean") or IMAGENET_MEAN),
    std=tuple(processor.get("image_std") or IMAGENET_STD),
    fit="shorter_side",
    interpolation="bilinear",
    max_side=int(size.get("longest_edge") or 1333),
  )


def state_dict(variables: Mapping[str, np.ndarray], *, timm: bool = False) -> Flat:
  """Returns a DETR's variables under Hugging Face's keys, as they stand in files.

  Args:
    variables: by path, layers unrolled.
    timm: whether the backbone gets timm's names.

  Raises:
    WeightsError: there is no name for some of them: transformers has no norms before attention.
  """
  masks = any(path.startswith("mask_head/") for path in variables)
  published = write(variables, table(timm=timm, masks=masks))
  if timm:  # timm's class is built with counters, and only these are not frozen away
    published |= batch_counters(key for key in published if ".downsample.1." in key)
  return contiguous(published)


def write_checkpoint(path: str, export: Export) -> None:
  """Writes a folder that `DetrForObjectDetection` or `DetrForSegmentation` loads.

  The backbone is transformers' own ResNet, for which one needs no timm; where the last stage is
  dilated (DC5), which that one cannot be, it is timm's.

  Raises:
    WeightsError: transformers has no such model.
  """
  fields = export.fields()
  config = config_of(fields, export.class_names)
  arrays = state_dict(export.variables, timm=config["use_timm_backbone"])
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  write_safetensors(str(folder / "model.safetensors"), arrays)
  processor = _processor_of(export.preprocess, masks=fields["mask_head"])
  for name, content in (("config", config), ("preprocessor_config", processor)):
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def config_of(fields: Mapping[str, Any], class_names: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the `config.json` of a `Detr` with these fields.

  Args:
    fields: all that the model has.
    class_names: by class id; "LABEL_0", ... where there are none.

  Raises:
    WeightsError: transformers has no such model.
  """
  backbone = check_backbone(fields, "transformers")
  if fields["pre_norm"]:
    raise WeightsError("transformers' DETR has no pre_norm")
  if fields["masked_backbone"]:
    logging.warning("transformers' DETR has no masked_backbone: in padded batches it differs")
  encoder = {key: fields[key] for key in ("num_heads", "mlp_dim")}
  decoder = {**encoder, **(fields["decoder"] or {})}
  count = fields["num_classes"]
  names = [*class_names, *(f"LABEL_{i}" for i in range(len(class_names), count))]
  masks = fields["mask_head"]
  return {
    "architectures": [_CLASSES[masks]],
    "model_type": "detr",
    "d_model": fields["width"],
    "num_queries": fields["num_queries"],
    **_side_config("encoder", fields["encoder_depth"], encoder),
    **_side_config("decoder", fields["decoder_depth"], decoder),
    "num_hidden_layers": fields["encoder_depth"],
    "activation_function": "relu",
    "dropout": fields["dropout_rate"],
    "attention_dropout": fields["dropout_rate"],
    "activation_dropout": fields["dropout_rate"],
    "position_embedding_type": fields["position_embedding"],
    "is_encoder_decoder": True,
    "auxiliary_loss": False,
    **_backbone_config(backbone, masks=masks),
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }


def _side_config(side: str, depth: int, layer: Mapping[str, int]) -> dict[str, Any]:
  return {
    f"{side}_layers": depth,
    f"{side}_attention_heads": layer["num_heads"],
    f"{side}_ffn_dim": layer["mlp_dim"],
  }


def _backbone_config(backbone: Mapping[str, Any], *, masks: bool) -> dict[str, Any]:
  if backbone["output_stride"] == 16:
    depths = {blocks: f"resnet{depth}" for depth, blocks in RESNET_BLOCKS.items() if depth < 200}
    name = depths.get(tuple(backbone["blocks"]))
    if name is None or tuple(backbone["widths"]) != (64, 128, 256, 512):
      raise WeightsError(
        "transformers has dilated backbones of timm's published sizes alone, not of blocks "
        f"{backbone['blocks']} and widths {backbone['widths']}"
      )
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
  # `backbone` None: older versions take its default, a ResNet-50 of timm's, beside a config.
  return {"use_timm_backbone": False, "backbone": None, "backbone_config": own, "dilation": False}


def _processor_of(preprocess: Preprocess, *, masks: bool) -> dict[str, Any]:
  side = min(preprocess.image_size)
  limit = preprocess.max_side if preprocess.fit == "shorter_side" else max(preprocess.image_size)
  return {
    "image_processor_type": "DetrImageProcessor",
    "format": "coco_panoptic" if masks else "coco_detection",
    "do_resize": True,
    "size": {"shortest_edge": side, "longest_edge": limit or 1333},
    "do_normalize": True,
    "image_mean": preprocess.means,
    "image_std": preprocess.stds,
    "do_pad": True,
  }
