"""Finding objects in pictures: boxes as COCO has them, and segments where there is a mask head."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.inference.base import Image, Options, Picture, Prediction, Trained
from vit_jax_zoo.inference.coco_json import box_annotation
from vit_jax_zoo.metrics.mask_ap import encode_masks, original_masks
from vit_jax_zoo.metrics.panoptic import Segmentation, found_segments
from vit_jax_zoo.systems.detr.figures import draw_query_attention, paint_segments


class DetectionPredictor:
  """Boxes that are at least as sure as `threshold`; with `explain`, where their queries looked.

  A model with a mask head also gives every pixel to a segment. The segments' own threshold is the
  task's (0.85 in the paper) unless another than the default one is asked for.

  A model is compiled for each new size of images that the pictures come to.
  """

  reads: ClassVar[frozenset[str]] = frozenset({"threshold", "explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    """Takes the model; raises ValueError for a threshold that is no probability."""
    if not 0 <= options.threshold <= 1:
      raise ValueError(f"threshold must lie in [0, 1], but is {options.threshold}")
    self._trained, self._options = trained, options
    task: Any = trained.task
    self._task = dataclasses.replace(task, draw_attention=options.explain)
    self._predict = jax.jit(self._task.predict)

  def __call__(self, image: Image) -> Prediction:
    """Finds what is in a picture.

    Returns:
      In the record `detections`, surest first, each as in COCO's result files: `category_id`,
      `bbox` (left, top, width, height in the picture's own pixels), `score`, `area`, and `name`
      where it is known; of a model with masks also `segmentation`, compressed run lengths, and
      `segments_info`, as in COCO's panoptic files. Pictures: "" has
      the boxes; "attention" with `explain`; "segments" the coloured segments, and "panoptic" their
      ids as colours (red + 256 green + 65536 blue), as COCO has them.
    """
    example = self._trained.prepare(image)
    keys = [key for key in ("image", "image_size") if key in example]
    batch = {key: np.asarray(example[key])[None] for key in keys}
    batch["original_size"] = np.array([image.shape[:2]], np.int32)
    found = jax.device_get(self._predict(self._trained.variables, batch))
    sure = np.flatnonzero(found["scores"][0] >= self._options.threshold)
    sure = sure[np.argsort(-found["scores"][0][sure], kind="stable")]
    record: dict[str, Any] = {"detections": self._detections(batch, found, sure, image)}
    pictures: dict[str, Picture] = {"": self._draw(image, found, sure)}
    if self._options.explain:
      pictures["attention"] = self._draw_attention(image, batch, found)
    if "mask_logits" in found:
      segments = self._segments(batch, found)
      record["segments_info"] = self._segments_info(segments)
      pictures["segments"] = paint_segments(image, segments.segment_map)
      pictures["panoptic"] = _as_colors(segments.segment_map + 1)
    return Prediction(record, pictures, record["detections"], record.get("segments_info"))

  def _detections(
    self,
    batch: dict[str, np.ndarray],
    found: dict[str, np.ndarray],
    sure: np.ndarray,
    image: Image,
  ) -> list[dict[str, Any]]:
    boxes = _inside(found["boxes_xyxy"][0], image)
    outlines: list[dict[str, Any]] = [{}] * len(sure)
    if "mask_logits" in found:
      of_sure = {"mask_logits": found["mask_logits"][:, sure]}
      masks = list(original_masks(batch, of_sure, 0, (image.shape[0], image.shape[1])))
      outlines = [
        {"area": int(mask.sum()), "segmentation": encode_masks(mask[None])[0]} for mask in masks
      ]
    return [
      box_annotation(
        self._category(int(found["labels"][0][query])),
        boxes[query].tolist(),
        float(found["scores"][0][query]),
        **outline,
      )
      for query, outline in zip(sure, outlines, strict=True)
    ]

  def _category(self, label: int) -> dict[str, Any]:
    names = self._task.class_names
    return {"category_id": label, **({"name": names[label]} if label < len(names) else {})}

  def _draw(self, image: Image, found: dict[str, np.ndarray], sure: np.ndarray) -> Figure:
    labels = found["labels"][0][sure]
    names = [
      f"{name_of(label, self._task.class_names)} {score:.0%}"
      for label, score in zip(labels, found["scores"][0][sure], strict=True)
    ]
    figure, axes = draw.grid(1, 1, f"{len(sure)} found at {self._options.threshold:.0%} or more")
    figure.set_size_inches(7, 0.5 + 7 * image.shape[0] / image.shape[1])
    draw.show(axes[0, 0], image)
    # The surest on top.
    boxes = _inside(found["boxes_xyxy"][0][sure], image)
    draw.draw_boxes(axes[0, 0], boxes[::-1], names[::-1], labels[::-1])
    return figure

  def _draw_attention(
    self, image: Image, batch: dict[str, np.ndarray], found: dict[str, np.ndarray]
  ) -> Figure:
    shown = {**batch, "image": image[None]}  # the picture itself: the model's may be tiny
    return draw_query_attention(
      shown, found, self._task.class_names, threshold=self._options.threshold
    )

  def _stuff_from(self) -> int:
    stuff_from = self._task.stuff_from
    return self._task.num_classes if stuff_from is None else stuff_from

  def _segments(self, batch: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> Segmentation:
    asked = self._options.threshold
    threshold = self._task.segment_threshold if asked == Options.threshold else asked
    return found_segments(batch, found, 0, self._stuff_from(), threshold=threshold)

  def _segments_info(self, segments: Segmentation) -> list[dict[str, Any]]:
    """Returns what COCO's panoptic files say of each segment that has any pixels."""
    info = []
    for index, label in enumerate(segments.labels):
      rows, columns = np.nonzero(segments.segment_map == index)
      if len(rows):
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        entry = {**self._category(int(label)), "area": len(rows), "bbox": _xywh(np.array(corners))}
        info.append({"id": index + 1, **entry, "isthing": int(label < self._stuff_from())})
    return info


def _inside(boxes_xyxy: np.ndarray, image: Image) -> np.ndarray:
  """Returns boxes without what lies beyond the picture."""
  height, width = image.shape[:2]
  return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))


def _xywh(box_xyxy: np.ndarray) -> list[float]:
  left, top, right, bottom = (float(side) for side in box_xyxy)
  return [left, top, right - left, bottom - top]


def _as_colors(ids: np.ndarray) -> np.ndarray:
  return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
