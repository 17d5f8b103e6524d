"""OpenAI's image-gpt checkpoints: their URLs, and the names of their TensorFlow 1 variables."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vit_jax_zoo.systems.igpt.palette import read_palette
from vit_jax_zoo.weights.checkpoint import Checkpoint, side
from vit_jax_zoo.weights.hub import Entry
from vit_jax_zoo.weights.key_map import KEEP, Flat, Row, Transform
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published
from vit_jax_zoo.weights.torch_layouts import PARTS

INPUT_LAST = Transform(lambda a, _: a.transpose(2, 0, 1), lambda a: a.transpose(1, 2, 0))
"""[heads, head width, input] kept as [input, heads, head width]."""
TRANSPOSED = Transform(lambda a, _: a.T, lambda a: a.T)

IGNORE = r"model/.*/(Adam|Adam_1|adam_[mv]|m|v)"  # state of the optimizer


def _block(theirs: str, ours: str, transform: Transform = KEEP) -> Row:
  return Row(f"model/h{{i}}/{theirs}", f"decoder/block_{{i}}/{ours}", transform)


TABLE: tuple[Row, ...] = (
  Row("model/wte", "token_embedding"),
  Row("model/wpe", "position_embedding"),
  Row("model/sos", "sos_token"),
  _block("ln_1/g", "attention_norm/scale"),
  *(_block(f"attn/{p[0]}_proj", f"attention/{p}/kernel", INPUT_LAST) for p in PARTS),
  _block("attn/c_proj", "attention/out/kernel"),
  _block("ln_2/g", "mlp_norm/scale"),
  _block("mlp/c_fc/w", "mlp/hidden/kernel"),
  _block("mlp/c_proj/w", "mlp/out/kernel"),
  Row("model/ln_f/g", "norm/scale"),
  Row("model/wtet", "pixel_head"),
  Row("model/clf/wclf", "head/kernel", TRANSPOSED),
  Row("clusters", "palette/clusters"),
)


def is_of(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the keys are OpenAI's."""
  return "model/wte" in arrays and "model/wpe" in arrays


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a checkpoint's variables, and the palette beside it, if there is one."""
  arrays = {key: a for key, a in published.arrays.items() if key.startswith("model/")}
  arrays |= palette_beside(published.file)
  return checkpoint_of(published.path, arrays, TABLE, infer_fields(arrays), IGNORE)


def checkpoint_of(
  source: str, arrays: Flat, table: tuple[Row, ...], fields: Mapping[str, Any], *ignore: str
) -> Checkpoint:
  """Returns the checkpoint of an iGPT, whose images are resized to a square of its positions."""
  size = (math.isqrt(fields["num_positions"]),) * 2
  preprocess = Preprocess(size, interpolation="bilinear")
  checkpoint = Checkpoint(source, "igpt", arrays, table, fields, preprocess, "pixel_modelling")
  return checkpoint.replace(ignore=ignore, optional=("palette",), image_size=size)


def palette_beside(file: epath.Path) -> Flat:
  """Returns the palette beside a checkpoint, or in one of two folders above; empty if none."""
  for folder in (file.parent, file.parent.parent, file.parent.parent.parent):
    if (palette := folder / "kmeans_centers.npy").exists():
      return {"clusters": read_palette(str(palette))}
  return {}


def infer_fields(published: Mapping[str, np.ndarray]) -> dict[str, int | bool | None]:
  """Returns the fields of the `ImageGPT` that fit a checkpoint's variables."""
  return {
    "num_colors": published["model/wte"].shape[0],
    "num_positions": published["model/wpe"].shape[0],
    "width": published["model/wte"].shape[1],
    "depth": sum(key.endswith("/ln_1/g") for key in published),
    "num_heads": published["model/h0/attn/q_proj"].shape[0],
    "mlp_dim": published["model/h0/mlp/c_fc/w"].shape[1],
    "causal": "model/sos" in published,
    "num_classes": side(published, ("model/clf/wclf", 2, 0)),
  }


OPENAI = "https://openaipublic.blob.core.windows.net/image-gpt"
_PAPER = "Chen et al., ICML 2020"


def _igpt(size: str, shards: int, nats: str, long: str) -> dict[str, Entry]:
  prefix = f"{OPENAI}/checkpoints/igpt-{size}/1000000/model.ckpt-1000000"
  data = (f"{prefix}.data-{i:05d}-of-{shards:05d}" for i in range(shards))
  urls = (f"{prefix}.index", *data, f"{OPENAI}/color-clusters/kmeans_centers.npy")
  score = f"{nats} nats a pixel (ImageNet, 32x32)"
  reported = {"score": score, "source": "openai/image-gpt, README"}
  return {
    f"igpt_{size}_imagenet": Entry(f"igpt_{size}", urls, **reported),
    f"igpt_{size}_imagenet_hub": Entry(f"igpt_{size}", hub=f"openai/imagegpt-{long}", **reported),
  }


PUBLISHED: dict[str, Entry] = {
  **_igpt("s", 32, "2.0895", "small"),
  **_igpt("m", 32, "2.0614", "medium"),
  **_igpt("l", 64, "2.0466", "large"),
}

PAPER_SCORES: dict[str, tuple[str, str]] = {
  "igpt_s": ("41.9 %, linear probe at 32", _PAPER),
  "igpt_m": ("54.5 %, linear probe at 32", _PAPER),
  "igpt_l": ("65.2 %, linear probe at 48", _PAPER),
  "igpt_xl": ("72.0 %, linear probe of five layers at 64", _PAPER),
}
