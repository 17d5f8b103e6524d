"""State dicts of the authors' FPT (ZHANGDONG-NJUST/FPT, class `FPT`).

No trained weights of it were published. The model is the official variant of
`FeaturePyramidTransformer` with four levels, p2 to p5. Queries and keys of a self-transformer share
one convolution, which the file has twice, as `conv_qs` and `conv_ks`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.weights import key_map
from vit_jax_zoo.weights import torch_layouts as layouts
from vit_jax_zoo.weights.checkpoint import Checkpoint, Pretrained
from vit_jax_zoo.weights.key_map import STATISTICS, Array, Flat, Row, WeightsError
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.readers import Published, read_published, write_state_dict

FINEST, LEVELS = 2, 4  # the file's levels are p2 to p5
BODY = "Conv_Body."  # prefix of the keys in a detector

IGNORE = (rf".*\.{layouts.COUNTER}", r".*\.conv_ks\..*")
"""Unread keys: counters, and second names of shared convolutions (compared separately)."""


# Layers of the modules: 1x1 convolutions, 3x3 convolutions, batch norms.
_MODULES: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]] = {
  "st": ({"conv_qs": "query_key", "conv_vs": "value", "conv": "out"}, {}, {"norm_layer": "norm"}),
  "gt": ({"theta": "query", "phi": "key", "g": "value", "W_z.0": "out"}, {}, {"W_z.1": "norm"}),
  "rt": (
    {"conv1x1": "gate", "conv_reduction": "reduce", "conv_cat": "concat"},
    {"conv3x3": "refine", "str_conv3x3": "halve"},
    {"bn_high": "refine_norm", "bn_low": "gate_norm", "bn_reduction": "added_norm"},
  ),
}


def module_rows(kind: str, published: str, ours: str) -> list[Row]:
  """Rows of a self- ("st"), grounding ("gt") or rendering transformer ("rt")."""
  rows = [Row(f"{published}.attention.weight", f"{ours}/mixture")] if kind == "st" else []
  pointwise, convolutions, norms = _MODULES[kind]
  for layers, transform in ((pointwise, layouts.POINTWISE), (convolutions, layouts.CONVOLUTION)):
    for key, name in layers.items():
      rows += layouts.layer_rows(f"{published}.{key}", f"{ours}/{name}", transform)
  for key, name in norms.items():
    rows += layouts.batch_norm_rows(f"{published}.{key}", f"{ours}/{name}")
  return rows


def neck_rows(prefix: str = "", ours: str = "", *, with_norm: bool) -> tuple[Row, ...]:
  """Returns the key map of an FPT, with or without norms of lateral and joining convolutions.

  `prefix` is that of the file's keys, `ours` that of our paths, after the collection's name.
  """
  rows: list[Row] = []
  for level in range(LEVELS):
    own = f"p{level + FINEST}"
    rows += module_rows("st", f"{prefix}st_{own}", f"{ours}self_{level}")
    for other in range(LEVELS):
      pair = f"{own}_p{other + FINEST}"
      if other > level:
        rows += module_rows("gt", f"{prefix}gt_{pair}", f"{ours}ground_{level}_{other}")
      if other < level:
        rows += module_rows("rt", f"{prefix}rt_{pair}", f"{ours}render_{level}_{other}")
    for theirs, name in ((f"{prefix}fpn_{own}_1x1", "lateral"), (f"{prefix}fpt_{own}", "join")):
      path, conv = f"{ours}{name}_{level}", f"{theirs}.0" if with_norm else theirs
      rows += layouts.layer_rows(conv, path, layouts.CONVOLUTION)
      rows += layouts.batch_norm_rows(f"{theirs}.1", f"{path}_norm") if with_norm else ()
  return tuple(rows)


def is_of(published: Mapping[str, Array], prefix: str = "") -> bool:
  """Returns whether a state dict contains the authors' FPT."""
  return all(f"{prefix}{key}.weight" in published for key in ("st_p5.conv_qs", "gt_p2_p5.theta"))


def infer_fields(published: Mapping[str, Array], source: str, prefix: str = "") -> dict[str, Any]:
  """Returns the fields of the `FeaturePyramidTransformer` of a state dict."""
  if not is_of(published, prefix):
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source}: no FPT of the authors' code; first keys: {keys}")
  for key, array in published.items():
    twin = published.get(key.replace(".conv_ks.", ".conv_qs."))
    is_key = key.startswith(prefix) and ".conv_ks." in key
    if is_key and (twin is None or not np.array_equal(array, twin)):
      raise WeightsError(f"{source}: {key} differs from conv_qs; expected equal arrays")
  mixture = published.get(f"{prefix}st_p5.attention.weight")
  norms = {"running_mean": "batch_norm", "weight": "group_norm"}
  norm = (kind for array, kind in norms.items() if f"{prefix}fpt_p2.1.{array}" in published)
  return {
    "width": published[f"{prefix}st_p5.conv_qs.weight"].shape[0],
    "variant": "official",
    "norm": next(norm, "none"),
    "self_parts": 1 if mixture is None else len(mixture),
  }


def read_checkpoint(published: Published) -> Checkpoint:
  """Reads a state dict of the authors' class."""
  arrays = published.arrays
  fields = infer_fields(arrays, source=published.path)
  first = ".0" if fields["norm"] != "none" else ""
  laterals = [arrays[f"fpn_p{level + FINEST}_1x1{first}.weight"] for level in range(LEVELS)]
  sides = [2 ** (LEVELS - level - 1) for level in range(LEVELS)]
  maps = [np.zeros((1, n, n, x.shape[1]), np.float32) for n, x in zip(sides, laterals, strict=True)]
  return Checkpoint(
    source=published.path,
    family="fpt_pyramid",
    arrays=arrays,
    table=neck_rows(with_norm=fields["norm"] != "none"),
    fields=fields,
    preprocess=Preprocess((800, 800)),
    task="",
    ignore=IGNORE,
    heads=(),
    inputs=(maps,),
  )


def read_neck(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns a detector's neck by path from a file of an FPT or a detector; `shapes` are by path."""
  arrays = read_published(path).arrays
  prefix = "" if is_of(arrays) else BODY
  fields = infer_fields(arrays, prefix=prefix, source=path)
  rows = neck_rows(prefix, with_norm=fields["norm"] != "none")
  ignore = (*IGNORE, rf"(?!{re.escape(prefix)}).*", rf"{re.escape(BODY)}conv_body\..*")
  return key_map.read(arrays, rows, shapes, source=path, ignore=ignore)


def state_dict(variables: Mapping[str, Array], ours: str = "", prefix: str = "") -> Flat:
  """Returns the authors' state dict of the official FPT at `ours`; keys get `prefix`."""
  own = {k: v for k, v in variables.items() if k.removeprefix(STATISTICS).startswith(ours)}
  with_norm = f"{ours}join_0_norm/scale" in own
  published = key_map.write(own, neck_rows(prefix, ours, with_norm=with_norm))
  again = {k.replace(".conv_qs.", ".conv_ks."): a for k, a in published.items() if ".conv_qs." in k}
  return {**published, **again, **layouts.batch_counters(published)}


def write_checkpoint(path: str, export: Pretrained) -> None:
  """Writes an FPT, or a detector's neck, for the authors' class; WeightsError if it is another."""
  ours = "neck/" if any(key.startswith("neck/") for key in export.variables) else ""
  if f"{ours}render_1_0/gate_norm/scale" not in export.variables:
    raise WeightsError("variant: the authors' code has no FPT other than variant='official'")
  arrays = state_dict(export.variables, ours)
  if not is_of(arrays):
    raise WeightsError(f"levels: the authors' code has an FPT of {LEVELS} levels only")
  write_state_dict(path, arrays)
