"""State dicts of the authors' FPT (ZHANGDONG-NJUST/FPT, class `FPT`), by key.

No trained weights of it were published; whoever has some can bring them. They are those of a
`FeaturePyramidTransformer(flavor="official")` of four levels, p2 to p5. In checkpoints of a whole
detector all keys begin with a prefix ("Conv_Body.", and what comes below it there).

Queries and keys of a self-transformer share one convolution, which the file has under two names,
`conv_qs` and `conv_ks`: both must hold the same, and both are written. Kernels that the code makes
and never uses are parameters here, too, so that nothing of a file is lost.

Paths of parameters stand below `params`; those of running statistics begin with "batch_stats/".
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vit_jax_zoo.layers.feature_pyramid_transformer import FeaturePyramidTransformer
from vit_jax_zoo.weights.table import Array, Flat, Row, Transform, WeightsError, read, write
from vit_jax_zoo.weights.torch_layouts import CONVOLUTION

FINEST = 2
"""The file counts its levels from p2."""
LEVELS = 4

_STATISTICS = "batch_stats/"
_COUNTER = "num_batches_tracked"


def _read_pointwise(array: Array, shape: tuple[int, ...]) -> Array:
  fits = array.ndim == 4 and array.shape[2:] == (1, 1) and len(shape) == 2
  return array[:, :, 0, 0].T if fits else array


POINTWISE = Transform(_read_pointwise, lambda array: array.T[:, :, None, None])
"""A 1x1 convolution, [out in 1 1] <-> [in out]."""


def _conv_rows(published: str, ours: str, transform: Transform = POINTWISE) -> list[Row]:
  return [
    Row(f"{published}.weight", f"{ours}/kernel", transform),
    Row(f"{published}.bias", f"{ours}/bias"),
  ]


def _norm_rows(published: str, ours: str) -> list[Row]:
  return [
    Row(f"{published}.weight", f"{ours}/scale"),
    Row(f"{published}.bias", f"{ours}/bias"),
    Row(f"{published}.running_mean", f"{_STATISTICS}{ours}/mean"),
    Row(f"{published}.running_var", f"{_STATISTICS}{ours}/var"),
  ]


def self_rows(published: str, ours: str) -> list[Row]:
  """Rows of an `OfficialSelfTransformer`; `conv` transforms come after deeper ones of that name."""
  return [
    Row(f"{published}.conv_qs.0.weight", f"{ours}/query_key_conv/kernel", CONVOLUTION),
    *_norm_rows(f"{published}.conv_qs.1", f"{ours}/query_key_norm"),
    *_conv_rows(f"{published}.conv_qs", f"{ours}/query_key"),
    *_conv_rows(f"{published}.conv_qs.3", f"{ours}/query_key"),
    *_conv_rows(f"{published}.conv_vs", f"{ours}/value"),
    Row(f"{published}.attention.weight", f"{ours}/mixture"),
    *_conv_rows(f"{published}.conv", f"{ours}/out"),
    *_norm_rows(f"{published}.norm_layer", f"{ours}/norm"),
  ]


def ground_rows(published: str, ours: str) -> list[Row]:
  """Rows of an `OfficialGroundingTransformer`."""
  return [
    *_conv_rows(f"{published}.theta", f"{ours}/query"),
    *_conv_rows(f"{published}.phi", f"{ours}/key"),
    *_conv_rows(f"{published}.g", f"{ours}/value"),
    Row(f"{published}.W_f.0.weight", f"{ours}/pair_kernel", POINTWISE),
    Row(f"{published}.W_f.0.bias", f"{ours}/pair_bias"),
    *_conv_rows(f"{published}.W_z.0", f"{ours}/out"),
    *_conv_rows(f"{published}.W_z", f"{ours}/out"),
    *_norm_rows(f"{published}.W_z.1", f"{ours}/norm"),
  ]


def render_rows(published: str, ours: str) -> list[Row]:
  """Rows of an `OfficialRenderingTransformer`; the code calls the gate's norm `bn_low`."""
  return [
    *_conv_rows(f"{published}.conv3x3", f"{ours}/refine", CONVOLUTION),
    *_norm_rows(f"{published}.bn_high", f"{ours}/refine_norm"),
    *_conv_rows(f"{published}.conv1x1", f"{ours}/gate"),
    *_norm_rows(f"{published}.bn_low", f"{ours}/gate_norm"),
    *_conv_rows(f"{published}.str_conv3x3", f"{ours}/halve", CONVOLUTION),
    *_norm_rows(f"{published}.bn_reduction", f"{ours}/added_norm"),
    *_conv_rows(f"{published}.conv_reduction", f"{ours}/reduce"),
    *_conv_rows(f"{published}.conv_cat", f"{ours}/concat"),
  ]


def _join_rows(published: str, ours: str) -> list[Row]:
  """Rows of a lateral or joining convolution, alone or in front of a norm."""
  return [
    *_conv_rows(f"{published}.0", ours, CONVOLUTION),
    *_norm_rows(f"{published}.1", f"{ours}_norm"),
    *_conv_rows(published, ours, CONVOLUTION),
  ]


def _table(prefix: str, *, with_norm: bool) -> tuple[Row, ...]:
  rows: list[Row] = []
  for level in range(LEVELS):
    own = f"p{level + FINEST}"
    rows += self_rows(f"{prefix}st_{own}", f"self_{level}")
    for other in range(LEVELS):
      pair = f"{own}_p{other + FINEST}"
      if other > level:
        rows += ground_rows(f"{prefix}gt_{pair}", f"ground_{level}_{other}")
      if other < level:
        rows += render_rows(f"{prefix}rt_{pair}", f"render_{level}_{other}")
    for theirs, ours in ((f"fpn_{own}_1x1", "lateral"), (f"fpt_{own}", "join")):
      joins = _join_rows(prefix + theirs, f"{ours}_{level}")
      rows += [row for row in joins if with_norm == bool(re.search(r"\.[01]\.\w+$", row.published))]
  return tuple(rows)


def is_of(published: Mapping[str, Array], prefix: str = "") -> bool:
  """Tells whether a state dict holds the authors' FPT."""
  return all(f"{prefix}{key}.weight" in published for key in ("st_p5.conv_qs", "gt_p2_p5.theta"))


def infer_fields(
  published: Mapping[str, Array], *, prefix: str = "", source: str = "the file"
) -> dict[str, Any]:
  """Returns the fields of the `FeaturePyramidTransformer` that a state dict is of.

  Raises:
    WeightsError: there is none in it.
  """
  if not is_of(published, prefix):
    keys = ", ".join(sorted(published)[:3])
    raise WeightsError(f"{source} holds no FPT of the authors' code; its keys begin with {keys}")
  mixture = published.get(f"{prefix}st_p5.attention.weight")
  norm = "none"
  if f"{prefix}fpt_p2.1.weight" in published:
    averaged = f"{prefix}fpt_p2.1.running_mean" in published
    norm = "batch_norm" if averaged else "group_norm"
  halves = f"{prefix}rt_p5_p4.str_conv3x3.weight" in published
  return {
    "width": published[f"{prefix}st_p5.conv_qs.weight"].shape[0],
    "flavor": "official",
    "norm": norm,
    "rendering": "head" if halves else "november_2020",
    "self_parts": 1 if mixture is None else mixture.shape[0],
  }


def read_variables(
  published: Mapping[str, Array],
  variables: Mapping[str, Any],
  *,
  prefix: str = "",
  source: str = "the file",
) -> dict[str, Any]:
  """Brings a state dict into the structure of the official flavour's variables.

  Args:
    published: by key; others than those of `prefix` are not looked at.
    variables: of a `FeaturePyramidTransformer`, as arrays or shapes.
    prefix: of the FPT's keys.
    source: the file's name, for the message.

  Raises:
    WeightsError: the arrays do not fit; all that is wrong is listed. Or `conv_qs` and `conv_ks`
      hold different things.
  """
  own = {key: array for key, array in published.items() if key.startswith(prefix)}
  _check_shared(own, source)
  shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(variables).items()}
  table = _table(prefix, with_norm="join_0_norm/scale" in shapes)
  ignore = [rf".*\.{_COUNTER}", r".*\.conv_ks\..*"]
  if not any(path.endswith("halve/kernel") for path in shapes):
    ignore.append(r".*\.str_conv3x3\.weight")  # a file of HEAD, in the rendering of before
  flat = read(own, table, shapes, source=source, ignore=ignore)
  tree: dict[str, Any] = {name: {} for name in variables}
  for path, array in flat.items():
    collection = "batch_stats" if path.startswith(_STATISTICS) else "params"
    tree[collection][path.removeprefix(_STATISTICS)] = array
  return {name: traverse_util.unflatten_dict(leaves, sep="/") for name, leaves in tree.items()}


def write_variables(variables: Mapping[str, Any], *, prefix: str = "") -> Flat:
  """Returns the official flavour's variables as the authors' state dict.

  PyTorch's counters of batches, which batch norm with a fixed momentum never reads, are zero.

  Raises:
    WeightsError: the code has no name for some of them.
  """
  flat = {path: np.asarray(array) for path, array in _flatten(variables).items()}
  published = write(flat, _table(prefix, with_norm="join_0_norm/scale" in flat))
  again = {k.replace(".conv_qs.", ".conv_ks."): a for k, a in published.items() if ".conv_qs." in k}
  counted = [key for key in published if key.endswith(".running_mean")]
  counters = {key.replace("running_mean", _COUNTER): np.zeros((), np.int64) for key in counted}
  return {**published, **again, **counters}


def from_published(
  published: Mapping[str, Array],
  *,
  channels: tuple[int, ...] = (256, 512, 1024, 2048),
  prefix: str = "",
  source: str = "the file",
  **overrides: Any,
) -> tuple[FeaturePyramidTransformer, dict[str, Any]]:
  """Returns the module that a state dict is of, and its variables.

  Args:
    published: the state dict, as numpy arrays.
    channels: of the backbone's maps, from fine to coarse.
    prefix: of the FPT's keys.
    source: the file's name, for messages.
    **overrides: fields of `FeaturePyramidTransformer`, such as `dtype`.

  Raises:
    WeightsError: the file holds no FPT, or it does not fit.
  """
  fields = {**infer_fields(published, prefix=prefix, source=source), **overrides}
  model = FeaturePyramidTransformer(**fields)
  pyramid = [
    jax.ShapeDtypeStruct((1, 2**i, 2**i, c), np.float32)
    for i, c in zip(reversed(range(LEVELS)), channels, strict=True)
  ]
  shapes = jax.eval_shape(model.init, jax.random.key(0), pyramid)
  return model, read_variables(published, shapes, prefix=prefix, source=source)


def _check_shared(published: Mapping[str, Array], source: str) -> None:
  for key, array in published.items():
    twin = published.get(key.replace(".conv_ks.", ".conv_qs."))
    if ".conv_ks." in key and (twin is None or not np.array_equal(array, twin)):
      raise WeightsError(
        f"{source} does not fit the model; {key} is not what conv_qs holds, though the code shares "
        "one convolution between the two"
      )


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  params = traverse_util.flatten_dict(variables["params"], sep="/")
  statistics = traverse_util.flatten_dict(variables.get("batch_stats", {}), sep="/")
  return {**params, **{_STATISTICS + path: leaf for path, leaf in statistics.items()}}
