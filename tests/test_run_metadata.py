"""Dataset fingerprints, which processes compare."""

import dataclasses
import re

from vit_jax_zoo.data.sources.base import DatasetInfo, Source
from vit_jax_zoo.run_metadata import fingerprint


@dataclasses.dataclass
class Named(Source):
  info: DatasetInfo
  odd: str
  size: int = 3

  def __getitem__(self, index):
    if self.size < 0:
      raise FileNotFoundError
    return {"image": bytes(self.size), "image_id": index}

  def example_name(self, index):
    return self.odd if index == 49_998 else str(index)


def files_of(odd, annotations=""):
  info = DatasetInfo("a", 50_000, annotations=annotations)
  return re.search(r"files (\w+)", fingerprint(Named(info, odd)))[1]


def test_fingerprint_depends_on_files_and_annotations():
  assert len({files_of("x"), files_of("y"), files_of("x", "1"), files_of("\udce9")}) == 4
  assert files_of("x") == files_of("x")


def test_file_sizes_change_fingerprint():
  info = DatasetInfo("a", 5)
  assert len({fingerprint(Named(info, "x", size)) for size in (3, 4, -1)}) == 3
