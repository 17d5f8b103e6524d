"""Hugging Face's ImageGPT: `openai/imagegpt-{small,medium,large}` and whatever has their keys.

Query, key and value stand side by side in one matrix, and the start token is the last row of the
embedding; `split` and `join` take them apart and together, the table does the rest. Dense layers
have biases, which are zero in the published files. Old files also hold causal masks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.weights.igpt_tf import TRANSPOSED
from vit_jax_zoo.weights.table import KEEP, Flat, Row, Transform

HEADS = Transform(lambda a, shape: a.reshape(shape), lambda a: a.reshape(a.shape[0], -1))
"""[input, width] kept as [input, heads, head width]."""
FROM_HEADS = Transform(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1, a.shape[-1]))
"""[width, output] kept as [heads, head width, output]."""
HEADS_BIAS = Transform(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1))
"""[width] kept as [heads, head width]."""

IGNORE = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)
"""Causal masks that old files keep beside the weights."""

_EMBEDDING, _SOS = "transformer.wte.weight", "transformer.wte.sos"
_FUSED, _PARTS = ".attn.c_attn.", ("query", "key", "value")


def _block(theirs: str, ours: str, transform: Transform = KEEP) -> Row:
  return Row(f"transformer.h.{{i}}.{theirs}", f"decoder/block_{{i}}/{ours}", transform)


TABLE: tuple[Row, ...] = (
  Row(_EMBEDDING, "token_embedding"),
  Row(_SOS, "sos_token"),
  Row("transformer.wpe.weight", "position_embedding"),
  _block("ln_1.weight", "attention_norm/scale"),
  *(_block(f"attn.{p}.weight", f"attention/{p}/kernel", HEADS) for p in _PARTS),
  *(_block(f"attn.{p}.bias", f"attention/{p}/bias", HEADS_BIAS) for p in _PARTS),
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
)
"""Between the keys that `split` leaves and our paths."""


def split(published: Mapping[str, np.ndarray]) -> Flat:
  """Takes the joint matrices of a file apart.

  Biases that are zero throughout the file go, as the model of the paper has none.
  """
  flat: Flat = {}
  for key, array in published.items():
    if key == _EMBEDDING:
      flat[_EMBEDDING], flat[_SOS] = array[:-1], array[-1]
    elif _FUSED in key:
      thirds = np.split(array, 3, axis=-1)
      flat |= {
        key.replace("c_attn", part): third for part, third in zip(_PARTS, thirds, strict=True)
      }
    else:
      flat[key] = array
  biases = [key for key in flat if key.endswith((".c_fc.bias", ".c_proj.bias"))]
  biases += [key for key in flat if key.endswith(tuple(f".{part}.bias" for part in _PARTS))]
  if not any(flat[key].any() for key in biases):
    flat = {key: array for key, array in flat.items() if key not in biases}
  return flat


def join(flat: Mapping[str, np.ndarray]) -> Flat:
  """Puts together what `split` took apart; biases that it dropped come back as zeros."""
  flat = dict(flat)
  flat[_EMBEDDING] = np.concatenate([flat[_EMBEDDING], flat.pop(_SOS)[None]])
  for key in [key for key in flat if key.endswith(".attn.query.weight")]:
    head = key.removesuffix("query.weight")
    block = head.removesuffix("attn.")
    for leaf in ("weight", "bias"):
      keys = [f"{head}{part}.{leaf}" for part in _PARTS if f"{head}{part}.{leaf}" in flat]
      if keys:
        flat[f"{head}c_attn.{leaf}"] = np.concatenate([flat.pop(k) for k in keys], axis=-1)
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
      width = flat[f"{block}{layer}.weight"].shape[1]
      flat.setdefault(f"{block}{layer}.bias", np.zeros(width, np.float32))
  return flat


def infer_fields(published: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of the `ImageGPT` that a file fits.

  Args:
    published: as `split` returns it.
    config: the folder's `config.json`; it alone knows the heads.
  """
  embedding = published[_EMBEDDING]
  return {
    "num_colors": embedding.shape[0],
    "num_positions": published["transformer.wpe.weight"].shape[0],
    "width": embedding.shape[1],
    "depth": sum(key.endswith(".ln_1.weight") for key in published),
    "num_heads": config["n_head"],
    "mlp_dim": published["transformer.h.0.mlp.c_fc.weight"].shape[1],
    "use_bias": "transformer.h.0.mlp.c_fc.bias" in published,
    "num_classes": published["score.weight"].shape[0] if "score.weight" in published else None,
  }
