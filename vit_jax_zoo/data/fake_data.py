"""Fake data for planning: black images with the metadata and shapes of a missing dataset.

`DATASETS` has the numbers of examples and classes, image sizes and keys of the papers' datasets.
Other missing data are assumed to be like a common dataset of their kind, stated in `assumption`.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from vit_jax_zoo.data.sources import base, load_source, split_name
from vit_jax_zoo.data.transforms.detection import objects_example

Size: TypeAlias = tuple[int, int]  # height and width


class Facts(NamedTuple):
  """Metadata of a dataset."""

  kind: str  # of its examples: label, objects, segments (panoptic objects), label_map or pair
  splits: Mapping[str, int]  # number of examples in each
  sizes: Sequence[Size]  # repeated by frequency; examples cycle through them
  num_classes: int | None = None


_COCO_SIZES = (
  *[(480, 640)] * 8, *[(427, 640)] * 6, *[(640, 480)] * 3, *[(640, 427)] * 2, (640, 640),
)  # fmt: skip
"""COCO's longer sides are 640; three in ten images are portraits. Approximate."""

_COCO = {"train": 118_287, "validation": 5_000}

DATASETS: Mapping[str, Facts] = {
  "imagenet2012": Facts("label", {"train": 1_281_167, "validation": 50_000}, [(375, 500)], 1000),
  "imagenet21k": Facts("label", {"train": 14_197_122}, [(375, 500)], 21_843),
  "cifar10": Facts("label", {"train": 50_000, "test": 10_000}, [(32, 32)], 10),
  "cifar100": Facts("label", {"train": 50_000, "test": 10_000}, [(32, 32)], 100),
  "stl10": Facts("label", {"train": 5_000, "test": 8_000}, [(96, 96)], 10),
  "oxford_iiit_pet": Facts("label", {"train": 3_680, "test": 3_669}, [(375, 500)], 37),
  "oxford_flowers102": Facts(
    "label", {"train": 1_020, "validation": 1_020, "test": 6_149}, [(500, 667)], 102
  ),
  "coco/2017": Facts("objects", _COCO, _COCO_SIZES, 91),
  "coco/2017_panoptic": Facts("objects", _COCO, _COCO_SIZES, 201),
  "cityscapes": Facts("label_map", {"train": 2_975, "val": 500}, [(1024, 2048)], 19),
  "ADEChallengeData2016": Facts(
    "label_map", {"train": 20_210, "val": 2_000}, [(512, 683), (683, 512)], 150
  ),
  "VOC2012": Facts("label_map", {"train": 1_464, "val": 1_449}, [(375, 500), (500, 375)], 21),
  "lip": Facts("label_map", {"train": 30_462, "val": 10_000}, [(450, 300), (300, 450)], 20),
  "CUFED": Facts("pair", {"train": 11_871, "test": 126}, [(160, 160)]),
}
"""By name in TFDS or of the published folder. From the datasets' pages."""

_PHOTOS = Facts("pair", {"train": 10_000, "test": 100}, [(768, 1024)])
_COMMON = {
  **dict.fromkeys(("csv", "folder", "hf", "tfds", "wds"), "imagenet2012"),
  "coco": "coco/2017",
  "pairs": "photographs of 1024x768",
  **dict.fromkeys(("segmentation", "segments"), "ADEChallengeData2016"),
}
"""Dataset by the kind of source; without one, missing data are an error."""


def load(name: str, split: str, **options: Any) -> base.Source:
  """Returns the source of `load_source`, whose arguments it takes, or a fake one.

  `DATASETS` are always fake, so that a plan is the same on every machine; demos never are. Fake
  data have the option `panoptic` and ignore others. ValueError for an unknown kind, demo or split.
  """
  kind, location = split_name(name)
  folder = location.partition(":")[0]  # or TFDS's name, with or without version
  facts = DATASETS.get(folder) or DATASETS.get(folder.rstrip("/").rpartition("/")[2])
  assumption = ""
  if facts is None:
    try:
      return load_source(name, split, **options)
    except FileNotFoundError:
      if kind not in _COMMON:
        raise
      assumption = f"{name} not found: assumed to be like {_COMMON[kind]}"
      facts = DATASETS.get(_COMMON[kind], _PHOTOS)
  if facts.kind == "objects" and options.get("panoptic"):
    facts = facts._replace(kind="segments")
  opened: dict[str, Callable[[], base.Source]] = {
    part: functools.partial(FakeSource, f"{name} {part}", facts, count, assumption)
    for part, count in facts.splits.items()
  }
  if "test" not in opened:
    opened["test"] = next(reversed(opened.values()))
  return base.select_split(base.name_validation(opened), split, name)


class FakeSource(base.Source):
  """Black images, with one object as large as the image."""

  def __init__(self, name: str, facts: Facts, count: int, assumption: str) -> None:
    self.info = base.DatasetInfo(name, count, facts.num_classes)
    self.assumption, self._facts = assumption, facts

  def __getitem__(self, index: int) -> base.Example:
    size = height, width = self.image_size(index)
    image = _picture(size)
    if self._facts.kind == "label":
      return {"image": image, "label": 0}
    if self._facts.kind == "label_map":
      return {"image": image, "label_map": _picture(size, 1), "image_id": index}
    if self._facts.kind == "pair":
      return {"image": image, "reference": image}
    box, area = [[0, 0, width, height]], [height * width]
    example = objects_example(image, index, box, [1], is_crowd=[False], area=area, ids=[1])
    if self._facts.kind == "segments":
      return {**example, "segment_image": _picture(size, (1, 0, 0))}
    return {**example, "outlines": [[[0, 0, width, 0, width, height, 0, height]]]}

  def example_name(self, index: int) -> str:
    return f"{super().example_name(index)}, fake"

  def image_size(self, index: int) -> Size:
    return self._facts.sizes[index % len(self._facts.sizes)]


@functools.lru_cache(maxsize=32)
def _picture(size: Size, color: int | tuple[int, int, int] = (0, 0, 0)) -> bytes:
  file = io.BytesIO()
  shape = size if isinstance(color, int) else (*size, 3)
  Image.fromarray(np.full(shape, color, np.uint8)).save(file, "PNG")
  return file.getvalue()
