"""Sources by name: `kind:location`, and a split.

    demo:digits demo:photos       images that ship with Python packages; always there
    demo:scenes                   digits in front of textures: boxes, masks, stuff
    folder:/path                  a folder for each class
    coco:/path                    images with boxes, masks or segments, as COCO's JSON has them
    segments:/path                images with label maps, a class for every pixel
    pairs:/path                   pictures with references, for super-resolution
    tfds:imagenet2012             a dataset that `vit_jax_zoo.data.prepare` has prepared
    tfds:/path/to/prepared/1.0.0  the same, by its folder; gs://bucket/... works as well

A new kind is one file with an `open_splits(location, **options)` and one line in `KINDS`.
"""

import importlib
import inspect
from typing import Any

from vit_jax_zoo.data.sources.base import Source, select_split
from vit_jax_zoo.errors import unknown_name

KINDS = {
  "demo": "vit_jax_zoo.data.sources.demo",
  "coco": "vit_jax_zoo.data.sources.coco",
  "folder": "vit_jax_zoo.data.sources.folder",
  "pairs": "vit_jax_zoo.data.sources.pairs",
  "segments": "vit_jax_zoo.data.sources.segmentation",
  "tfds": "vit_jax_zoo.data.sources.tfds",
}

SECTION = ("source", "split", "fit_split", "probe", "transforms", "mixed_with", "repeats")
"""What a config's section about data has beside the options of the kind of source."""


def load_source(name: str, split: str, **options: Any) -> Source:
  """Returns the examples of one split.

  Args:
    name: `kind:location`; see the module's docstring.
    split: `train`, `train[:99%]`, `minival`, ...; see `data/base.py`.
    **options: fields of the kind: the arguments of its `open_splits`, such as `data_dir` for tfds.

  Raises:
    ValueError: one line, about an unknown kind, dataset, split or option.
    FileNotFoundError: one line, about data that is not there, and how to get it.

  >>> source = load_source("demo:digits", "test")
  >>> len(source), source.info.num_classes
  (360, 10)
  """
  kind, colon, location = name.partition(":")
  if kind not in KINDS:
    raise ValueError(unknown_name("kind of source", kind, KINDS) + f"; got the source {name!r}")
  if not colon or not location:
    raise ValueError(f"the source {name!r} says nothing after its kind; write {kind}:<which one>")
  open_splits = importlib.import_module(KINDS[kind]).open_splits
  known = list(inspect.signature(open_splits).parameters)[1:]
  for option in options:
    if option not in known:
      raise ValueError(unknown_name(f"option of {kind}:", option, [*known, *SECTION]))
  return select_split(open_splits(location, **options), split, name)
