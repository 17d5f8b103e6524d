"""Sources of examples by name: `kind:location`, and a split; docs/guides/data.md lists the kinds.

A kind is a module with `open_splits(location, **options)`.
"""

import glob
import inspect
import os
from typing import Any

from vit_jax_zoo.data.sources.base import Source, select_split
from vit_jax_zoo.errors import check_names, unknown_name
from vit_jax_zoo.registry import Registry

_MODULES = {k: k for k in ("coco", "demo", "folder", "hf", "pairs", "segmentation", "tfds", "wds")}
_MODULES |= {"csv": "csv_file", "segments": "segmentation"}  # segments: its old name
KINDS = Registry("kind of source", {k: f"{__name__}.{m}:open_splits" for k, m in _MODULES.items()})

SECTION = (
  "source", "split", "fit_split", "probe", "metrics", "transforms", "extra_sources", "aug_repeats",
)  # fmt: skip
"""Fields of `data.train` and `data.eval.<name>` that are not options of the source."""


def load_source(name: str, split: str, **options: Any) -> Source:
  """Returns the examples of one split, such as `train[:99%]`; see `data/sources/base.py`.

  Options are those of the kind's `open_splits`. ValueError for unknown names; FileNotFoundError for
  missing data, with a way to get it.

  >>> source = load_source("demo:digits", "test")
  >>> len(source), source.info.num_classes
  (360, 10)
  """
  kind, location = split_name(name)
  open_splits = KINDS[kind]
  known = list(inspect.signature(open_splits).parameters)[1:]
  if not set(options) <= set(known):
    check_names(f"option of {kind}:", options, [*known, *SECTION])
  return select_split(open_splits(location, **options), split, name)


def split_name(name: str) -> tuple[str, str]:
  """Returns the kind and the location of a source's name; ValueError unless it has both."""
  kind, _, location = name.partition(":")
  if kind not in KINDS:
    path = os.path.expanduser(name)
    if (os.sep in name and ":" not in name) or os.path.exists(path):
      annotated = glob.glob(os.path.join(glob.escape(path), "annotations", "*.json"))
      kind = "coco" if annotated else "folder"
      raise ValueError(f"source {name!r} is a path without a kind; did you mean {kind}:{name}?")
    raise ValueError(unknown_name("kind of source", kind, KINDS) + f"; got the source {name!r}")
  if not location:
    raise ValueError(f"source {name!r} has no location; expected {kind}:<location>")
  return kind, location
