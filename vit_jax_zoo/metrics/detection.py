"""COCO's average precision of boxes and instance masks, and recall of boxes."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import Bool

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.metrics.base import Arrays, Evaluator, Size, check_labels, real_rows


class Image(NamedTuple):
  """Ground truth and detections of an image, as COCO's annotations and results without ids."""

  image_id: int | None
  size: Size
  truth: list[dict[str, Any]]
  found: list[dict[str, Any]]


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

  def add(self, batch: Arrays, predictions: Arrays) -> None:
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

  def merge(self, other: Any) -> None:
    self.images += other.images

  def result(self) -> dict[str, float]:
    images = self._unique()
    if all(entry["iscrowd"] for image in images for entry in image.truth):  # or no objects at all
      raise ValueError(f"boxes_cxcywh: no ground truth in {len(images)} images; add annotations")
    run = self._evaluate("bbox", range(self.num_classes))
    scores = dict(zip(DetectionEvaluator.scores, map(float, run.stats), strict=False))
    if self.per_class:  # -1 for classes that do not occur; all areas, 100 detections
      of_class = run.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
      scores |= {f"box_ap/{name_of(i, self.class_names)}": float(x) for i, x in enumerate(of_class)}
    return {k: v for k, v in scores.items() if v >= 0} | {"images": float(len(images))}

  def _evaluate(self, kind: Literal["bbox", "segm"], class_ids: Sequence[int]) -> Any:
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

  def _image(self, batch: Arrays, predictions: Arrays, row: int) -> Image:
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
    crowd = batch["is_crowd"][row] if "is_crowd" in batch else np.zeros(len(real))
    crowd, areas = np.asarray(crowd, bool)[real], sides.prod(axis=1)
    if "area" in batch:
      areas = np.asarray(batch["area"][row], np.float64)[real]
    found_labels = np.asarray(predictions["labels"][row]).astype(np.int64)
    scores = np.asarray(predictions["scores"][row], np.float64)
    true_xywh = np.concatenate([center - sides / 2, sides], axis=1)
    found_xywh = np.concatenate([low, high - low], axis=1)
    return Image(
      int(batch["image_id"][row]) if "image_id" in batch else None,
      size,
      _entries(category_id=labels, iscrowd=crowd.astype(int), area=areas, bbox=true_xywh),
      _entries(category_id=found_labels, score=scores, bbox=found_xywh),
    )

  def _unique(self) -> list[Image]:
    """Returns the images sorted by id, so that ties do not depend on the hosts."""
    numbered = {image.image_id: image for image in self.images if image.image_id is not None}
    others = [image for image in self.images if image.image_id is None]
    return [numbered[key] for key in sorted(numbered)] + others

  def _as_coco(self, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sizes, truth, found = [], [], []
    unused = "bbox" if kind == "segm" else "segmentation"
    for number, image in enumerate(self._unique(), start=1):
      sizes.append({"id": number, "height": image.size[0], "width": image.size[1]})
      for entry in image.truth:
        truth.append({**entry, "id": len(truth) + 1, "image_id": number})
      for entry in image.found:
        if kind == "bbox" or entry["score"] > 0:
          used = {key: value for key, value in entry.items() if key != unused}
          found.append({**used, "image_id": number})
    categories = [{"id": i, "name": str(i)} for i in range(self.num_classes)]
    return {"images": sizes, "annotations": truth, "categories": categories}, found


def _entries(**columns: np.ndarray) -> list[dict[str, Any]]:
  rows = zip(*(column.tolist() for column in columns.values()), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in rows]


def original_size(batch: Arrays, row: int) -> Size:
  """Returns height and width of an image: `original_size`, else `image_size`, else its shape."""
  sizes = [batch[key][row] for key in ("original_size", "image_size") if key in batch]
  height, width = sizes[0] if sizes else batch["image"].shape[1:3]
  return int(height), int(width)


_MASK_AP = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small", "mask_ap_medium", "mask_ap_large")


@dataclasses.dataclass(eq=False)
class InstanceEvaluator(DetectionEvaluator):
  """Adds "mask_ap", "mask_ap50", "mask_ap75" and those by size to the box scores.

  True masks are `run_lengths` uint8 [b l] (see `load_objects`), `segment_map` [b h w] of the
  original image (target index of each pixel), or `masks` bool [b t h w] of the original size.
  """

  scores = (*_MASK_AP, *DetectionEvaluator.scores)

  @abc.abstractmethod
  def found_masks(self, batch: Arrays, predictions: Arrays, row: int, size: Size) -> list[Any]:
    """Returns the masks of an example's predictions, of `size`, as `encode_masks` does."""

  def _image(self, batch: Arrays, predictions: Arrays, row: int) -> Image:
    image = super()._image(batch, predictions, row)
    found = self.found_masks(batch, predictions, row, image.size)
    both = (*_true_masks(batch, row, image.size), *found)
    for entry, mask in zip((*image.truth, *image.found), both, strict=True):
      entry["segmentation"] = mask
    return image

  def result(self) -> dict[str, float]:
    scores = super().result()
    run = self._evaluate("segm", range(self.num_classes))
    masks = dict(zip(_MASK_AP, map(float, run.stats), strict=False))
    return {k: v for k, v in masks.items() if v >= 0} | scores


def _true_masks(batch: Arrays, row: int, size: Size) -> list[dict[str, Any]]:
  real = np.asarray(batch["is_target"][row], bool)
  if "run_lengths" in batch:
    lines = np.asarray(batch["run_lengths"][row], np.uint8).tobytes().rstrip(b"\0").split(b"\n")
    counts = [line for line in lines if line]
    if len(counts) != real.sum():
      remedy = "drop no targets after load_objects in evaluation"
      raise ValueError(f"run_lengths: {len(counts)} masks for {real.sum()} objects; {remedy}")
    return [{"size": list(size), "counts": line.decode()} for line in counts]
  if "segment_map" in batch:
    segments = np.asarray(batch["segment_map"][row])[: size[0], : size[1]]
    return [encode_masks((segments == number)[None])[0] for number in np.flatnonzero(real)]
  if "masks" not in batch:
    raise ValueError("masks: missing in the batch; set run_lengths of load_objects")
  height, width = np.asarray(batch.get("image_size", [batch["image"].shape[1:3]] * (row + 1))[row])
  if (height, width) != size:
    problem = f"masks: {height}x{width} for an image of {size[0]}x{size[1]}"
    raise ValueError(f"{problem}; expected the same size. Set run_lengths of load_objects")
  return encode_masks(np.asarray(batch["masks"][row], bool)[real][:, :height, :width])


def encode_masks(masks: Bool[np.ndarray, "n h w"]) -> list[dict[str, Any]]:
  """Returns COCO's compressed run lengths of each mask: `size`, `counts` as text."""
  encoded = run_lengths.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
  return [{"size": m["size"], "counts": m["counts"].decode()} for m in encoded]
