"""Parts of a model initialised from files: backbones, necks, fixed perceptual networks.

`Task.weight_files` names the files by the part's path: "*/backbone" is the part of that name in
every collection of variables, "params/encoder" a single sub-tree. The reader of a part is
`read(path, shapes) -> arrays`, both by path within the part; systems register further ones
(`System.part_readers`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.registry import registry_of
from vit_jax_zoo.weights import hub, key_map
from vit_jax_zoo.weights.key_map import STATISTICS, Flat, Row

_EVERY = "*/"


def load_parts(
  sources: Mapping[str, str | Mapping[str, Any]], variables: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the variables, arrays or shapes, with pretrained networks read into parts of them.

  The source of a part is a file; or the variables of a network trained with this package that is
  the part, or has a part of that name. Parts that do not exist in `variables` are ignored. Raises
  ValueError if a file is missing or holds another network.
  """
  flat: dict[str, Any] = dict(traverse_util.flatten_dict(dict(variables), sep="/"))
  readers = registry_of("part of a model", "part_readers")
  for part, source in sources.items():
    within = {path: inner for path in flat if (inner := _path_within(path, part)) is not None}
    shapes = {inner: tuple(flat[path].shape) for path, inner in within.items()}
    if not within:
      continue
    if isinstance(source, str):
      logging.info("%s: initialised from %s", part, source)
      found = readers[part](_find(part, source), shapes)
    else:
      found = _part_of(source, part.removeprefix(_EVERY), shapes)
    flat |= {path: np.asarray(found[inner], flat[path].dtype) for path, inner in within.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def find_files(files: Mapping[str, str]) -> dict[str, str]:
  """Returns the local paths of the files by part, after downloading where needed."""
  return {part: _find(part, file) for part, file in files.items()}


def _find(part: str, file: str) -> str:
  try:
    return hub.resolve(file)
  except key_map.WeightsError as error:
    raise key_map.WeightsError(f"{part.removeprefix(_EVERY)}: {error}") from None


def still_needed(files: Mapping[str, str], paths: Iterable[str]) -> dict[str, str]:
  """Returns the files of those parts that any of the variables `paths` belongs to."""
  found = list(paths)
  used = {part for part in files if any(_path_within(path, part) is not None for path in found)}
  return {part: file for part, file in files.items() if part in used}


def _path_within(path: str, part: str) -> str | None:
  if not part.startswith(_EVERY):
    return path.removeprefix(f"{part}/") if path.startswith(f"{part}/") else None
  collection, _, rest = path.partition("/")
  name = part.removeprefix(_EVERY)
  if not rest.startswith(f"{name}/"):
    return None
  within = rest.removeprefix(f"{name}/")
  return within if collection == "params" else f"{collection}/{within}"


def _part_of(network: Mapping[str, Any], part: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns the arrays of a part from a network that contains it, or that is it plus a head.

  A frozen norm's statistics are a trained norm's parameters, and the reverse.
  """
  is_whole = part not in network["params"]
  trees = [network.get(name, {}) for name in ("params", "batch_stats")]
  trees = trees if is_whole else [tree.get(part, {}) for tree in trees]
  own: dict[str, Any] = {}
  for tree in trees:
    own |= traverse_util.flatten_dict(tree, sep="/")
  rows = [Row(path.removeprefix(STATISTICS), path) for path in shapes]
  ignore = (r"head/.*",) if is_whole else ()
  return key_map.read(own, rows, shapes, source=f"the run in {part}_file", ignore=ignore)
