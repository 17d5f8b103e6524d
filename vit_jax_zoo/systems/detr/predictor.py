"""Detection of objects in a user's image; panoptic segments with a mask head."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures.detection import draw_detections
from vit_jax_zoo.inference import base
from vit_jax_zoo.inference.base import Image, Options, Picture, Predictor, Result, Trained
from vit_jax_zoo.inference.coco_json import box_annotation
from vit_jax_zoo.metrics.detection import encode_masks
from vit_jax_zoo.systems.detr.figures import draw_query_attention, paint_segments
from vit_jax_zoo.systems.detr.panoptic import Segmentation, found_segments, original_masks


class DetectionPredictor(Predictor):
  """Detections with a score of at least `threshold`, and panoptic segments of a mask head.

  Unless `threshold` is set, the segments' minimum score is the task's (0.85 in the paper).
  """

  reads: ClassVar[frozenset[str]] = frozenset({"threshold", "explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    if not 0 <= options.threshold <= 1:
      raise ValueError(f"--threshold: {options.threshold} is given; expected a value in [0, 1]")
    super().__init__(trained, options)
    self._task = task = dataclasses.replace(self._task, draw_attention=options.explain)
    self._stuff_from = task.num_classes if task.stuff_from is None else task.stuff_from
    self._predict = base.jit_by_image_size(self._task.predict)
    self._predict_padded = base.jit_by_image_size(self._task.padding_invariant().predict)

  def prepare(self, image: Image) -> dict[str, np.ndarray]:
    """Returns `image`, padded; `image_size` without padding; `original_size`."""
    example = self._trained.prepare(image)
    shape = np.shape(example["image"])[:2]
    # As it is: a mask head's group norms include padding, and some preprocessing pads itself.
    if self._task.model.mask_head or tuple(example.get("image_size", shape)) != shape:
      padded = base.pad_example(example, lambda side: side)
    else:
      padded = {**base.pad_example(example, self._padded_side), "is_rounded": np.array(1)}
    return padded | {"original_size": np.array(image.shape[:2], np.int32)}

  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns `detections`, by falling score, in the format of COCO's result files.

    With masks the record also has `segmentation` (RLE) and `area`, and `segments_info` as in COCO's
    panoptic files. Pictures: "" with boxes; "attention" with `explain`; "segments" with coloured
    segments, and "panoptic" with their ids as colours (red + 256 green + 65536 blue).
    """
    predict = self._predict_padded if "is_rounded" in batch else self._predict
    inputs = {key: value for key, value in batch.items() if key != "is_rounded"}
    found = jax.device_get(predict(self._trained.variables, inputs))
    results = []
    for i, image in enumerate(images):
      row = ({key: x[[i]] for key, x in part.items()} for part in (inputs, found))
      results.append(self._result(image, *row))
    return results

  def _result(self, image: Image, batch: dict[str, Any], found: dict[str, np.ndarray]) -> Result:
    """Returns the result of an image; `batch` and `found` have one row."""
    threshold = self._options.threshold
    selected = np.flatnonzero(found["scores"][0] >= threshold)
    selected = selected[np.argsort(-found["scores"][0][selected], kind="stable")]
    boxes, labels, scores = (found[k][0][selected] for k in ("boxes_xyxy", "labels", "scores"))
    boxes = np.clip(boxes, 0, np.array([*image.shape[1::-1]] * 2, np.float32))
    outlines: list[dict[str, Any]] = [{}] * len(selected)
    segments, more = None, {}
    if "mask_logits" in found:
      of_selected = {"mask_logits": found["mask_logits"][:, selected]}
      outlines = [
        {"area": int(mask.sum()), "segmentation": encode_masks(mask[None])[0]}
        for mask in original_masks(batch, of_selected, 0, (image.shape[0], image.shape[1]))
      ]
      is_given = "threshold" in self._options.given
      least = threshold if is_given else self._task.segment_threshold
      segmentation = found_segments(batch, found, 0, self._stuff_from, least)
      segments = segmentation.segment_map
      more = {"segments_info": self._segments_info(segmentation)}
    objects = [
      box_annotation({"category_id": int(label), **self.named(label)}, box, float(score), **outline)
      for label, box, score, outline in zip(labels, boxes.tolist(), scores, outlines, strict=True)
    ]
    attention = None
    if self._options.explain:  # without the cells in the padding
      grid, padded = found["attention"].shape[2:], batch["image"].shape[1:3]
      height, width = map(int, batch["image_size"][0])
      rows, columns = -(-height * grid[0] // padded[0]), -(-width * grid[1] // padded[1])
      attention = found["attention"][:, :, :rows, :columns]
    queries = {key: found[key] for key in ("boxes_xyxy", "labels", "scores")}

    def draw() -> dict[str, Picture]:
      names = self._task.class_names
      captions = [f"{name_of(i, names)} {p:.0%}" for i, p in zip(labels, scores, strict=True)]
      title = f"{len(captions)} detections, score {threshold:.0%} or more"
      pictures: dict[str, Picture] = {"": draw_detections(image, boxes, captions, labels, title)}
      if attention is not None:
        shown = {"image": image[None]}, queries | {"attention": attention}  # at full size
        pictures["attention"] = draw_query_attention(*shown, names, threshold=threshold)
      if segments is not None:
        pictures["segments"] = paint_segments(image, segments)
        ids = segments + 1
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
        pictures["panoptic"] = colors.astype(np.uint8)
      return pictures

    mask = None if segments is None else segments + 1
    fields = {"mask": mask, "segments": more.get("segments_info"), "draw_pictures": draw}
    return Result.of_objects(objects, record={"detections": objects, **more}, **fields)

  def _padded_side(self, side: int) -> int:
    """Rounds up by at most an eighth: a few sizes are compiled, instead of one for each image."""
    stride = (self._task.model.backbone or {}).get("output_stride", 32)
    step = max(stride, 2 ** side.bit_length() // 16)
    return -(-side // step) * step

  def _segments_info(self, segments: Segmentation) -> list[dict[str, Any]]:
    info = []
    for index, label in enumerate(segments.labels):
      rows, columns = np.nonzero(segments.segment_map == index)
      if len(rows):
        left, top = float(columns.min()), float(rows.min())
        bbox = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        entry = {"id": index + 1, "category_id": int(label), **self.named(label)}
        is_thing = int(label < self._stuff_from)
        info.append({**entry, "area": len(rows), "bbox": bbox, "isthing": is_thing})
    return info
