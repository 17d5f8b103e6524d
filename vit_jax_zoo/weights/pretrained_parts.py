"""Parts of a model that start as what others have trained: backbones, necks, fixed critics."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from vit_jax_zoo.systems.fpt import weights_official as fpt_pt
from vit_jax_zoo.systems.rcnn import weights_backbones as backbones
from vit_jax_zoo.systems.ttsr.weights_vgg import find_vgg, load_vgg
from vit_jax_zoo.weights import hub
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.key_map import STATISTICS, Flat, Row

_READERS: Mapping[str, Callable[[str, Mapping[str, tuple[int, ...]]], Flat]] = {
  "backbone": backbones.read_backbone,
  "neck": fpt_pt.read_neck,
}
"""By the part's name: from a file and our shapes to arrays, both by path."""


def load_parts(
  sources: Mapping[str, str | Mapping[str, Any]], variables: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads networks that others have trained into parts of the variables.

  Args:
    sources: by the part's path. Of "vgg", or "params/generator/extractor", a file with
      torchvision's VGG-19. "*/backbone" is the part of that name in every collection: a file that
      `backbones` knows, or the variables of a network of ours that is one (a classifier), or has
      one. "*/neck" likewise: a file that `fpt_pt` knows, or a network's variables.
    variables: as arrays, or as their shapes.

  Returns:
    Variables of the same structure; parts that are not there are passed over.

  Raises:
    ValueError: a file is missing, or another's; or the part of a network is.
  """
  if not sources:
    return dict(variables)
  flat = traverse_util.flatten_dict(dict(variables), sep="/")
  for part, source in sources.items():
    load = _load_everywhere if part.startswith("*/") else _load_vgg
    flat |= load(source, flat, part.removeprefix("*/"))
  return traverse_util.unflatten_dict(flat, sep="/")


def find_files(files: Mapping[str, str]) -> dict[str, str]:
  """Returns where the files are, by the part's path as in `load_parts`; downloads what is named so.

  Raises:
    WeightsError: one line, about a file that is not there.
  """
  return {k: (hub.resolve if k.startswith("*/") else find_vgg)(f) for k, f in files.items()}


def still_needed(files: Mapping[str, str], paths: Iterable[str]) -> dict[str, str]:
  """Returns those files, by the part's path, of whose parts any variable is among the paths."""
  found = list(paths)

  def is_below(path: str, part: str) -> bool:
    if part.startswith("*/"):
      path, part = path.partition("/")[2], part.removeprefix("*/")
    return path.startswith(f"{part}/")

  return {k: file for k, file in files.items() if any(is_below(path, k) for path in found)}


def _load_vgg(file: Any, flat: Mapping[str, Any], part: str) -> dict[str, Any]:
  inside = {k: leaf for k, leaf in flat.items() if k.startswith(f"{part}/")}
  if not inside:
    return {}
  shapes = traverse_util.unflatten_dict(
    {k.removeprefix(f"{part}/"): leaf for k, leaf in inside.items()}, sep="/"
  )
  logging.info("%s starts as %s", part, file)
  found = traverse_util.flatten_dict(load_vgg(file, shapes), sep="/")
  return {f"{part}/{k}": array for k, array in found.items()}


def _load_everywhere(source: Any, flat: Mapping[str, Any], part: str) -> dict[str, Any]:
  """Returns the arrays of a part that stands in every collection."""
  paths = {
    path: path.replace(f"/{part}/", "/", 1).removeprefix("params/")
    for path in flat
    if path.partition("/")[2].startswith(f"{part}/")
  }
  if not paths:
    return {}
  shapes = {name: tuple(flat[path].shape) for path, name in paths.items()}
  if isinstance(source, str):
    logging.info("%s starts as %s", part, source)
    found = _READERS[part](hub.resolve(source), shapes)
  else:
    found = _part_of(source, part, shapes)
  return {path: np.asarray(found[name], flat[path].dtype) for path, name in paths.items()}


def _part_of(
  variables: Mapping[str, Any], part: str, shapes: Mapping[str, tuple[int, ...]]
) -> Flat:
  """Returns a part's arrays out of a network of ours that has it, or is it but for its head.

  What a frozen norm keeps among its statistics, a trained one has learned, and the reverse.
  """
  is_whole = part not in variables["params"]
  own: Flat = {}
  for name in ("params", "batch_stats"):
    tree = variables.get(name, {})
    own |= traverse_util.flatten_dict(tree if is_whole else tree.get(part, {}), sep="/")
  rows = [Row(path.removeprefix(STATISTICS), path) for path in shapes]
  ignore = (r"head/.*",) if is_whole else ()
  return table.read(own, rows, shapes, source=f"the run that {part}_file names", ignore=ignore)
