"""Key tables: published keys to parameter paths and back.

A table is a tuple of rows `(published key, our path, transform)`, with numbers in braces:
"blocks.{i}.norm1.weight" <-> "encoder/block_{i}/attention_norm/scale". Reading uses, for each
parameter, the first row that matches its path and whose key the file has, so that several rows for
one path are alternative published names; writing uses the first row of each path.

Tables contain unrolled layers only (`block_0/...`); `unroll` and `stack` convert from and to
scanned layers (`blocks/...`, with a leading axis; of a ResNet's stage the units after the first,
`stage_0_units/...`); `System.scanned_layers` are named without the plural.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.registry import systems

Array = np.ndarray
Flat = dict[str, Array]

STATISTICS = "batch_stats/"  # path prefix of running statistics
_MAX_NAMED = 3  # arrays or problems named in an error about many


@dataclasses.dataclass(frozen=True)
class Transform:
  """A change of layout and its inverse, bit for bit."""

  read: Callable[[Array, tuple[int, ...]], Array]  # (published array, our shape) -> our array
  write: Callable[[Array], Array]  # our array -> published array


def _drop_unit_axes(array: Array, shape: tuple[int, ...]) -> Array:
  # Only axes of size 1 may be removed: any other reshape would hide a wrong file.
  return array.reshape(shape) if array.shape[-len(shape) :] == shape else array


KEEP = Transform(lambda array, _: array, lambda array: array)
CHANNELS_4D = Transform(_drop_unit_axes, lambda array: array.reshape(1, 1, 1, -1))
"""[1 1 1 c] in the file, or [c] when reading."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table."""

  published: str  # pattern of the key in the file; "{s+1}" where the file counts from 1
  ours: str  # pattern of the "/"-joined path below `params`, layers unrolled
  transform: Transform = KEEP

  def key(self, path: str) -> str | None:
    """Returns the published key of a path, None if the row does not match."""
    return _translate(path, self.ours, self.published)

  def path(self, key: str) -> str | None:
    """Returns the path of a published key, None if the row does not match."""
    return _translate(key, self.published, self.ours)


_SLOT = re.compile(r"\{(\w+)(\+1)?\}")


def _translate(name: str, source: str, target: str) -> str | None:
  if (match := _pattern(source).fullmatch(name)) is None:
    return None
  offsets = {slot[1]: int(bool(slot[2])) for slot in _SLOT.finditer(source)}
  return _SLOT.sub(lambda s: str(int(match[s[1]]) - offsets[s[1]] + bool(s[2])), target)


@functools.lru_cache(4096)
def _pattern(form: str) -> re.Pattern[str]:
  pattern, end = "", 0
  for slot in _SLOT.finditer(form):
    is_repeated = f"(?P<{slot[1]}>" in pattern
    pattern += re.escape(form[end : slot.start()])
    pattern += f"(?P={slot[1]})" if is_repeated else f"(?P<{slot[1]}>\\d+)"
    end = slot.end()
  return re.compile(pattern + re.escape(form[end:]))


class WeightsError(ValueError):
  """A file does not fit the model. The message lists the first problems."""


def read(
  published: Mapping[str, Array],
  table: Sequence[Row],
  shapes: Mapping[str, tuple[int, ...]],
  *,
  source: str,
  ignore: Iterable[str] = (),
) -> Flat:
  """Returns the model's parameters from a file's arrays; WeightsError lists what does not fit.

  `shapes` are those of the parameters by path, layers unrolled; `source` is the file's name, for
  errors; `ignore` has regular expressions of keys that may stay unused.
  """
  found: Flat = {}
  used, problems = set(), []
  for path, shape in shapes.items():
    candidates = [(key, row) for row in table if (key := row.key(path)) is not None]
    present = next(((key, row) for key, row in candidates if key in published), None)
    if present is None:
      names = " or ".join(key for key, _ in candidates) or "no published name"
      problems.append(f"missing: {path} {shape} ({names})")
      continue
    key, row = present
    used.add(key)
    if published[key].dtype.kind in "biu":
      problems.append(f"no floating-point numbers: {key} is {published[key].dtype}")
    found[path] = row.transform.read(published[key], shape)
    if found[path].shape != shape:
      problems.append(f"wrong shape: {key} is {published[key].shape}, {path} needs {shape}")
  for key in published:
    if key not in used and not any(re.fullmatch(pattern, key) for pattern in ignore):
      problems.append(f"unused: {key} {published[key].shape}")
  if shapes and not used:
    theirs, ours = (", ".join(sorted(names)[:3]) for names in (published, shapes))
    wrong = f"{source}: no array fits the model; its keys are such as {theirs}"
    raise WeightsError(f"{wrong}; expected such as {ours}. Use a model of its kind or another file")
  if problems:
    raise WeightsError(f"{source}: does not fit the model; {list_problems(problems)}")
  check_finite({key: array for key, array in published.items() if key in used}, source)
  return found


def list_problems(problems: Sequence[str]) -> str:
  """Returns the first problems, for an error message of one line; logs all at `-v=1`."""
  for problem in problems:
    logging.debug("%s", problem)
  more = len(problems) - _MAX_NAMED
  rest = [f"and {more} more problems (-v=1 lists all)"] if more > 0 else []
  return "; ".join([*problems[:_MAX_NAMED], *rest])


def check_finite(arrays: Mapping[str, Any], source: str) -> None:
  """Checks that weights, arrays by key or a tree of them, are finite."""
  flat: dict[str, Any] = dict(traverse_util.flatten_dict(dict(arrays), sep="/"))
  if broken := [key for key, array in flat.items() if not _is_finite(array)]:
    first = ", ".join(broken[:_MAX_NAMED])
    more = len(broken) - _MAX_NAMED
    raise WeightsError(
      f"{source} holds NaN or infinity in {first}{f' and {more} more arrays' if more > 0 else ''}: "
      "it is damaged, or its training diverged; download it again, or use other weights"
    )


def _is_finite(array: Array) -> bool:
  if array.dtype.kind in "biuSU":
    return True
  # NaN and infinity persist in a sum, which needs one pass and no memory. The sum of finite numbers
  # may overflow, so a second pass decides.
  with np.errstate(all="ignore"):
    return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def write(parameters: Mapping[str, Array], table: Sequence[Row]) -> Flat:
  """Returns the parameters (by path, layers unrolled) by published key."""
  rows = {path: next((r for r in table if r.key(path)), None) for path in parameters}
  if nameless := [path for path, row in rows.items() if row is None]:
    raise WeightsError(f"{', '.join(nameless)}: no name in this format; expected other parameters")
  arrays = ((row, path, np.asarray(parameters[path])) for path, row in rows.items() if row)
  return {row.key(path) or "": row.transform.write(array) for row, path, array in arrays}


@functools.cache
def _layer_patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
  own = [name for system in systems().values() for name in system.scanned_layers]
  scanned = "|".join((r"block(?=s)", r"stage_\d+_unit(?=s)", *own))
  unrolled = "|".join((r"block", r"stage_\d+_unit", *own))
  return re.compile(rf"(.*/)?({scanned})s?/(.*)"), re.compile(rf"(.*/)?({unrolled})_(\d+)/(.*)")


def _scanned(path: str) -> tuple[str, int] | None:
  """Returns an unrolled layer's path in scanned form, and its number; None: not of a layer."""
  match = _layer_patterns()[1].fullmatch(path)
  if match is None or int(match[3]) < match[2].startswith("stage_"):
    return None
  plural = "s" if match[2].endswith(("block", "unit")) else ""
  return f"{match[1] or ''}{match[2]}{plural}/{match[4]}", int(match[3])


def unroll(parameters: Mapping[str, Array]) -> Flat:
  """Splits scanned layers, `blocks/x` [depth ...], into `block_0/x`, `block_1/x`, ..."""
  flat: Flat = {}
  for path, array in parameters.items():
    if (match := _layer_patterns()[0].fullmatch(path)) is None:
      flat[path] = array
    else:
      head, name, rest = match.groups(default="")
      layers = enumerate(array, start=name.startswith("stage_"))
      flat |= {f"{head}{name}_{i}/{rest}": layer for i, layer in layers}
  return flat


def unroll_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """`unroll` for shapes."""
  placeholders = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
  return {path: array.shape for path, array in unroll(placeholders).items()}


def stack(parameters: Mapping[str, Array], paths: Iterable[str] | None = None) -> Flat:
  """Stacks unrolled layers as the `paths` of a model need them (None: all), unlike `unroll`."""
  if paths is None:
    paths = dict.fromkeys((_scanned(path) or (path,))[0] for path in parameters)
  layers: dict[str, dict[int, Array]] = {}
  for path, array in parameters.items():
    if scanned := _scanned(path):
      layers.setdefault(scanned[0], {})[scanned[1]] = array
  stacked = {path: [of[i] for i in sorted(of)] for path, of in layers.items()}
  return {p: np.stack(stacked[p]) if p in stacked else parameters[p] for p in paths}
