"""Datasets of the transfer suites: TFDS names and splits.

VTAB: Zhai et al., arXiv:1910.04867, with the splits of google-research/task_adaptation; few-shot:
big_vision's; variants of ImageNet: ReaL (arXiv:2006.07159), V2 (arXiv:1902.10811), -A
(arXiv:1907.07174), -R (arXiv:2006.16241).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

NATURAL, SPECIALIZED, STRUCTURED = "natural", "specialized", "structured"

VTAB_TRAIN, VTAB_VALIDATION = 800, 200
"""VTAB-1k trains on the first 800 images of a task's training split, selects hyperparameters on the
first 200 of its validation split, and retrains on both for the test."""


@dataclasses.dataclass(frozen=True)
class VtabTask:
  """One of VTAB's 19 tasks."""

  group: str
  source: str
  train: str
  validation: str
  test: str = "test"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _task(group: str, name: str, splits: tuple[str, str, str], **options: Any) -> VtabTask:
  return VtabTask(group, f"tfds:{name}", *splits, options)


_OWN = ("train", "validation", "test")
_CLEVR = ("train[:90%]", "train[90%:]", "validation")  # test images have no annotations
_NORB = {"splits": ("train", "test[:50%]", "test[50%:]"), "image_key": "image"}


def _held_out(percent: int) -> tuple[str, str, str]:
  return f"train[:{percent}%]", f"train[{percent}%:]", "test"


def _cut(end: int, test: int) -> tuple[str, str, str]:
  return f"train[:{end}%]", f"train[{end}%:{test}%]", f"train[{test}%:]"


_RETINOPATHY = "diabetic_retinopathy_detection/btgraham-300"

VTAB = {
  "caltech101": _task(NATURAL, "caltech101", _held_out(90)),
  "cifar100": _task(NATURAL, "cifar100", _held_out(90)),
  "dtd": _task(NATURAL, "dtd", _OWN),
  "oxford_flowers102": _task(NATURAL, "oxford_flowers102", _OWN),
  "oxford_iiit_pet": _task(NATURAL, "oxford_iiit_pet", _held_out(80)),
  "sun397": _task(NATURAL, "sun397/tfds", _OWN),
  "svhn": _task(NATURAL, "svhn_cropped", _held_out(90)),
  "patch_camelyon": _task(SPECIALIZED, "patch_camelyon", _OWN),
  "eurosat": _task(SPECIALIZED, "eurosat/rgb", _cut(60, 80)),
  "resisc45": _task(SPECIALIZED, "resisc45", _cut(60, 80)),
  "diabetic_retinopathy": _task(SPECIALIZED, _RETINOPATHY, _OWN),
  "clevr_count": _task(STRUCTURED, "clevr", _CLEVR, derived_labels="clevr_count"),
  "clevr_distance": _task(STRUCTURED, "clevr", _CLEVR, derived_labels="clevr_distance"),
  "dmlab": _task(STRUCTURED, "dmlab", _OWN),
  **{
    f"dsprites_{rule}": _task(
      STRUCTURED, "dsprites", _cut(80, 90), derived_labels=f"dsprites_{rule}"
    )
    for rule in ("x_position", "orientation")
  },
  "kitti_distance": _task(STRUCTURED, "kitti", _OWN, derived_labels="kitti_distance"),
  "smallnorb_azimuth": _task(STRUCTURED, "smallnorb", **_NORB, label_key="label_azimuth"),
  "smallnorb_elevation": _task(STRUCTURED, "smallnorb", **_NORB, label_key="label_elevation"),
}


@dataclasses.dataclass(frozen=True)
class ProbeData:
  """Training and test split of a probe's dataset."""

  source: str
  fit: str = "train"
  test: str = "test"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FEW_SHOT = {
  "caltech101": ProbeData("tfds:caltech101"),
  "cars196": ProbeData("tfds:cars196"),
  "cifar100": ProbeData("tfds:cifar100"),
  "dtd": ProbeData("tfds:dtd"),
  "oxford_iiit_pet": ProbeData("tfds:oxford_iiit_pet"),
  "uc_merced": ProbeData("tfds:uc_merced", "train[:1000]", "train[1000:]"),
  "imagenet2012": ProbeData("tfds:imagenet2012", "train[:65000]", "validation"),
}
"""Datasets of big_vision's few-shot evaluation; of ImageNet the first 65,000 training images."""

PROBED = {
  "cifar10": ProbeData("tfds:cifar10"),
  "cifar100": ProbeData("tfds:cifar100"),
  "stl10": ProbeData("tfds:stl10"),
  "imagenet2012": ProbeData("tfds:imagenet2012", "train", "validation"),
}
"""Datasets of linear probes (iGPT's table 1), and of k nearest neighbours."""


@dataclasses.dataclass(frozen=True)
class ImageNetVariant:
  """Images for a classifier of ImageNet's 1000 classes."""

  source: str  # as in `data/sources`
  split: str = "test"  # that is scored
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the source
  only_its_classes: bool = False  # ranks only the classes that occur in the dataset
  num_its_classes: int | None = None  # number of these classes in the published dataset


IMAGENET = {
  "imagenet": ImageNetVariant("tfds:imagenet2012", "validation"),
  "real": ImageNetVariant("tfds:imagenet2012_real", "validation", {"label_key": "real_label"}),
  "v2": ImageNetVariant("tfds:imagenet_v2/matched-frequency"),
  "a": ImageNetVariant("tfds:imagenet_a", only_its_classes=True, num_its_classes=200),
  "r": ImageNetVariant("tfds:imagenet_r", only_its_classes=True, num_its_classes=200),
}
