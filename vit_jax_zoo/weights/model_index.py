"""Index of published checkpoints: name -> URLs, reported score, source.

Scores are the publishers', ImageNet-1k top-1 unless stated otherwise; none was measured here. Each
system names its own in `System.published`.
"""

import dataclasses
import functools
from collections.abc import Mapping

from vit_jax_zoo.registry import load_from_each


@dataclasses.dataclass(frozen=True)
class Entry:
  """A published checkpoint."""

  model: str  # the registry's name of its architecture; "" of a part of a model
  urls: tuple[str, ...] = ()  # of its files; the first is read, the others are stored beside it
  hub: str = ""  # "owner/name" on the Hugging Face hub, instead of `urls`
  sha256: str = ""  # of the first file, or its prefix, if published
  score: str = "–"  # reported score, with the image size
  source: str = "–"  # of the score


@functools.cache
def entries() -> Mapping[str, Entry]:
  """Returns the published checkpoints of all systems, by the name that `load_pretrained` takes."""
  return {name: entry for table in load_from_each("published") for name, entry in table.items()}


def paper_scores() -> Mapping[str, tuple[str, str]]:
  """Returns the best reported score of each architecture, and its source, by model name."""
  return {name: row for table in load_from_each("paper_scores") for name, row in table.items()}
