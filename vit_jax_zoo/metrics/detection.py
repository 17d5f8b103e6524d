"""COCO's average precision and recall of boxes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.metrics.base import Evaluator, check_labels, real_rows


@dataclasses.dataclass(frozen=True)
class Image:
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
  true_masks: Sequence[dict[str, Any]] = ()  # run lengths, for mask AP
  found_masks: Sequence[dict[str, Any]] = ()


@dataclasses.dataclass(eq=False)
class DetectionEvaluator(Evaluator):
  """Scores detections with faster-coco-eval.

  Scores, in [0, 1]: "box_ap" (mean over IoU thresholds 0.5 to 0.95 and classes), "box_ap50",
  "box_ap75"; "box_ap_small", "..._medium", "..._large" (below 32^2, below 96^2, above, in pixels of
  the original image); "box_ar1", "box_ar10", "box_ar100" (recall at 1, 10, 100 detections per
  image) and by size; with `per_class` also "box_ap/<class>"; "images". Scores and classes without
  ground truth are omitted. The 100 highest-scoring detections of an image count.
  """

  scores = (
    "box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium", "box_ap_large", "box_ar1",
    "box_ar10", "box_ar100", "box_ar_small", "box_ar_medium", "box_ar_large", "images",
  )  # fmt: skip

  num_classes: int  # highest class id + 1
  class_names: Sequence[str] = ()  # default: the ids
  per_class: bool = False
  images: list[Image] = dataclasses.field(default_factory=list, init=False)

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Adds one batch; ValueError for an unknown label.

    Args:
      batch: `boxes_cxcywh` [b t 4], relative to the image without padding, `labels` [b t],
        `is_target` [b t]; see `original_size`; optional `is_crowd` [b t] (detections in crowds are
        ignored), `area` [b t] of the object's mask in pixels (default: its box's), `image_id` [b]
        (duplicates count once), `mask` [b].
      predictions: `boxes_xyxy` [b q 4] in pixels of the same size, `labels` [b q], `scores` [b q].
    """
    rows = real_rows(batch, len(batch["image"]))
    self.images += [self._image(batch, predictions, int(row)) for row in rows]

  def _merge(self, other: Any) -> None:
    self.images += other.images

  def result(self) -> dict[str, float]:
    images = self._unique()
    if all(image.is_crowd.all() for image in images):  # or no objects at all
      raise ValueError(f"boxes_cxcywh: no ground truth in {len(images)} images; add annotations")
    run = self._evaluate("bbox", range(self.num_classes))
    scores = dict(zip(DetectionEvaluator.scores, map(float, run.stats), strict=False))
    if self.per_class:  # -1 for classes that do not occur; all areas, 100 detections
      of_class = run.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
      scores |= {f"box_ap/{name_of(i, self.class_names)}": float(x) for i, x in enumerate(of_class)}
    return {k: v for k, v in scores.items() if v >= 0} | {"images": float(len(images))}

  def _evaluate(self, kind: Literal["bbox", "segm"], class_ids: Sequence[int]) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster  # here, so that training does not load it

    truth, found = self._as_coco(kind)
    truth = COCO(truth)
    # loadRes raises an error for an empty list.
    found = truth.loadRes(found) if found else COCO({**truth.dataset, "annotations": []})
    run = COCOeval_faster(truth, found, iouType=kind, print_function=lambda *_: None)
    run.params.catIds = list(class_ids)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run

  def _image(self, batch: Mapping[str, Any], predictions: Mapping[str, Any], row: int) -> Image:
    size = original_size(batch, row)
    real = np.asarray(batch["is_target"][row], bool)
    labels = np.asarray(batch["labels"][row])[real].astype(np.int64)
    last = self.num_classes - 1
    advice = f"class ids 0 to {last}. Set num_classes to the highest id + 1, or fix the dataset"
    check_labels("labels:", labels, self.num_classes, advice)
    scale = np.array([*size[::-1]] * 2, np.float64)
    boxes = np.asarray(batch["boxes_cxcywh"][row])[real].astype(np.float64) * scale
    center, sides = np.split(boxes, 2, axis=1)
    low, high = np.split(np.asarray(predictions["boxes_xyxy"][row], np.float64), 2, axis=1)
    crowd = np.asarray(batch["is_crowd"][row], bool)[real] if "is_crowd" in batch else None
    areas = np.asarray(batch["area"][row], np.float64)[real] if "area" in batch else None
    return Image(
      image_id=int(batch["image_id"][row]) if "image_id" in batch else None,
      size=size,
      boxes_xywh=np.concatenate([center - sides / 2, sides], axis=1),
      labels=labels,
      is_crowd=np.zeros(len(labels), bool) if crowd is None else crowd,
      areas=sides.prod(axis=1) if areas is None else areas,
      found_xywh=np.concatenate([low, high - low], axis=1),
      found_labels=np.asarray(predictions["labels"][row]).astype(np.int64),
      scores=np.asarray(predictions["scores"][row], np.float64),
    )

  def _unique(self) -> list[Image]:
    """Returns the images sorted by id, so that ties do not depend on the hosts."""
    numbered = {image.image_id: image for image in self.images if image.image_id is not None}
    others = [image for image in self.images if image.image_id is None]
    return [numbered[key] for key in sorted(numbered)] + others

  def _as_coco(self, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sizes, truth, found = [], [], []
    for number, image in enumerate(self._unique(), start=1):
      sizes.append({"id": number, "height": image.size[0], "width": image.size[1]})
      for i, label in enumerate(image.labels):
        entry = {"id": len(truth) + 1, "image_id": number, "category_id": int(label)}
        entry |= {"iscrowd": int(image.is_crowd[i]), "area": float(image.areas[i])}
        masks = {"segmentation": image.true_masks[i]} if kind == "segm" else {}
        truth.append({**entry, "bbox": image.boxes_xywh[i].tolist(), **masks})
      for i, label in enumerate(image.found_labels):
        entry = {"image_id": number, "category_id": int(label), "score": float(image.scores[i])}
        if kind == "bbox":
          found.append(entry | {"bbox": image.found_xywh[i].tolist()})
        elif image.scores[i] > 0:
          found.append(entry | {"segmentation": image.found_masks[i]})
    categories = [{"id": i, "name": str(i)} for i in range(self.num_classes)]
    return {"images": sizes, "annotations": truth, "categories": categories}, found


def original_size(batch: Mapping[str, Any], row: int) -> tuple[int, int]:
  """Returns height and width of an image: `original_size`, else `image_size`, else its shape."""
  sizes = [batch[key][row] for key in ("original_size", "image_size") if key in batch]
  height, width = sizes[0] if sizes else batch["image"].shape[1:3]
  return int(height), int(width)
