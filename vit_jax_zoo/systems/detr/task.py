"""Object detection as set prediction, and masks for what was detected.

Carion et al., arXiv:2005.12872: every image's targets are matched to predictions, each decoder
layer's anew, and the matched ones learn their target's class, box and (with a mask head) mask.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.metrics.detection import DetectionEvaluator
from vit_jax_zoo.metrics.mask_ap import InstanceEvaluator
from vit_jax_zoo.metrics.panoptic import (
  SCORE_THRESHOLD,
  PanopticEvaluator,
  found_segments,
  true_segments,
)
from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.detr import losses
from vit_jax_zoo.systems.detr.dense_auxiliary_loss import cell_losses
from vit_jax_zoo.systems.detr.figures import draw_query_attention, draw_segments
from vit_jax_zoo.systems.detr.matching import Matching, match
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.detection_utils import (
  image_size,
  is_target,
  last_attention,
  pixel_mask,
  target_boxes,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@runtime_checkable
class DetectionModel(base.Model, Protocol):
  """A model that answers with a fixed number of objects."""

  @property
  def num_queries(self) -> int:
    """How many objects it names in every image."""
    ...

  @property
  def mask_head(self) -> bool:
    """Whether it also predicts a mask for each of them."""
    ...


@dataclasses.dataclass(frozen=True)
class Detection(base.Task):
  """Learns to find objects (Eq. 2, section A.2).

  Batches: `image` [b h w 3], uint8 or floats in [0, 255], padded at the right and bottom;
  `image_size` int [b 2], height and width without the padding (without this key there is none);
  `boxes_cxcywh` float [b t 4], in shares of the image without its padding; `labels` int [b t],
  class ids; `is_target` bool [b t], False in padding; for a model with a mask head `masks` bool
  [b t h w]; `mask` bool [b], False for rows that are padding altogether. Evaluation also reads
  `original_size` int [b 2], height and width before the image was resized, `image_id` int [b],
  `is_crowd` bool [b t] and `area` float [b t], in pixels of the original image; see
  `DetectionEvaluator`.

  Attributes:
    model: called as `model(images, pixel_mask, train=...)`, see `models.detr.Detr`.
    num_classes: highest class id + 1, without "no object". COCO's ids are used as they are: 91.
    class_weight: of the class loss, and of the class in the matching.
    box_weight: of the L1 distance, likewise.
    giou_weight: of the generalised IoU, likewise.
    mask_weight: of the masks' focal loss.
    dice_weight: of the masks' dice loss.
    no_object_weight: of a query without a target, relative to one with, in the class loss.
    auxiliary_losses: every decoder layer is trained, not the last alone.
    cell_weight: of a loss on what the heads see in each cell of the encoder's map: the smallest
      target around the cell's centre. Not in the paper; it spares small models the long while until
      the decoder finds out where to look. The model needs `cell_predictions`.
    cell_steps: over so many training steps that weight falls to 0, along a line; None: it stays.
      As long as it counts, neighbouring cells all say what they see, and so do queries that look
      there; without it they are free to leave an object to one of them.
    image_mean: see `normalize_images`.
    image_std: as `image_mean`.
    class_names: by class id; for pictures and scores of single classes.
    score_threshold: pictures show what is at least as sure.
    draw_attention: pictures also show where the surest queries look.
    per_class: evaluations score each class, too.
    stuff_from: class ids from here on are stuff (91 in COCO); with it, evaluations also score
      panoptic quality, for which the model needs a mask head and batches a `segment_map`, see
      `PanopticEvaluator`. Without it the masks of a mask head are scored as COCO scores instances,
      see `InstanceEvaluator`.
    segment_threshold: queries that are at least as sure become segments there.
    backbone_file: an ImageNet classifier that the model's backbone starts from, where the run has
      no `init_from`: torchvision's or timm's ResNet, or Hugging Face's.
  """

  model: DetectionModel
  num_classes: int
  class_weight: float = 1.0
  box_weight: float = 5.0
  giou_weight: float = 2.0
  mask_weight: float = 1.0
  dice_weight: float = 1.0
  no_object_weight: float = 0.1
  auxiliary_losses: bool = True
  cell_weight: float = 0.0
  cell_steps: int | None = None
  image_mean: float | tuple[float, ...] = IMAGENET_MEAN
  image_std: float | tuple[float, ...] = IMAGENET_STD
  class_names: tuple[str, ...] = ()
  score_threshold: float = 0.7
  draw_attention: bool = False
  per_class: bool = False
  stuff_from: int | None = None
  segment_threshold: float = SCORE_THRESHOLD
  backbone_file: str | None = None

  def __post_init__(self) -> None:
    if self.num_classes < 1:
      raise ValueError(f"num_classes must be positive, not {self.num_classes}")
    for field in dataclasses.fields(self):
      if field.name.endswith("_weight") and getattr(self, field.name) < 0:
        raise ValueError(f"{field.name} must not be negative, but is {getattr(self, field.name)}")
    if self.cell_steps is not None and self.cell_steps < 1:
      raise ValueError(f"cell_steps must be positive, or None, not {self.cell_steps}")
    for field in ("score_threshold", "segment_threshold"):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(f"{field} must lie in [0, 1], but is {getattr(self, field)}")
    if len(self.class_names) > self.num_classes:
      raise ValueError(
        f"{len(self.class_names)} class_names were given for class ids below {self.num_classes}"
      )

  @property
  def best_metric(self) -> str:
    """COCO's average precision of boxes, or of masks; panoptic quality where that is scored."""
    if self.stuff_from is not None:
      return "pq"
    return "mask_ap" if self.model.mask_head else "box_ap"

  @property
  def weight_files(self) -> Mapping[str, str]:
    """The backbone's, if it is to start from a file."""
    return {"*/backbone": self.backbone_file} if self.backbone_file else {}

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns the model's fresh variables for images of this batch's shape."""
    return self.model.init(rng, self._images(batch), pixel_mask(batch), train=False)

  def normalizers(self, batch: base.Batch) -> dict[str, Array]:
    """Returns the numbers of examples and of boxes (at least 1), and the class loss's weight.

    How many queries get a target is known before they are matched: as many as there are targets,
    as long as there are queries.
    """
    mask = base.example_mask(batch)
    queries = self.model.num_queries
    count = jnp.sum(is_target(batch), axis=1)
    matched = jnp.minimum(count, queries)
    weight = matched + self.no_object_weight * (queries - matched)
    return {
      "examples": jnp.sum(mask.astype(jnp.float32)),
      "boxes": jnp.maximum(jnp.sum(count).astype(jnp.float32), 1.0),
      "class_weight": jnp.sum(jnp.where(mask, weight, 0.0)),
    }

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the set loss of the step's examples, as far as it is these examples'.

    The class loss is a weighted mean over all queries of the step, the others are divided by its
    number of boxes; both see all devices and micro-batches, where the paper's code averages class
    losses that each device has divided by its own weights.

    Metrics: "loss" and its unweighted parts "class_loss", "box_loss", "giou_loss", "mask_loss",
    "dice_loss" of the last layer, "class_loss_0" ... of the others, and "cell_loss"; "class_error",
    the share of matched queries with another class on top; "cardinality_error", how far the number
    of queries that see something is from the number of objects. A label that is no class makes the
    loss NaN: it stops a run, where a silent change of class would mislead it.
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}
    outputs, changed = self.model.apply(
      variables,
      self._images(batch),
      pixel_mask(batch),
      train=True,
      rngs={"dropout": context.rng},
      mutable=list(state),
    )
    mask = base.example_mask(batch)
    terms, matching = self._set_losses(outputs, batch, mask, context.normalizers)
    if "mask_logits" in outputs:
      terms |= self._mask_losses(outputs, batch, matching, context.normalizers)
    if self.cell_weight:
      sums = cell_losses(
        outputs, batch, weights=self._matching_weights, no_object_weight=self.no_object_weight
      )
      summed = jnp.sum(jnp.where(mask, sums, 0.0))
      terms["cell_loss"] = summed / context.normalizers["examples"]
    loss = sum(self._weight(name, context.step) * value for name, value in terms.items())
    loss = jnp.where(self._has_unknown_labels(batch), jnp.nan, loss)
    examples = jnp.sum(mask.astype(jnp.float32))
    # Shares of the whole step's loss: scaled so that micro-batches add up to it.
    means = {
      name: base.Mean(total=value * context.normalizers["examples"], count=examples)
      for name, value in ({"loss": loss} | terms).items()
    }
    metrics = means | self._error_metrics(outputs, batch, matching)
    return base.LossOutput(loss=loss, metrics=metrics, model_state={**state, **changed})

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns every query's best class, however unsure, and its box.

    Returns:
      `scores` float32 [b q], probability of the best class that is not "no object"; `labels` int32
      [b q], its id; `is_object` bool [b q], whether it beats "no object"; `boxes_xyxy` float32
      [b q 4], in pixels of the original image where the batch has its `original_size`, else of the
      image as it is given; with a mask head `mask_logits` float32 [b q i j], of the padded image;
      with `draw_attention` `attention` float32 [b q i j], where the last decoder layer looked, mean
      over its heads.
    """
    outputs, seen = self.model.apply(
      variables,
      self._images(batch),
      pixel_mask(batch),
      train=False,
      mutable=["intermediates"] if self.draw_attention else [],
    )
    probabilities = jax.nn.softmax(self._logits(outputs), axis=-1)
    scores = jnp.max(probabilities[..., :-1], axis=-1)
    size = batch.get("original_size", image_size(batch))
    height, width = jnp.asarray(size, jnp.float32).T[:, :, None, None]
    scale = jnp.concatenate([width, height, width, height], axis=-1)
    predictions = {
      "scores": scores,
      "labels": jnp.argmax(probabilities[..., :-1], axis=-1).astype(jnp.int32),
      "is_object": scores > probabilities[..., -1],
      "boxes_xyxy": cxcywh_to_xyxy(outputs["boxes_cxcywh"]) * scale,
    }
    if "mask_logits" in outputs:
      predictions["mask_logits"] = outputs["mask_logits"]
    if self.draw_attention:
      predictions["attention"] = last_attention(seen["intermediates"])
    return predictions

  def evaluator(self) -> DetectionEvaluator:
    """Returns an empty evaluator: COCO's scores of boxes; of masks; panoptic quality.

    Raises:
      ValueError: `stuff_from` asks for segments, for which the model has no masks.
    """
    if self.stuff_from is not None and not self.model.mask_head:
      raise ValueError(
        "stuff_from asks for segments, and the model has no mask head; set mask_head"
      )
    fields = {"class_names": self.class_names, "per_class": self.per_class}
    if self.stuff_from is None:
      kind = InstanceEvaluator if self.model.mask_head else DetectionEvaluator
      return kind(self.num_classes, **fields)
    return PanopticEvaluator(
      self.num_classes, self.stuff_from, score_threshold=self.segment_threshold, **fields
    )

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws training images with their boxes."""
    return {"batch": draw.draw_targets(batch, self.class_names)}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws predicted boxes beside the true ones."""
    if not np.asarray(batch.get("mask", True)).any():
      return {}
    figure = draw.draw_predictions(
      batch, predictions, self.class_names, threshold=self.score_threshold
    )
    figures = {"predictions": figure}
    if self.draw_attention:
      figures["attention"] = draw_query_attention(
        batch, predictions, self.class_names, threshold=self.score_threshold
      )
    if self.stuff_from is not None:
      figures["segments"] = self._draw_segments(batch, predictions, self.stuff_from)
    return figures

  def _draw_segments(
    self,
    batch: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    stuff_from: int,
    max_images: int = 4,
  ) -> Figure:
    rows = draw.real_rows(batch)[:max_images]
    threshold = self.segment_threshold
    truths = [true_segments(batch, row) for row in rows]
    finds = [found_segments(batch, predictions, r, stuff_from, threshold=threshold) for r in rows]
    return draw_segments(
      [(truth.segment_map, truth.labels) for truth in truths],
      [(find.segment_map, find.labels) for find in finds],
      [draw.image_of(batch, row) for row in rows],
      self.class_names,
    )

  @property
  def _matching_weights(self) -> tuple[float, float, float]:
    return self.class_weight, self.box_weight, self.giou_weight

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)

  def _logits(self, outputs: Mapping[str, Any]) -> Float[Array, "b q k"]:
    logits = outputs["logits"]
    if logits.shape[-1] != self.num_classes + 1:
      raise ValueError(
        f"the model has {logits.shape[-1] - 1} classes beside 'no object', but the task has "
        f"{self.num_classes}; give both the same num_classes (highest class id + 1)"
      )
    return logits.astype(jnp.float32)

  def _has_unknown_labels(self, batch: base.Batch) -> Bool[Array, ""]:
    labels = jnp.asarray(batch["labels"])
    return jnp.any(is_target(batch) & ((labels < 0) | (labels >= self.num_classes)))

  def _set_losses(
    self,
    outputs: Mapping[str, Any],
    batch: base.Batch,
    mask: Bool[Array, " b"],
    normalizers: Mapping[str, Array],
  ) -> tuple[dict[str, Array], Matching]:
    """Returns the unweighted terms of every decoder layer, and the last layer's matching."""
    logits, boxes = self._logits(outputs)[:, None], outputs["boxes_cxcywh"][:, None]
    if self.auxiliary_losses:
      earlier = outputs["auxiliary_logits"], outputs["auxiliary_boxes_cxcywh"]
      logits = jnp.concatenate([jnp.moveaxis(earlier[0], 1, 0), logits], axis=1)
      boxes = jnp.concatenate([jnp.moveaxis(earlier[1], 1, 0), boxes], axis=1)
    labels, targets, real = (
      jnp.broadcast_to(x[:, None], (len(x), logits.shape[1], *x.shape[1:]))
      for x in (jnp.asarray(batch["labels"]), target_boxes(batch), is_target(batch))
    )
    cost = losses.matching_cost(logits, boxes, labels, targets, weights=self._matching_weights)
    matching = match(cost, real)
    of_query = matching.target_of_query
    class_loss, _ = losses.class_losses(logits, labels, of_query, self.no_object_weight)
    class_loss = jnp.where(mask[:, None, None], class_loss, 0.0)
    distance, overlap = losses.box_losses(boxes, targets, of_query)
    sums = {
      "class_loss": jnp.sum(class_loss, axis=(0, 2)) / normalizers["class_weight"],
      "box_loss": jnp.sum(distance, axis=(0, 2)) / normalizers["boxes"],
      "giou_loss": jnp.sum(overlap, axis=(0, 2)) / normalizers["boxes"],
    }
    terms = {name: values[-1] for name, values in sums.items()}
    for layer in range(logits.shape[1] - 1):
      terms |= {f"{name}_{layer}": values[layer] for name, values in sums.items()}
    return terms, Matching(of_query[:, -1], matching.query_of_target[:, -1])

  def _mask_losses(
    self,
    outputs: Mapping[str, Any],
    batch: base.Batch,
    matching: Matching,
    normalizers: Mapping[str, Array],
  ) -> dict[str, Array]:
    if "masks" not in batch:
      raise ValueError(
        "the model has a mask head, but the batch has no 'masks'; load them with the data, or use "
        "the model without its mask head"
      )
    masks = jnp.asarray(batch["masks"]).astype(bool)
    focal, dice = losses.mask_losses(outputs["mask_logits"], masks, matching.query_of_target)
    boxes = normalizers["boxes"]
    return {"mask_loss": jnp.sum(focal) / boxes, "dice_loss": jnp.sum(dice) / boxes}

  def _weight(self, term: str, step: Int[Array, ""]) -> float | Float[Array, ""]:
    weight = getattr(self, term.split("_loss")[0] + "_weight")
    if term == "cell_loss" and self.cell_steps is not None:
      return weight * jnp.maximum(0.0, 1.0 - step / self.cell_steps)
    return weight

  def _error_metrics(
    self, outputs: Mapping[str, Any], batch: base.Batch, matching: Matching
  ) -> dict[str, base.Mean]:
    best = jnp.argmax(self._logits(outputs), axis=-1)
    matched = matching.target_of_query >= 0
    wanted = losses.take_targets(jnp.asarray(batch["labels"]), matching.target_of_query)
    seen = jnp.sum(best != self.num_classes, axis=1)
    difference = jnp.abs(seen - jnp.sum(is_target(batch), axis=1))
    return {
      "class_error": base.Mean.of((best != wanted).astype(jnp.float32), matched),
      "cardinality_error": base.Mean.of(difference.astype(jnp.float32), base.example_mask(batch)),
    }
