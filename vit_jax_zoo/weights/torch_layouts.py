"""Rows of key tables for PyTorch's layers; reads and writes safetensors files."""

import contextlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vit_jax_zoo.weights.fused_qkv import PARTS
from vit_jax_zoo.weights.key_map import KEEP, STATISTICS, Array, Flat, Row, Transform, WeightsError

COUNTER = "num_batches_tracked"
"""Key of PyTorch's batch counters, which batch norm with a fixed momentum does not use."""


def _read_convolution(array: Array, _: tuple[int, ...]) -> Array:
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _read_matrix(array: Array, shape: tuple[int, ...]) -> Array:
  # Sizes are compared first: a file of the wrong shape must be reported, not forced.
  fits = array.ndim == 2 and array.size == math.prod(shape)
  return array.T.reshape(shape) if fits else array


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


def read_safetensors(path: str) -> Flat:
  """Returns a file's arrays by key, 16-bit floats widened to float32."""
  half = ("float16", "bfloat16")
  try:
    # safetensors opens local files only, and cannot read bfloat16 from bytes.
    with local_copy(path) as local, safe_open(local, framework="numpy") as file:
      arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
  except (SafetensorError, OSError, AttributeError) as error:  # numpy has no float8_e4m3fn
    raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
  return {k: x.astype(np.float32) if x.dtype.name in half else x for k, x in arrays.items()}


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
  """Yields a local copy of a file, or the path itself if it is local."""
  if "://" not in path:
    if not epath.Path(path).exists():
      raise WeightsError(f"there is no file {path}")
    yield path
    return
  with epath.Path(path).open("rb") as remote, tempfile.NamedTemporaryFile() as copy:
    shutil.copyfileobj(remote, copy)
    copy.flush()
    yield copy.name


def write_safetensors(path: str, arrays: Flat) -> None:
  """Writes a file that PyTorch's libraries read; local or `gs://bucket/...`."""
  # In row-major order, as their memory is written. `ascontiguousarray` adds an axis to scalars.
  arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
  epath.Path(path).write_bytes(save(arrays, {"format": "pt"}))
