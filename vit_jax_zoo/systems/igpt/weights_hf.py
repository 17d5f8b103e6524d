"""Hugging Face's ImageGPT: `openai/imagegpt-{small,medium,large}` and other files with their keys.

Query, key and value are one matrix, the start token is the embedding's last row: see `split`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.systems.igpt.weights_openai import TRANSPOSED, checkpoint_of, palette_beside
from vit_jax_zoo.weights import json_files
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained, side
from vit_jax_zoo.weights.key_map import KEEP, Flat, Row, Transform, WeightsError, write
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_layouts import HEADS_BIAS, PARTS, join_qkv, split_qkv

# [input, width] kept as [input, heads, head width]; [width, output] as [heads, head width, output].
HEADS = Transform(np.reshape, lambda a: a.reshape(a.shape[0], -1))
FROM_HEADS = Transform(np.reshape, lambda a: a.reshape(-1, a.shape[-1]))

_BIAS = r"transformer\.h\.\d+\.(attn|mlp)\.c_(attn|fc|proj)\.bias(\[\w+\])?"
_FUSED = re.compile(r".*\.c_attn\.(weight|bias)")
_EMBEDDING, _SOS = "transformer.wte.weight", "transformer.wte.sos"


def _block(theirs: str, ours: str, transform: Transform = KEEP) -> Row:
  return Row(f"transformer.h.{{i}}.{theirs}", f"decoder/block_{{i}}/{ours}", transform)


TABLE: tuple[Row, ...] = (  # from the keys after `split`
  Row(_EMBEDDING, "token_embedding"),
  Row(_SOS, "sos_token"),
  Row("transformer.wpe.weight", "position_embedding"),
  _block("ln_1.weight", "attention_norm/scale"),
  *(_block(f"attn.c_attn.weight[{p}]", f"attention/{p}/kernel", HEADS) for p in PARTS),
  *(_block(f"attn.c_attn.bias[{p}]", f"attention/{p}/bias", HEADS_BIAS) for p in PARTS),
  _block("attn.c_proj.weight", "attention/out/kernel", FROM_HEADS),
  _block("attn.c_proj.bias", "attention/out/bias"),
  _block("ln_2.weight", "mlp_norm/scale"),
  _block("mlp.c_fc.weight", "mlp/hidden/kernel"),
  _block("mlp.c_fc.bias", "mlp/hidden/bias"),
  _block("mlp.c_proj.weight", "mlp/out/kernel"),
  _block("mlp.c_proj.bias", "mlp/out/bias"),
  Row("transformer.ln_f.weight", "norm/scale"),
  Row("lm_head.weight", "pixel_head"),
  Row("score.weight", "head/kernel", TRANSPOSED),
  Row("clusters", "palette/clusters"),
)

_KNOWN = {
  "activation_function": "quick_gelu",
  "layer_norm_epsilon": 1e-5,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
}
"""Values in `config.json` that our model supports; the arrays do not determine them."""


def is_of(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are those of Hugging Face's ImageGPT."""
  return _EMBEDDING in arrays and "transformer.h.0.attn.c_attn.weight" in arrays


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a folder, with the palette from `preprocessor_config.json` or `kmeans_centers.npy`.

  `ImageGPTForImageClassification` has a classifier on unshifted pixels and no output matrix;
  `ImageGPTModel` has neither.
  """
  path, config = published.path, published.config
  json_files.check_config(published, _KNOWN, ["n_head"])
  masks = (".attn.bias", ".attn.masked_bias")
  arrays = split({k: a for k, a in published.arrays.items() if not k.endswith(masks)})
  if "lm_head.weight" not in arrays:
    arrays["lm_head.weight"] = np.zeros_like(arrays[_EMBEDDING])
  if published.processor.get("clusters") is not None:
    arrays["clusters"] = np.asarray(published.processor["clusters"], np.float32)
  else:
    arrays |= palette_beside(published.file)
  fields = infer_fields(arrays, config)
  if "score.weight" in arrays:
    fields["sos_token"] = False
    del arrays[_SOS]
  ignore = () if fields["use_bias"] else (_BIAS,)
  checkpoint = checkpoint_of(path, arrays, TABLE, fields, *ignore)
  size = checkpoint.preprocess.image_size
  preprocess = json_files.read_preprocess(published.processor, size, "ImageGPT")
  count = fields["num_positions"]
  if math.prod(preprocess.image_size) != count or preprocess.fit != "squash":
    wrong = f"size is {published.processor.get('size')}; expected {count} pixels, n_positions"
    raise WeightsError(f"{path}/preprocessor_config.json: {wrong}")
  if {*preprocess.means, *preprocess.stds} != {0.5}:  # the palette's values are in [-1, 1]
    wrong = f"image_mean is {preprocess.means}, image_std {preprocess.stds}"
    raise WeightsError(f"{path}/preprocessor_config.json: {wrong}; expected 0.5")
  return checkpoint.replace(preprocess=preprocess, image_size=preprocess.image_size)


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes a folder that `ImageGPTForCausalImageModeling.from_pretrained` loads.

  A model with a classifier becomes an `ImageGPTForImageClassification`.
  """
  fields, variables = export.fields(), dict(export.variables)
  if not fields["causal"]:
    raise WeightsError("causal: False; Hugging Face's ImageGPT is causal")
  clusters = variables.pop("palette/clusters", None)
  is_classifier = fields["num_classes"] is not None
  if is_classifier and fields["sos_token"]:
    wrong = "sos_token: True with a head; Hugging Face's classifier has no start token"
    raise WeightsError(f"{wrong}. Set num_classes=None")
  kept = {k: a for k, a in variables.items() if not k.startswith("baseline/")}
  kept.setdefault("sos_token", np.zeros(fields["width"], np.float32))
  kind = "ImageClassification" if is_classifier else "CausalImageModeling"
  config = {
    "architectures": [f"ImageGPTFor{kind}"],
    "model_type": "imagegpt",
    "vocab_size": fields["num_colors"] + 1,
    "n_positions": fields["num_positions"],
    "n_embd": fields["width"],
    "n_layer": fields["depth"],
    "n_head": fields["num_heads"],
    "n_inner": fields["mlp_dim"],
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
    **(json_files.label_fields(export.class_names, fields["num_classes"]) if is_classifier else {}),
  }
  contents: dict[str, Any] = {"config": config}
  if clusters is not None:
    contents["preprocessor_config"] = {
      **json_files.processor_of(export.preprocess, "ImageGPTImageProcessor", fits=("squash",)),
      "clusters": np.asarray(clusters).tolist(),
      "do_color_quantize": True,
    }
  json_files.write_folder(path, join(write(kept, TABLE)), **contents)


def split(published: Mapping[str, np.ndarray]) -> Flat:
  """Splits the fused matrices of a file, and the start token from the colours' embedding."""
  flat, embedding = split_qkv(published, _FUSED, axis=-1), published[_EMBEDDING]
  return {**flat, _EMBEDDING: embedding[:-1], _SOS: embedding[-1]}


def join(flat: Mapping[str, np.ndarray]) -> Flat:
  """Inverts `split`; missing biases become zeros."""
  flat = join_qkv(flat, axis=-1)
  flat[_EMBEDDING] = np.concatenate([flat[_EMBEDDING], flat.pop(_SOS)[None]])
  layers = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
  widths = {k.replace("weight", "bias"): a.shape[1] for k, a in flat.items() if k.endswith(layers)}
  return {key: np.zeros(width, np.float32) for key, width in widths.items()} | flat


def infer_fields(published: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of the `ImageGPT` that fit what `split` returns, and a `config.json`.

  Biases that are all zero, as the published ones, are left out: the paper's model has none.
  """
  embedding = published[_EMBEDDING]
  return {
    "num_colors": embedding.shape[0],
    "num_positions": published["transformer.wpe.weight"].shape[0],
    "width": embedding.shape[1],
    "depth": sum(key.endswith(".ln_1.weight") for key in published),
    "num_heads": config["n_head"],
    "mlp_dim": published["transformer.h.0.mlp.c_fc.weight"].shape[1],
    "use_bias": any(re.fullmatch(_BIAS, key) and a.any() for key, a in published.items()),
    "num_classes": side(published, (r"score\.weight", 2, 0)),
  }
