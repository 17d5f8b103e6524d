"""Rows of key tables for PyTorch's layers; fused QKV matrices, split and joined."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vit_jax_zoo.weights.key_map import KEEP, STATISTICS, Array, Flat, Row, Transform

PARTS = ("query", "key", "value")
"""Order along the axis of outputs of the fused matrix."""
COUNTER = "num_batches_tracked"
"""Key of PyTorch's batch counters, which batch norm with a fixed momentum does not use."""


def _read_convolution(array: Array, _: tuple[int, ...]) -> Array:
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _read_matrix(array: Array, shape: tuple[int, ...]) -> Array:
  # Sizes are compared first: a file of the wrong shape must be reported, not forced.
  return array.T.reshape(shape) if array.ndim == 2 and array.size == math.prod(shape) else array


def _read_pointwise(array: Array, shape: tuple[int, ...]) -> Array:
  fits = array.ndim == 4 and array.shape[2:] == (1, 1) and len(shape) == 2
  return array[:, :, 0, 0].T if fits else array


def _read_vector(array: Array, shape: tuple[int, ...]) -> Array:
  return array.reshape(shape) if array.ndim == 1 and array.size == math.prod(shape) else array


CONVOLUTION = Transform(_read_convolution, lambda array: array.transpose(3, 2, 0, 1))
"""[out in h w] -> [h w in out]."""
POINTWISE = Transform(_read_pointwise, lambda array: array.T[:, :, None, None])
"""[out in 1 1] -> [in out]."""
DENSE = Transform(_read_matrix, lambda array: array.T)
"""[out in] -> [in out]."""
TO_HEADS = Transform(_read_matrix, lambda array: array.reshape(array.shape[0], -1).T)
"""[width in] -> [in heads head_width]."""
FROM_HEADS = Transform(_read_matrix, lambda array: array.reshape(-1, array.shape[-1]).T)
"""[out width] -> [heads head_width out]."""
HEADS_BIAS = Transform(_read_vector, lambda array: array.reshape(-1))
"""[width] -> [heads head_width]."""


def layer_rows(
  published: str, ours: str, transform: Transform = DENSE, bias: Transform = KEEP
) -> list[Row]:
  """Rows of a layer with a matrix or a convolution, and a bias."""
  return [
    Row(f"{published}.weight", f"{ours}/kernel", transform),
    Row(f"{published}.bias", f"{ours}/bias", bias),
  ]


def norm_rows(published: str, ours: str) -> list[Row]:
  """Rows of a norm's scale and bias."""
  return [Row(f"{published}.weight", f"{ours}/scale"), Row(f"{published}.bias", f"{ours}/bias")]


def block_rows(
  published: str,
  ours: str,
  attentions: Mapping[str, str],
  *,
  norms: Sequence[str],
  qkv: str,
  out: str = "out_proj",
  mlp: tuple[str, str],
) -> list[Row]:
  """Rows of a Transformer block: attentions, published -> ours, and an MLP, each with its norm.

  `qkv` is a key below an attention's, with {part}, "query", or its first letter {p}, and {leaf}.
  """
  rows = []
  for name, norm in zip((*attentions.values(), "mlp"), norms, strict=True):
    rows += norm_rows(f"{published}.{norm}", f"{ours}/{name}_norm")
  leaves = (("weight", "kernel", TO_HEADS), ("bias", "bias", HEADS_BIAS))
  for theirs, name in attentions.items():
    rows += layer_rows(f"{published}.{theirs}.{out}", f"{ours}/{name}/out", FROM_HEADS)
    for part, (leaf, own, transform) in itertools.product(PARTS, leaves):
      key = f"{published}.{theirs}.{qkv.format(part=part, p=part[0], leaf=leaf)}"
      rows.append(Row(key, f"{ours}/{name}/{part}/{own}", transform))
  for layer, name in zip(mlp, ("hidden", "out"), strict=True):
    rows += layer_rows(f"{published}.{layer}", f"{ours}/mlp/{name}")
  return rows


def batch_norm_rows(published: str, ours: str) -> list[Row]:
  """Rows of a batch norm: its scale and bias, and its running statistics."""
  return [
    *norm_rows(published, ours),
    Row(f"{published}.running_mean", f"{STATISTICS}{ours}/mean"),
    Row(f"{published}.running_var", f"{STATISTICS}{ours}/var"),
  ]


def batch_counters(published: Iterable[str]) -> Flat:
  """Returns zero counters for the batch norms among the keys of `published`."""
  mean = "running_mean"
  norms = (key.removesuffix(mean) for key in published if key.endswith(f".{mean}"))
  return {f"{norm}{COUNTER}": np.zeros((), np.int64) for norm in norms}


def split_qkv(published: Mapping[str, np.ndarray], joint: re.Pattern[str], axis: int = 0) -> Flat:
  """Splits matching arrays into `...qkv.weight[query]`, `...[key]` and `...[value]`."""
  flat: Flat = {}
  for key, array in published.items():
    if joint.fullmatch(key) and array.ndim and array.shape[axis] % len(PARTS) == 0:
      thirds = np.split(array, len(PARTS), axis)
      flat |= {f"{key}[{part}]": third for part, third in zip(PARTS, thirds, strict=True)}
    else:
      flat[key] = array
  return flat


def join_qkv(flat: Mapping[str, np.ndarray], axis: int = 0) -> Flat:
  """Inverse of `split_qkv`."""
  joint: Flat = {}
  for key, array in flat.items():
    whole = key.partition("[")[0]
    if key == f"{whole}[{PARTS[0]}]":
      joint[whole] = np.concatenate([flat[f"{whole}[{part}]"] for part in PARTS], axis)
    elif whole == key:
      joint[key] = array
  return joint
