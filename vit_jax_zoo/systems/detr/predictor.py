"""Detection of objects in a user's image; panoptic segments with a mask head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.inference.base import Image, Options, Picture, Prediction, Trained
from vit_jax_zoo.inference.coco_json import box_annotation
from vit_jax_zoo.inference.image_sizes import jit_by_image_size, padded_batch
from vit_jax_zoo.metrics.mask_ap import encode_masks, original_masks
from vit_jax_zoo.systems.detr.figures import draw_query_attention, paint_segments
from vit_jax_zoo.systems.detr.panoptic import Segmentation, found_segments


class DetectionPredictor:
  """Detections with a score of at least `threshold`; with `explain`, their attention maps.

  A mask head adds panoptic segments; unless `threshold` is set, their minimum score is the task's
  (0.85 in the paper).
  """

  reads: ClassVar[frozenset[str]] = frozenset({"threshold", "explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    if not 0 <= options.threshold <= 1:
      raise ValueError(f"--threshold: {options.threshold} is given; expected a value in [0, 1]")
    self._trained, self._options = trained, options
    task: Any = trained.task
    self._task = dataclasses.replace(task, draw_attention=options.explain)
    self._stuff_from = task.num_classes if task.stuff_from is None else task.stuff_from
    self._predict = jit_by_image_size(self._task.predict)
    self._predict_padded = jit_by_image_size(self._task.padding_invariant().predict)

  def __call__(self, image: Image) -> Prediction:
    """Returns `detections`, by falling score, in the format of COCO's result files.

    With masks the record also has `segmentation` (RLE) and `area`, and `segments_info` as in COCO's
    panoptic files. Pictures: "" with boxes; "attention" with `explain`; "segments" with coloured
    segments, and "panoptic" with their ids as colours (red + 256 green + 65536 blue).
    """
    example = self._trained.prepare(image)
    shape = np.shape(example["image"])[:2]
    # As it is: a mask head's group norms include padding, and some preprocessing pads itself.
    if self._task.model.mask_head or tuple(example.get("image_size", shape)) != shape:
      batch, predict = padded_batch(example, lambda side: side), self._predict
    else:
      batch, predict = padded_batch(example, self._padded_side), self._predict_padded
    batch["original_size"] = np.array([image.shape[:2]], np.int32)
    found = jax.device_get(predict(self._trained.variables, batch))
    selected = np.flatnonzero(found["scores"][0] >= self._options.threshold)
    selected = selected[np.argsort(-found["scores"][0][selected], kind="stable")]
    record: dict[str, Any] = {"detections": self._detections(batch, found, selected, image)}
    pictures: dict[str, Picture] = {"": self._draw(image, found, selected)}
    if self._options.explain:
      shown = {"image": image[None]}  # at full size: the model's may be tiny
      found["attention"] = _without_padding(found["attention"], batch)
      pictures["attention"] = draw_query_attention(
        shown, found, self._task.class_names, threshold=self._options.threshold
      )
    if "mask_logits" in found:
      is_given = "threshold" in self._options.given
      threshold = self._options.threshold if is_given else self._task.segment_threshold
      segments = found_segments(batch, found, 0, self._stuff_from, threshold=threshold)
      record["segments_info"] = self._segments_info(segments)
      pictures["segments"] = paint_segments(image, segments.segment_map)
      pictures["panoptic"] = _as_colors(segments.segment_map + 1)
    return Prediction(record, pictures, record["detections"], record.get("segments_info"))

  def _padded_side(self, side: int) -> int:
    """Rounds up by at most an eighth: a few sizes are compiled, instead of one for each image."""
    stride = (self._task.model.backbone or {}).get("output_stride", 32)
    step = max(stride, 2 ** side.bit_length() // 16)
    return -(-side // step) * step

  def _detections(
    self, batch: dict[str, Any], found: dict[str, Any], selected: np.ndarray, image: Image
  ) -> list[dict[str, Any]]:
    boxes = _inside(found["boxes_xyxy"][0], image)
    outlines: list[dict[str, Any]] = [{}] * len(selected)
    if "mask_logits" in found:
      of_selected = {"mask_logits": found["mask_logits"][:, selected]}
      outlines = [
        {"area": int(mask.sum()), "segmentation": encode_masks(mask[None])[0]}
        for mask in original_masks(batch, of_selected, 0, (image.shape[0], image.shape[1]))
      ]
    return [
      box_annotation(
        self._category(int(found["labels"][0][query])),
        boxes[query].tolist(),
        float(found["scores"][0][query]),
        **outline,
      )
      for query, outline in zip(selected, outlines, strict=True)
    ]

  def _category(self, label: int) -> dict[str, Any]:
    names = self._task.class_names
    return {"category_id": label, **({"name": names[label]} if label < len(names) else {})}

  def _draw(self, image: Image, found: dict[str, np.ndarray], selected: np.ndarray) -> Figure:
    labels = found["labels"][0][selected]
    names = [
      f"{name_of(label, self._task.class_names)} {score:.0%}"
      for label, score in zip(labels, found["scores"][0][selected], strict=True)
    ]
    title = f"{len(selected)} detections, score {self._options.threshold:.0%} or more"
    figure, axes = draw.grid(1, 1, title, image[None])
    figure.set_size_inches(7, 0.5 + 7 * image.shape[0] / image.shape[1])
    draw.show(axes[0, 0], image)
    boxes = _inside(found["boxes_xyxy"][0][selected], image)
    draw.draw_boxes(axes[0, 0], boxes[::-1], names[::-1], labels[::-1])  # highest score on top
    return figure

  def _segments_info(self, segments: Segmentation) -> list[dict[str, Any]]:
    info = []
    for index, label in enumerate(segments.labels):
      rows, columns = np.nonzero(segments.segment_map == index)
      if len(rows):
        left, top = float(columns.min()), float(rows.min())
        bbox = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        entry = {**self._category(int(label)), "area": len(rows), "bbox": bbox}
        info.append({"id": index + 1, **entry, "isthing": int(label < self._stuff_from)})
    return info


def _without_padding(attention: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """Removes the cells [b q i j] in the padding of the batch's only image."""
  sides = zip(batch["image_size"][0], attention.shape[2:], batch["image"].shape[1:3], strict=True)
  rows, columns = (-(-int(side) * cells // padded) for side, cells, padded in sides)
  return attention[:, :, :rows, :columns]


def _inside(boxes_xyxy: np.ndarray, image: Image) -> np.ndarray:
  return np.clip(boxes_xyxy, 0, np.array([*image.shape[1::-1]] * 2, np.float32))


def _as_colors(ids: np.ndarray) -> np.ndarray:
  return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
