"""Prediction of label maps: overlay, label map, class fractions."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import cv2
import jax
import numpy as np

from vit_jax_zoo.inference import base
from vit_jax_zoo.inference.base import Image, Options, Picture, Predictor, Result, Trained
from vit_jax_zoo.systems.fpt.figures import color_labels

OPACITY = 0.55  # of the class colors in the overlay


class SegmentationPredictor(Predictor):
  """Most likely class of each pixel; with `explain` also attention maps of the image's centre."""

  reads: ClassVar[frozenset[str]] = frozenset({"explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    if options.explain and getattr(trained.model, "neck", None) != "fpt":
      wrong = "--explain: a model without transformer has no attention maps"
      raise ValueError(f"{wrong}; leave --explain out")
    super().__init__(trained, options)
    self._predict = base.jit_by_image_size(self._task.predict)

  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns `classes`, largest first, and images in the input's size.

    Each class has `label`, `name` if known, `fraction` of the pixels, and their mean `confidence`.
    Images: "" the overlay, "labels" the colored label map, "ids" the label map as class ids; with
    `explain` "levels", the attention maps.
    """
    found = jax.device_get(self._predict(self._trained.variables, batch))
    rows = [{k: x[i] for k, x in {**batch, **found}.items()} for i in range(len(images))]
    return [self._result(image, row) for image, row in zip(images, rows, strict=True)]

  def _result(self, image: Image, example: dict[str, np.ndarray]) -> Result:
    height, width = example.get("image_size", example["image"].shape[:2])
    ids = example["label_map"][:height, :width].astype(np.uint8)  # there are at most 255 classes
    labels = _resized(ids, image, cv2.INTER_NEAREST_EXACT)
    confidence = _resized(example["confidence"][:height, :width], image, cv2.INTER_LINEAR)
    present, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    classes: list[dict[str, Any]] = [
      {
        "label": int(label),
        **self.named(label),
        "fraction": float(count / labels.size),
        "confidence": float(confidence[labels == label].mean()),
      }
      for label, count in zip(present[order], counts[order], strict=True)
    ]
    names = [str(entry.get("name", entry["label"])) for entry in classes]
    parts = [f"{n} {100 * c['fraction']:.1f} %" for n, c in zip(names, classes, strict=True)]
    explained = example["image"][:height, :width] if self._options.explain else None
    scores = [entry["confidence"] for entry in classes]

    def draw() -> dict[str, Picture]:
      colors = color_labels(labels.astype(np.int32))
      gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
      overlay = np.rint((1 - OPACITY) * gray + OPACITY * colors).astype(np.uint8)
      pictures: dict[str, Picture] = {"": overlay, "labels": colors, "ids": labels}
      if explained is not None:
        explain = jax.jit(self._task.explain)
        found = jax.device_get(explain(self._trained.variables, {"image": explained[None]}))
        pictures["levels"] = self._task.draw_explanation(found).images["levels"]
      return pictures

    return Result({"classes": classes}, draw, ", ".join(parts), names, scores, mask=labels)


def _resized(values: np.ndarray, image: Image, method: int) -> np.ndarray:
  if values.shape == image.shape[:2]:
    return values
  return cv2.resize(np.ascontiguousarray(values), image.shape[1::-1], interpolation=method)
