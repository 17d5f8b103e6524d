"""Prediction of objects with a two-stage detector: boxes, and masks with a mask head."""

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
from vit_jax_zoo.systems.rcnn.masks import draw_predicted_masks, paste_masks


class InstancePredictor(Predictor):
  """Objects with a score of at least `threshold`, as records and annotated images.

  With `explain` also the neck's attention maps of the best object's centre.
  """

  reads: ClassVar[frozenset[str]] = frozenset({"threshold", "explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    super().__init__(trained, options)
    if options.explain and not hasattr(getattr(trained.model, "neck_class", None), "explain"):
      raise ValueError("--explain: the model's neck has no attention maps; leave --explain out")
    self._predict = base.jit_by_image_size(self._task.predict)

  def prepare(self, image: Image) -> dict[str, np.ndarray]:
    """Returns `image`, padded; `image_size` without padding; `original_size`."""
    example, multiple = self._trained.prepare(image), self._task.model.size_multiple
    padded = base.pad_example(example, lambda side: -(-side // multiple) * multiple)
    return padded | {"original_size": np.array(image.shape[:2], np.int32)}

  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns `objects`, highest score first.

    Each has `label`, `name` if known, `score`, `box` (left, top, right, bottom in pixels of the
    image), and with a mask head `mask`: `size` and `counts`, COCO's compressed run lengths. Images:
    "" boxes, "masks" masks, with `explain` "levels", attention maps.
    """
    found = jax.tree.map(np.asarray, self._predict(self._trained.variables, batch))
    results = []
    for i, image in enumerate(images):
      height, width = batch["image_size"][i]
      row = {key: value[i] for key, value in found.items()}
      results.append(self._result(image, batch["image"][i, :height, :width], row))
    return results

  def _result(self, image: Image, prepared: np.ndarray, found: dict[str, np.ndarray]) -> Result:
    confident = found["is_object"] & (found["scores"] >= self._options.threshold)
    labels, scores, boxes = (found[key][confident] for key in ("labels", "scores", "boxes_xyxy"))
    has_masks = "box_masks" in found
    outlines: list[dict[str, Any]] = [{}] * len(labels)
    if has_masks:
      masks = paste_masks(
        found["box_masks"][confident].astype(np.float64),
        boxes.astype(np.float64),
        (image.shape[0], image.shape[1]),
        convention=self._task.paste_convention,  # as evaluation scores them
      )
      encoded = zip(masks, encode_masks(masks), strict=True)
      outlines = [{"area": int(mask.sum()), "segmentation": lengths} for mask, lengths in encoded]
    objects, annotations = [], []
    for label, score, box, outline in zip(labels, scores, boxes, outlines, strict=True):
      name, box = self.named(label), box.tolist()
      mask = {"mask": outline["segmentation"]} if outline else {}
      objects.append({"label": int(label), **name, "score": float(score), "box": box, **mask})
      category = {"category_id": int(label), **name}
      annotations.append(box_annotation(category, box, float(score), **outline))
    explained = prepared if self._options.explain else None

    def draw() -> dict[str, Picture]:
      names, named = self._task.class_names, zip(labels, scores, strict=True)
      captions = [f"{name_of(label, names)} {score:.0%}" for label, score in named]
      title = f"{len(boxes)} predicted at {self._options.threshold:.0%} or more"
      pictures: dict[str, Picture] = {"": draw_detections(image, boxes, captions, labels, title)}
      if explained is not None:
        pictures["levels"] = self._draw_levels(image, explained, boxes)
      if has_masks:
        masks = np.zeros((0, *image.shape[:2]), bool) if result.masks is None else result.masks
        pictures["masks"] = draw_predicted_masks(image, masks, captions)
      return pictures

    result = Result.of_objects(annotations, record={"objects": objects}, draw_pictures=draw)
    return result

  def _draw_levels(self, image: Image, prepared: np.ndarray, boxes: np.ndarray) -> Picture:
    box = boxes[0] if len(boxes) else np.array([0, 0, image.shape[1], image.shape[0]])
    center = (box[[1, 0]] + box[[3, 2]]) / 2 / image.shape[:2]
    batch = {"image": prepared[None], "query_position": center[None].astype(np.float32)}
    explanation = jax.device_get(jax.jit(self._task.explain)(self._trained.variables, batch))
    return self._task.draw_explanation(explanation).images["levels"]
