"""Datasets of the transfer suites: TFDS names and splits.

VTAB: Zhai et al., arXiv:1910.04867, with the splits of google-research/task_adaptation; few-shot:
big_vision's; variants of ImageNet: ReaL (arXiv:2006.07159), V2 (arXiv:1902.10811), -A
(arXiv:1907.07174), -R (arXiv:2006.16241).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

NATURAL, SPECIALIZED, STRUCTURED = "natural", "specialized", "structured"
GROUPS = (NATURAL, SPECIALIZED, STRUCTURED)

VTAB_TRAIN, VTAB_VALIDATION = 800, 200
"""VTAB-1k trains on the first 800 images of a task's training split, selects hyperparameters on the
first 200 of its validation split, and retrains on both for the test."""


@dataclasses.dataclass(frozen=True)
class VtabTask:
  """One of VTAB's 19 tasks.

  Attributes:
    group: "natural", "specialized" or "structured".
    source: as in `data/sources`.
    train: split whose first 800 images are used for training.
    validation: split whose first 200 images are used for selection.
    test: split that is scored.
    options: of the source.
  """

  group: str
  source: str
  train: str
  validation: str
  test: str = "test"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _own_validation(group: str, name: str, **options: Any) -> VtabTask:
  return VtabTask(group, f"tfds:{name}", "train", "validation", options=options)


def _part_of_train(group: str, name: str, percent: int, **options: Any) -> VtabTask:
  """The validation split is the end of the training split."""
  train, validation = f"train[:{percent}%]", f"train[{percent}%:]"
  return VtabTask(group, f"tfds:{name}", train, validation, options=options)


def _all_in_train(
  group: str, name: str, percent: int, test_percent: int, **options: Any
) -> VtabTask:
  """Cuts the only split into three."""
  return VtabTask(
    group,
    f"tfds:{name}",
    f"train[:{percent}%]",
    f"train[{percent}%:{test_percent}%]",
    f"train[{test_percent}%:]",
    options,
  )


def _clevr(rule: str) -> VtabTask:
  """Tests on CLEVR's validation images: its test images have no annotations."""
  options = {"label_rule": rule}
  return VtabTask(
    STRUCTURED, "tfds:clevr", "train[:90%]", "train[90%:]", "validation", options=options
  )


def _small_norb(label: str) -> VtabTask:
  """Uses half of the test images for validation, the other half for the test."""
  options = {"image_key": "image", "label_key": label}
  splits = ("train", "test[:50%]", "test[50%:]")
  return VtabTask(STRUCTURED, "tfds:smallnorb", *splits, options=options)


_RETINOPATHY = "diabetic_retinopathy_detection/btgraham-300"

VTAB = {
  "caltech101": _part_of_train(NATURAL, "caltech101", 90),
  "cifar100": _part_of_train(NATURAL, "cifar100", 90),
  "dtd": _own_validation(NATURAL, "dtd"),
  "oxford_flowers102": _own_validation(NATURAL, "oxford_flowers102"),
  "oxford_iiit_pet": _part_of_train(NATURAL, "oxford_iiit_pet", 80),
  "sun397": _own_validation(NATURAL, "sun397/tfds"),
  "svhn": _part_of_train(NATURAL, "svhn_cropped", 90),
  "patch_camelyon": _own_validation(SPECIALIZED, "patch_camelyon"),
  "eurosat": _all_in_train(SPECIALIZED, "eurosat/rgb", 60, 80),
  "resisc45": _all_in_train(SPECIALIZED, "resisc45", 60, 80),
  "diabetic_retinopathy": _own_validation(SPECIALIZED, _RETINOPATHY),
  "clevr_count": _clevr("clevr_count"),
  "clevr_distance": _clevr("clevr_distance"),
  "dmlab": _own_validation(STRUCTURED, "dmlab"),
  "dsprites_x_position": _all_in_train(
    STRUCTURED, "dsprites", 80, 90, label_rule="dsprites_x_position"
  ),
  "dsprites_orientation": _all_in_train(
    STRUCTURED, "dsprites", 80, 90, label_rule="dsprites_orientation"
  ),
  "kitti_distance": _own_validation(STRUCTURED, "kitti", label_rule="kitti_distance"),
  "smallnorb_azimuth": _small_norb("label_azimuth"),
  "smallnorb_elevation": _small_norb("label_elevation"),
}


@dataclasses.dataclass(frozen=True)
class ProbeData:
  """Training and test images of a probe.

  Attributes:
    source: as in `data/sources`.
    fit: training split.
    test: test split.
    options: of the source.
  """

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
  """Images for a classifier of ImageNet's 1000 classes.

  Attributes:
    source: as in `data/sources`.
    split: that is scored.
    options: of the source.
    only_its_classes: ranks only the classes that occur in the dataset.
    num_its_classes: number of these classes in the published dataset.
  """

  source: str
  split: str = "test"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  only_its_classes: bool = False
  num_its_classes: int | None = None


IMAGENET = {
  "imagenet": ImageNetVariant("tfds:imagenet2012", "validation"),
  "real": ImageNetVariant("tfds:imagenet2012_real", "validation", {"label_key": "real_label"}),
  "v2": ImageNetVariant("tfds:imagenet_v2/matched-frequency"),
  "a": ImageNetVariant("tfds:imagenet_a", only_its_classes=True, num_its_classes=200),
  "r": ImageNetVariant("tfds:imagenet_r", only_its_classes=True, num_its_classes=200),
}
