"""Prediction of objects with a two-stage detector: boxes, and masks with a mask head."""

from typing import Any, ClassVar

import jax
import numpy as np
from faster_coco_eval.core import mask as run_lengths

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.inference.base import Image, Options, Picture, Prediction, Trained
from vit_jax_zoo.inference.coco_json import box_annotation
from vit_jax_zoo.inference.image_sizes import jit_by_image_size, padded_batch
from vit_jax_zoo.metrics.mask_ap import encode_masks
from vit_jax_zoo.ops.mask_paste import paste_masks


class InstancePredictor:
  """Objects with a score of at least `threshold`, as records and annotated images.

  With `explain` also the neck's attention maps of the best object's centre.
  """

  reads: ClassVar[frozenset[str]] = frozenset({"threshold", "explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    self._trained, self._options = trained, options
    self._task: Any = trained.task
    if options.explain and not hasattr(getattr(trained.model, "neck_class", None), "explain"):
      raise ValueError("--explain: the model's neck has no attention maps; leave --explain out")
    self._predict = jit_by_image_size(self._task.predict)

  def __call__(self, image: Image) -> Prediction:
    """Returns `objects`, highest score first.

    Each has `label`, `name` if known, `score`, `box` (left, top, right, bottom in pixels of the
    image), and with a mask head `mask`: `size` and `counts`, COCO's compressed run lengths. Images:
    "" boxes, "masks" masks, with `explain` "levels", attention maps.
    """
    prepared, multiple = self._trained.prepare(image), self._task.model.size_multiple
    batch = padded_batch(prepared, lambda side: -(-side // multiple) * multiple)
    batch["original_size"] = np.array([image.shape[:2]], np.int32)
    found = jax.tree.map(np.asarray, self._predict(self._trained.variables, batch))
    confident = found["is_object"][0] & (found["scores"][0] >= self._options.threshold)
    names = self._task.class_names
    labels, scores, boxes = (found[key][0][confident] for key in ("labels", "scores", "boxes_xyxy"))
    objects: list[dict[str, Any]] = [
      {
        "label": int(label),
        **({"name": names[label]} if label < len(names) else {}),
        "score": float(score),
        "box": [float(x) for x in box],
      }
      for label, score, box in zip(labels, scores, boxes, strict=True)
    ]
    captions = [f"{name_of(i, names)} {score:.0%}" for i, score in zip(labels, scores, strict=True)]
    title = f"{len(boxes)} predicted at {self._options.threshold:.0%} or more"
    figure, axes = draw.grid(1, 1, title, image[None])
    figure.set_size_inches(7, 0.5 + 7 * image.shape[0] / image.shape[1])
    draw.show(axes[0, 0], image)
    draw.draw_boxes(axes[0, 0], boxes[::-1], captions[::-1], labels[::-1])  # the best on top
    pictures: dict[str, Picture] = {"": figure}
    if self._options.explain:
      box = boxes[0] if len(boxes) else np.array([0, 0, image.shape[1], image.shape[0]])
      center = (box[[1, 0]] + box[[3, 2]]) / 2 / image.shape[:2]
      batch = {
        "image": np.asarray(prepared["image"])[None],
        "query_position": center[None].astype(np.float32),
      }
      explanation = jax.device_get(jax.jit(self._task.explain)(self._trained.variables, batch))
      pictures["levels"] = self._task.draw_explanation(explanation).images["levels"]
    if "box_masks" in found:
      masks = paste_masks(
        found["box_masks"][0][confident].astype(np.float64),
        boxes.astype(np.float64),
        (image.shape[0], image.shape[1]),
        convention=self._task.paste_convention,  # as evaluation scores them
      )
      for entry, mask in zip(objects, encode_masks(masks), strict=True):
        entry["mask"] = mask
      pictures["masks"] = draw.draw_predicted_masks(image, masks, captions)
    return Prediction({"objects": objects}, pictures, [_as_coco(entry) for entry in objects])


def _as_coco(entry: dict[str, Any]) -> dict[str, Any]:
  category = {"category_id": entry["label"]} | {k: entry[k] for k in {"name"} & entry.keys()}
  outline: dict[str, Any] = {}
  if "mask" in entry:
    area = int(run_lengths.area({**entry["mask"], "counts": entry["mask"]["counts"].encode()}))
    outline = {"area": area, "segmentation": entry["mask"]}
  return box_annotation(category, entry["box"], entry["score"], **outline)
