"""Initialises a model from another run's variables, and parts of it from published files.

`Task.weight_files` names the files by the part's path: "*/backbone" is the part of that name in
every collection of variables, "params/encoder" a single sub-tree. The reader of a part is
`read(path, shapes) -> arrays`, both by path within the part; systems register further ones
(`System.part_readers`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.ops.resize import find_grid, resize_position_grid
from vit_jax_zoo.registry import CORE, registry_of, systems
from vit_jax_zoo.weights import hub, key_map
from vit_jax_zoo.weights.key_map import STATISTICS, Flat, Row, stack, unroll, unroll_shapes

_EVERY = "*/"
POSITIONS = ("position_embedding/table", "position_embedding")  # [1 n d], [n d]

Grid: TypeAlias = tuple[int, int]  # height and width, in tokens
Grids: TypeAlias = tuple[Grid | None, Grid | None]  # of the source and the model; None: unknown


def fit_to_model(
  source: Mapping[str, Any],
  variables: Mapping[str, Any],
  name: str,
  *,
  source_grid: Grid | None = None,
  grid: Grid | None = None,
  optional: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns `variables` with every array of `source` that fits.

  A head of another shape, and one on top of a dropped layer, keeps its value from `variables`. A
  learned position table is interpolated to the new grid with aligned corners, as in Google's code.
  Layers are scanned or unrolled as in the model.

  Args:
    source: variables of a run, numpy arrays.
    variables: initial variables of the model to train.
    name: of the source, for the ValueError about missing, unused, misshapen or non-finite arrays.
    source_grid: of the source's position table: 36 rows may be 6 x 6 or 4 x 9.
    grid: of the model's. Without either, tables of equal length are copied, and those to be
      resized are assumed to be square.
    optional: sub-trees, such as "params/discriminator", that one of the two may lack: the model's
      keeps its value, the source's is ignored.
  """
  adapted, problems = dict(variables), list[str]()
  for collection in source.keys() & variables.keys():
    target = traverse_util.flatten_dict(variables[collection], sep="/")
    given = traverse_util.flatten_dict(source[collection], sep="/")
    loose = [part.partition("/")[2] for part in optional if part.startswith(f"{collection}/")]
    shared = target
    for part in loose:
      one, other = ({k for k in x if k.startswith(f"{part}/")} for x in (given, shared))
      if bool(one) != bool(other):
        left = one | other
        given, shared = ({k: v for k, v in x.items() if k not in left} for x in (given, shared))
    taken = dict(_taken(_in_layout_of(given, shared), shared, problems, (source_grid, grid)))
    adapted[collection] = traverse_util.unflatten_dict({**target, **taken}, sep="/")
    if (fresh := sorted(target.keys() - taken.keys())) and not problems:
      logging.info("%s: not loaded, newly initialised: %s", name, ", ".join(fresh))
  if problems:
    raise ValueError(f"{name}: does not fit the model; {key_map.list_problems(problems)}")
  key_map.check_finite({k: tree for k, tree in source.items() if k in variables}, name)
  return adapted


def _in_layout_of(given: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
  """Scans or unrolls layers as in `target`; layers without a match stay as they are."""
  if given.keys() == target.keys():
    return dict(given)
  layers = unroll(given)
  expected = unroll_shapes({path: np.shape(leaf) for path, leaf in target.items()})
  if not expected.keys() <= layers.keys():
    return dict(given)
  return stack(layers, target) | {path: layers[path] for path in layers.keys() - expected.keys()}


def relayout(variables: Mapping[str, Any], *, scan_layers: bool | None) -> dict[str, Any]:
  """Returns a model's variables, numpy arrays, with its layers scanned or unrolled; None: as is."""
  if scan_layers is None:
    return dict(variables)
  leaves: dict[str, Any] = dict(traverse_util.flatten_dict(dict(variables), sep="/"))
  flat = unroll(leaves)
  flat = stack(flat) if scan_layers else flat
  return {**{name: {} for name in variables}, **traverse_util.unflatten_dict(flat, sep="/")}


def _taken(
  given: Mapping[str, Any], target: Mapping[str, Any], problems: list[str], grids: Grids
) -> Iterator[tuple[str, Any]]:
  """Yields the arrays that fit, position tables resized; appends the others to `problems`."""
  heads, below, extra = (
    tuple(path for system in (CORE, *systems().values()) for path in getattr(system, field))
    for field in ("heads", "below_heads", "extra_tokens")
  )
  has_extra = any(path in given for path in extra), any(path in target for path in extra)
  below = tuple(path for path in below if any(key.startswith(path) for key in given))
  dropped_below_head = any(not any(key.startswith(path) for key in target) for path in below)
  for key, leaf in target.items():
    array, is_head = given.get(key), key.startswith(heads)
    if array is None:
      if not is_head:
        problems.append(f"{key} is missing")
    elif is_head and (dropped_below_head or array.shape != leaf.shape):
      continue
    elif key in POSITIONS and (array.ndim, array.shape[-1]) == (leaf.ndim, leaf.shape[-1]):
      rows, table = leaf.shape[-2], array.reshape(1, *array.shape[-2:])
      yield key, _refit(table, rows, grids, has_extra).reshape(leaf.shape)
    elif array.shape == leaf.shape:
      yield key, array
    else:
      problems.append(f"{key} has shape {array.shape}; expected {leaf.shape}")
  unused = (key for key in sorted(given.keys() - target.keys()) if not key.startswith(heads))
  problems += [f"{key} has no place" for key in unused]


def _refit(table: np.ndarray, rows: int, grids: Grids, has_extra: tuple[bool, bool]) -> np.ndarray:
  """Returns a position table [1 n d] resized to `rows`; the rows before the grid's are kept."""
  if table.shape[1] == rows and (None in grids or grids[0] == grids[1]):
    return table
  first, old = _layout(table.shape[1], grids[0], has_extra[0], "the source")
  expected, new = _layout(rows, grids[1], has_extra[1], "the model")
  if first != expected:
    wrong = f"position embeddings: {first} rows before the source's grid; expected {expected}"
    raise ValueError(f"{wrong}. Set the model's fields as in the source")
  resized = resize_position_grid(np.asarray(table[0, first:]), old, new)
  return np.concatenate([table[:, :first], resized[None]], axis=1).astype(table.dtype)


def _layout(rows: int, grid: Grid | None, has_extra: bool, whose: str) -> tuple[int, Grid]:  # noqa: FBT001
  if found := find_grid(rows, (1, 0) if has_extra else (0,), grid):
    return found
  wrong = (
    "which is no square grid, and the grid is unknown; use images of the same size or square ones"
    if grid is None
    else f"expected a grid of {grid[0]} x {grid[1]} tokens; check the image size"
  )
  raise ValueError(f"position embeddings: {whose} has {rows}, {wrong}")


def load_parts(
  sources: Mapping[str, str | Mapping[str, Any]], variables: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the variables, arrays or shapes, with pretrained networks read into parts of them.

  The source of a part is a file, or the variables of a run of a network that is the part, or has
  one of that name. Parts that `variables` lacks are ignored; ValueError for another network.
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
      found = readers[part](find_files({part: source})[part], shapes)
    else:
      found = _part_of(source, part.removeprefix(_EVERY), shapes)
    flat |= {path: np.asarray(found[inner], flat[path].dtype) for path, inner in within.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def find_files(files: Mapping[str, str]) -> dict[str, str]:
  """Returns the local paths of the files by part, after downloading where needed."""
  found = {}
  for part, file in files.items():
    try:
      found[part] = hub.resolve(file)
    except key_map.WeightsError as error:
      raise key_map.WeightsError(f"{part.removeprefix(_EVERY)}: {error}") from None
  return found


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
  """Returns a part's arrays from a network that contains it, or that is it plus a head."""
  is_whole = part not in network["params"]
  trees = [network.get(name, {}) for name in ("params", "batch_stats")]
  trees = trees if is_whole else [tree.get(part, {}) for tree in trees]
  own: dict[str, Any] = {}
  for tree in trees:
    own |= traverse_util.flatten_dict(tree, sep="/")
  # Scale and bias are parameters of a trained norm, and statistics of a frozen one.
  rows = [Row(path.removeprefix(STATISTICS), path) for path in shapes]
  ignore = (r"head/.*",) if is_whole else ()
  return key_map.read(own, rows, shapes, source=f"the run in {part}_file", ignore=ignore)
