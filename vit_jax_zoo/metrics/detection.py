"""COCO's average precision and recall of boxes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vit_jax_zoo.metrics.base import Evaluator

_NAMES = (
  "box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium", "box_ap_large",
  "box_ar1", "box_ar10", "box_ar100", "box_ar_small", "box_ar_medium", "box_ar_large",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Image:
  """Ground truth and detections of an image; boxes are left, top, width, height in pixels."""

  image_id: int | None
  size: tuple[int, int]
  boxes_xywh: Float[np.ndarray, "t 4"]
  labels: Int[np.ndarray, " t"]
  is_crowd: Bool[np.ndarray, " t"]
  areas: Float[np.ndarray, " t"]
  found_xywh: Float[np.ndarray, "q 4"]
  found_labels: Int[np.ndarray, " q"]
  scores: Float[np.ndarray, " q"]


class DetectionEvaluator(Evaluator):
  """Scores detections with faster-coco-eval.

  Scores, in [0, 1]: "box_ap" (mean over IoU thresholds 0.5 to 0.95 and classes), "box_ap50",
  "box_ap75"; "box_ap_small", "..._medium", "..._large" (below 32^2, below 96^2, above, in pixels of
  the original image); "box_ar1", "box_ar10", "box_ar100" (recall at 1, 10, 100 detections per
  image) and by size; with `per_class` also "box_ap/<class>"; "images". Scores without any ground
  truth (such as no large object) are left out, as are classes without any. The 100 highest-scoring
  detections of an image count.

  Args:
    num_classes: highest class id + 1.
    class_names: names by class id; default: the ids.
    per_class: also returns each class's AP.
  """

  scores = (*_NAMES, "images")

  def __init__(
    self, num_classes: int, *, class_names: Sequence[str] = (), per_class: bool = False
  ) -> None:
    self.num_classes = num_classes
    self.class_names = tuple(class_names)
    self.per_class = per_class
    self.images: list[_Image] = []

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Adds one batch.

    Args:
      batch: `boxes_cxcywh` [b t 4], relative to the image without padding, `labels` [b t],
        `is_target` [b t]; `original_size` [b 2], height and width in pixels, else `image_size`,
        else the images' shape; optional `is_crowd` [b t] (detections in crowds are ignored), `area`
        [b t] of the object's mask in pixels (default: its box's), `image_id` [b] (duplicates count
        once), `mask` [b].
      predictions: `boxes_xyxy` [b q 4] in pixels of the same size, `labels` [b q], `scores` [b q].

    Raises:
      ValueError: an unknown label.
    """
    rows = len(batch["image"])
    keep = np.asarray(batch.get("mask", np.ones(rows)), bool)
    sizes = self._sizes(batch)
    for row in np.flatnonzero(keep):
      truth = {k: np.asarray(batch[k][row]) for k in _truth_keys(batch)}
      found = {k: np.asarray(predictions[k][row]) for k in ("boxes_xyxy", "labels", "scores")}
      self.images.append(self._image(truth, found, sizes[row]))

  def _merge(self, other: Any) -> None:
    self.images += other.images

  def result(self) -> dict[str, float]:
    """Returns the scores by name."""
    images = self._unique()
    if not any(len(image.labels) for image in images):
      raise ValueError(
        f"boxes_cxcywh: no ground truth in {len(images)} images; expected annotations in the "
        "evaluation split"
      )
    # Here, so that training does not load it.
    from faster_coco_eval import COCO, COCOeval_faster

    truth, found = _as_coco(images, self.num_classes)
    truth = COCO(truth)
    # loadRes refuses an empty list.
    found = truth.loadRes(found) if found else COCO({**truth.dataset, "annotations": []})
    run = COCOeval_faster(truth, found, iouType="bbox", print_function=_say_nothing)
    run.evaluate()
    run.accumulate()
    run.summarize()
    scores = dict(zip(_NAMES, (float(s) for s in run.stats), strict=False))
    if self.per_class:
      scores |= self._class_scores(run.eval["precision"])
    return {k: v for k, v in scores.items() if v >= 0} | {"images": float(len(images))}

  def _class_scores(self, precision: Float[np.ndarray, "i r k a m"]) -> dict[str, float]:
    """Returns each class's AP, -1 for those that do not occur; all areas, 100 detections."""
    of_class = precision[:, :, :, 0, -1].mean(axis=(0, 1))
    return {f"box_ap/{self._name(i)}": float(ap) for i, ap in enumerate(of_class)}

  def _name(self, label: int) -> str:
    return self.class_names[label] if label < len(self.class_names) else str(label)

  def _sizes(self, batch: Mapping[str, Any]) -> Int[np.ndarray, "b 2"]:
    for key in ("original_size", "image_size"):
      if key in batch:
        return np.asarray(batch[key]).astype(np.int64)
    return np.tile(np.array(batch["image"].shape[1:3]), (len(batch["image"]), 1))

  def _image(
    self, truth: dict[str, np.ndarray], found: dict[str, np.ndarray], size: Int[np.ndarray, " 2"]
  ) -> _Image:
    real = truth["is_target"].astype(bool)
    labels = truth["labels"][real].astype(np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
      wrong = labels.min() if labels.min() < 0 else labels.max()
      raise ValueError(
        f"labels: {wrong}; expected class ids 0 to {self.num_classes - 1}. Set num_classes to the "
        "highest id + 1, or fix the dataset"
      )
    scale = np.tile(size[::-1], 2).astype(np.float64)
    center, sides = np.split(truth["boxes_cxcywh"][real].astype(np.float64) * scale, 2, axis=1)
    boxes = np.concatenate([center - sides / 2, sides], axis=1)
    low, high = np.split(found["boxes_xyxy"].astype(np.float64), 2, axis=1)
    return _Image(
      image_id=int(truth["image_id"]) if "image_id" in truth else None,
      size=(int(size[0]), int(size[1])),
      boxes_xywh=boxes,
      labels=labels,
      is_crowd=truth.get("is_crowd", np.zeros_like(real))[real].astype(bool),
      areas=truth["area"][real].astype(np.float64) if "area" in truth else sides.prod(axis=1),
      found_xywh=np.concatenate([low, high - low], axis=1),
      found_labels=found["labels"].astype(np.int64),
      scores=found["scores"].astype(np.float64),
    )

  def _unique(self) -> list[_Image]:
    """Returns the images in the order of their ids: ties do not depend on the hosts."""
    numbered = {image.image_id: image for image in self.images if image.image_id is not None}
    others = [image for image in self.images if image.image_id is None]
    return [numbered[key] for key in sorted(numbered)] + others


def _truth_keys(batch: Mapping[str, Any]) -> list[str]:
  optional = ("is_crowd", "area", "image_id")
  return ["boxes_cxcywh", "labels", "is_target", *(key for key in optional if key in batch)]


def _as_coco(
  images: Sequence[_Image], num_classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns truth and detections as COCO's JSON has them; ids count from 1."""
  truth, found = [], []
  for number, image in enumerate(images, start=1):
    for box, label, crowd, area in zip(
      image.boxes_xywh, image.labels, image.is_crowd, image.areas, strict=True
    ):
      annotation = _annotation(number, box, label)
      truth.append(annotation | {"id": len(truth) + 1, "area": float(area), "iscrowd": int(crowd)})
    for box, label, score in zip(image.found_xywh, image.found_labels, image.scores, strict=True):
      found.append(_annotation(number, box, label) | {"score": float(score)})
  sizes = [
    {"id": number, "height": image.size[0], "width": image.size[1]}
    for number, image in enumerate(images, start=1)
  ]
  categories = [{"id": i, "name": str(i)} for i in range(num_classes)]
  return {"images": sizes, "annotations": truth, "categories": categories}, found


def _annotation(number: int, box: Float[np.ndarray, " 4"], label: np.integer) -> dict[str, Any]:
  return {"image_id": number, "category_id": int(label), "bbox": box.tolist()}


def _say_nothing(*args: object) -> None:
  """The library's own report; ours is what `result` returns."""
  del args
