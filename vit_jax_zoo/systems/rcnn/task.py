"""Two-stage detection task (arXiv:1506.01497, arXiv:1703.06870): losses, detections, evaluation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.metrics.detection import DetectionEvaluator
from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy, pairwise_iou
from vit_jax_zoo.ops.checks import check_fractions, check_not_negative, check_positive
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.ops.sharding import on_own_examples
from vit_jax_zoo.systems.rcnn import boxes as box_ops
from vit_jax_zoo.systems.rcnn.masks import BoxMaskEvaluator, draw_masks
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import image_size, is_target


class Rois(NamedTuple):
  """Sampled proposals of the second stage, foreground first."""

  boxes_xyxy: Float[Array, "b r 4"]
  target: Int[Array, "b r"]
  labels: Int[Array, "b r"]  # the background's: `num_classes`
  exists: Bool[Array, "b r"]
  foreground: Bool[Array, "b r"]


@dataclasses.dataclass(frozen=True)
class InstanceDetection(base.Task):
  """Object detection in two stages, with instance masks if the model has a mask head.

  Batches: `image`, `image_size`, `boxes_cxcywh`, `labels`, `is_target`, optional `is_crowd`,
  `masks` for a mask head, and the evaluator's keys. Argument names are torchvision's; defaults are
  those of FPT's official code (Detectron's except for `box_smooth_l1_beta`).
  """

  name: ClassVar[str] = "instance_detection"
  hub_task: ClassVar[str | None] = "object-detection"
  keeps_aspect_ratio: ClassVar[bool] = True
  predicts_boxes: ClassVar[bool] = True

  model: Any  # a `model.RCNN`
  num_classes: int  # highest class id + 1
  rpn_batch_size_per_image: int = 256  # anchors per image in the first stage's loss
  rpn_positive_fraction: float = 0.5  # maximum fraction of foreground among them
  rpn_fg_iou_thresh: float = 0.7  # minimum IoU of foreground anchors
  rpn_bg_iou_thresh: float = 0.3  # upper bound of the IoU of background anchors
  rpn_inside_only: bool = True  # ignores anchors that cross the image's border
  rpn_smooth_l1_beta: float = 1 / 9  # beta of the first stage's smooth L1 loss
  box_batch_size_per_image: int = 512  # proposals per image in the second stage's loss
  box_positive_fraction: float = 0.25  # maximum fraction of foreground among them
  box_fg_iou_thresh: float = 0.5  # minimum IoU of foreground proposals
  bbox_reg_weights: box_ops.Weights = (10.0, 10.0, 5.0, 5.0)  # of the second stage's deltas
  box_smooth_l1_beta: float = 1 / 3  # beta of the second stage's smooth L1 loss
  box_score_thresh: float = 0.05  # detections with a lower score are dropped
  box_nms_thresh: float = 0.5  # IoU threshold of suppression among detections of a class
  box_detections_per_img: int = 100  # maximum number of detections
  # see `masks.paste_masks`; None: the convention's. torchvision's published weights have another.
  mask_paste: str | None = None
  image_mean: float | tuple[float, ...] = IMAGENET_MEAN  # see `normalize_images`
  image_std: float | tuple[float, ...] = IMAGENET_STD
  class_names: tuple[str, ...] = ()  # names by class id, for figures and per-class scores
  score_threshold: float = 0.7  # minimum score in figures
  per_class: bool = False  # also evaluates each class
  # pretrained weights, used without `init_from`: a published file or a workdir
  backbone_file: str | None = None  # see `weights.backbones`
  neck_file: str | None = None

  def __post_init__(self) -> None:
    names = [field.name for field in dataclasses.fields(self)]
    check_fractions(self, *(n for n in names if n.endswith(("_fraction", "_thresh", "_threshold"))))
    check_not_negative(self, *(name for name in names if name.endswith("_beta")))
    counts = ("rpn_batch_size_per_image", "box_batch_size_per_image", "box_detections_per_img")
    check_positive(self, "num_classes", *counts)

  @property
  def best_metric(self) -> str:
    return "box_ap"

  @property
  def padding_dependent(self) -> str:
    return "all outputs a little (by convolutions across the border, as in torchvision)"

  @property
  def paste_convention(self) -> str:
    return self.mask_paste or self.model.convention_details.mask_paste

  @property
  def weight_files(self) -> Mapping[str, str]:
    files = {"*/backbone": self.backbone_file, "*/neck": self.neck_file}
    return {part: file for part, file in files.items() if file}

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    return self.model.init(rng, self._images(batch), image_size(batch), train=False)

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the losses of both stages.

    The first stage's are divided by `rpn_batch_size_per_image` and the step's number of images, as
    in the official code. The second stage's are means over the sampled proposals (for masks: the
    foreground) of all devices; of micro-batches separately, weighted by their number of images.

    Metrics: "loss" and its terms "objectness_loss", "anchor_box_loss", "class_loss", "box_loss",
    "mask_loss"; "class_accuracy" of the sampled proposals; "proposal_recall", the fraction of
    targets with a proposal of IoU 0.5 or more. An unknown label makes the loss NaN.
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}
    dropout, anchor_rng, roi_rng = jax.random.split(context.rng, 3)

    def run(method: str, *args: Any) -> Any:
      nonlocal state
      outputs, changed = self.model.apply(
        {"params": variables["params"], **state},
        *args,
        train=True,
        rngs={"dropout": jax.random.fold_in(dropout, len(method))},
        mutable=list(state),
        method=method,
      )
      state = {**state, **changed}
      return outputs

    found = run("propose", self._images(batch), image_size(batch))
    targets, mask = self._targets(batch), base.example_mask(batch)
    rois = self._sampled_proposals(found, targets, mask, roi_rng)
    logits, deltas = run("classify", found.pyramid, rois.boxes_xyxy)
    examples, count = jnp.sum(mask.astype(jnp.float32)), context.normalizers["examples"]
    terms = self._anchor_losses(found, targets, batch, anchor_rng, count)
    terms |= self._box_losses(logits, deltas, rois, targets, examples / count)
    if self.model.has_masks:
      max_foreground = max(round(self.box_batch_size_per_image * self.box_positive_fraction), 1)
      foreground = Rois(*(x[:, :max_foreground] for x in rois))
      masks = run("segment", found.pyramid, foreground.boxes_xyxy)
      terms["mask_loss"] = examples / count * self._mask_loss(masks, foreground, batch)
    unknown = targets.is_target & ((targets.labels < 0) | (targets.labels >= self.num_classes))
    loss = jnp.where(jnp.any(unknown), jnp.nan, sum(terms.values()))
    metrics = {k: base.Mean(x * count, examples) for k, x in ({"loss": loss} | terms).items()}
    correct = (jnp.argmax(logits, axis=-1).astype(jnp.int32) == rois.labels).astype(jnp.float32)
    metrics["class_accuracy"] = base.Mean.of(correct, rois.exists)
    overlap = pairwise_iou(targets.boxes_xyxy, found.boxes_xyxy)
    covered = jnp.any((overlap >= 0.5) & found.exists[:, None], axis=2)
    metrics["proposal_recall"] = base.Mean.of(covered.astype(jnp.float32), targets.is_target)
    return base.LossOutput(loss=loss, metrics=metrics, model_state=state)

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns the detections, highest score first, padded.

    `scores` float32 [b q], 0 for padding; `labels` int32 [b q]; `is_object` bool [b q], False for
    padding; `boxes_xyxy` float32 [b q 4] in pixels of `original_size` if the batch has it, else of
    the image; with a mask head `box_masks` float32 [b q m m], probabilities inside each box, see
    `masks.paste_masks`.
    """
    size = image_size(batch)
    found = self.model.apply(variables, self._images(batch), size, method="propose")
    logits, deltas = self.model.apply(variables, found.pyramid, found.boxes_xyxy, method="classify")
    thresholds, count = (self.box_score_thresh, self.box_nms_thresh), self.box_detections_per_img
    limits = box_ops.DetectionLimits(*thresholds, count, self.bbox_reg_weights)
    convention = self.model.convention_details
    detect = functools.partial(box_ops.choose_detections, limits=limits, convention=convention)
    arrays = logits, deltas, found.boxes_xyxy, found.exists, size
    boxes, scores, labels, exists = on_own_examples(jax.vmap(detect), *arrays)
    scale = jnp.asarray(batch.get("original_size", size), jnp.float32) / size.astype(jnp.float32)
    predictions = {
      "scores": scores,
      "labels": labels,
      "is_object": exists,
      "boxes_xyxy": boxes * jnp.tile(scale[:, None, ::-1], (1, 1, 2)),
    }
    if self.model.has_masks:
      masks = self.model.apply(variables, found.pyramid, boxes, method="segment")
      predictions["box_masks"] = jax.nn.sigmoid(select_class(masks, labels, axis=-1))
    return predictions

  def explain(self, variables: base.Variables, batch: base.Batch) -> dict[str, Any]:
    neck = self.model.neck_class
    if not hasattr(neck, "explain"):
      raise ValueError("the model's neck has no attention maps")

    def run(first: base.Batch) -> Mapping[str, Any]:
      inputs = self._images(first), image_size(first)
      _, sown = self.model.apply(variables, *inputs, method="propose", mutable=["intermediates"])
      return sown["intermediates"]["neck"]

    return neck.explain(run, batch, self.model.size_multiple)

  def draw_explanation(self, explanation: Any) -> base.Explained:
    figure = self.model.neck_class.draw_explanation(explanation, self.model.level_names)
    return base.Explained({"levels": figure}, {})

  def evaluator(self) -> DetectionEvaluator:
    fields = {"class_names": self.class_names, "per_class": self.per_class}
    if not self.model.has_masks:
      return DetectionEvaluator(self.num_classes, **fields)
    return BoxMaskEvaluator(self.num_classes, paste_convention=self.paste_convention, **fields)

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    return {"batch": draw.draw_targets(batch, self.class_names)}

  def figures(self, batch: base.Batch, predictions: base.Predictions) -> dict[str, Figure]:
    fields = {"class_names": self.class_names, "threshold": self.score_threshold}
    figures = {"predictions": draw.draw_predictions(batch, predictions, **fields)}
    if "box_masks" in predictions and "masks" in batch:
      figures["masks"] = draw_masks(batch, predictions, **fields)
    return figures

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)

  def _targets(self, batch: base.Batch) -> box_ops.Targets:
    real = is_target(batch)
    crowd = real & jnp.asarray(batch.get("is_crowd", jnp.zeros_like(real))).astype(bool)
    scale = jnp.tile(image_size(batch).astype(jnp.float32)[:, None, ::-1], (1, 1, 2))
    boxes = cxcywh_to_xyxy(jnp.asarray(batch["boxes_cxcywh"], jnp.float32)) * scale
    boxes = jnp.where(real[..., None], boxes, 0.0)
    return box_ops.Targets(boxes, jnp.asarray(batch["labels"]), real & ~crowd, crowd)

  def _anchor_losses(
    self, found: Any, targets: box_ops.Targets, batch: base.Batch, rng: jax.Array, count: Array
  ) -> dict[str, Array]:
    def one_image(
      rng: Array, logits: Array, deltas: Array, targets: box_ops.Targets, valid: Array
    ) -> tuple[Array, Array]:
      thresholds = self.rpn_fg_iou_thresh, self.rpn_bg_iou_thresh
      assigned = box_ops.assign_anchors(found.anchors_xyxy, targets, valid, *thresholds)
      size = self.rpn_batch_size_per_image, self.rpn_positive_fraction
      index, exists, foreground = box_ops.sample_boxes(rng, assigned, *size)
      labels = foreground.astype(jnp.float32)
      objectness = optax.sigmoid_binary_cross_entropy(logits[index], labels)
      target = take_rows(targets.boxes_xyxy, assigned.target[index])
      expected = box_ops.encode_boxes(target, found.anchors_xyxy[index])
      distance = smooth_l1(deltas[index] - expected, self.rpn_smooth_l1_beta)
      objectness = jnp.where(exists, objectness, 0)
      return jnp.sum(objectness), jnp.sum(jnp.where(foreground, distance, 0))

    mask = base.example_mask(batch)
    valid = jnp.broadcast_to(mask[:, None], (len(mask), len(found.anchors_xyxy)))
    if self.rpn_inside_only:
      limits = image_size(batch).astype(jnp.float32)[:, None, ::-1]
      valid &= jnp.all(found.anchors_xyxy[:, :2] >= 0, axis=1)[None]
      valid &= jnp.all(found.anchors_xyxy[None, :, 2:] <= limits, axis=2)
    keys = jax.random.split(rng, len(mask))
    losses = jax.vmap(one_image)(keys, found.objectness, found.deltas, targets, valid)
    objectness, distance = (jnp.sum(x) / (self.rpn_batch_size_per_image * count) for x in losses)
    return {"objectness_loss": objectness, "anchor_box_loss": distance}

  def _sampled_proposals(
    self, found: Any, targets: box_ops.Targets, mask: Bool[Array, " b"], rng: jax.Array
  ) -> Rois:
    def one_image(rng: Array, boxes: Array, exists: Array, targets: box_ops.Targets) -> Rois:
      assigned = box_ops.assign_proposals(boxes, targets, exists, self.box_fg_iou_thresh)
      size = self.box_batch_size_per_image, self.box_positive_fraction
      index, drawn, foreground = box_ops.sample_boxes(rng, assigned, *size)
      chosen, target = jnp.where(drawn[:, None], boxes[index], 0), assigned.target[index]
      labels = jnp.where(foreground, take_rows(targets.labels, target), self.num_classes)
      return Rois(chosen, target, labels, drawn, foreground)

    boxes = jnp.concatenate([found.boxes_xyxy, targets.boxes_xyxy], axis=1)
    exists = jnp.concatenate([found.exists & mask[:, None], targets.is_target], axis=1)
    return jax.vmap(one_image)(jax.random.split(rng, len(mask)), boxes, exists, targets)

  def _box_losses(
    self,
    logits: Float[Array, "b r k"],
    deltas: Float[Array, "b r k 4"],
    rois: Rois,
    targets: box_ops.Targets,
    fraction: Float[Array, ""],
  ) -> dict[str, Array]:
    if logits.shape[-1] != self.num_classes + 1:
      wrong = f"num_classes: {logits.shape[-1] - 1} in the model, {self.num_classes} in the task"
      raise ValueError(f"{wrong}; expected the highest class id + 1 in both")
    boxes = jax.vmap(take_rows)(targets.boxes_xyxy, rois.target)
    expected = box_ops.encode_boxes(boxes, rois.boxes_xyxy, self.bbox_reg_weights)
    predicted = select_class(deltas, rois.labels, axis=-2)
    distance = smooth_l1(predicted - expected, self.box_smooth_l1_beta)
    count = jnp.maximum(jnp.sum(rois.exists.astype(jnp.float32)), 1) / fraction
    return {
      "class_loss": jnp.sum(jnp.where(rois.exists, class_loss(logits, rois.labels), 0)) / count,
      "box_loss": jnp.sum(jnp.where(rois.foreground, distance, 0)) / count,
    }

  def _mask_loss(
    self, logits: Float[Array, "b r m m k"], rois: Rois, batch: base.Batch
  ) -> Float[Array, ""]:
    if "masks" not in batch:
      fix = "Set masks=True in load_objects, or model.mask_head=None"
      raise ValueError(f"masks: missing in the batch; expected them for the mask head. {fix}")
    masks = jnp.asarray(batch["masks"]).astype(bool)
    if not masks.shape[1]:
      return jnp.zeros(())
    crop = functools.partial(box_ops.crop_masks, size=logits.shape[2])
    expected = jax.vmap(crop)(masks, rois.target, rois.boxes_xyxy)
    loss = mask_loss(select_class(logits, rois.labels, axis=-1), expected)
    count = jnp.maximum(jnp.sum(rois.foreground.astype(jnp.float32)), 1)
    return jnp.sum(jnp.where(rois.foreground, loss, 0)) / count


def smooth_l1(errors: Float[Array, "*n d"], beta: float) -> Float[Array, "*n"]:
  """Returns the smooth L1 loss (arXiv:1504.08083, Eq. 3), summed over the last axis; beta 0: L1."""
  each = optax.huber_loss(errors, delta=beta) / beta if beta else jnp.abs(errors)
  return jnp.sum(each, axis=-1)


def class_loss(logits: Float[Array, "*n k"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns the cross-entropy; labels are clipped to the classes."""
  return -select_class(jax.nn.log_softmax(logits), labels, axis=-1)


def mask_loss(logits: Float[Array, "*n m m"], masks: Bool[Array, "*n m m"]) -> Float[Array, "*n"]:
  """Returns the binary cross-entropy of each mask, mean over pixels."""
  losses = optax.sigmoid_binary_cross_entropy(logits, masks.astype(logits.dtype))
  return jnp.mean(losses, axis=(-2, -1))


def select_class(values: Array, labels: Int[Array, "*n"], axis: int) -> Array:
  """Returns `values` [*n ...] at each label along the axis of classes; labels are clipped to it."""
  labels = jnp.clip(labels, 0, values.shape[axis] - 1)
  index = jnp.expand_dims(labels, tuple(range(labels.ndim, values.ndim)))
  return jnp.take_along_axis(values, index, axis=axis).squeeze(axis)


def take_rows(values: Array, index: Int[Array, " r"]) -> Array:
  """Returns the rows at `index`; zeros if `values` has none."""
  if not len(values):
    return jnp.zeros((len(index), *values.shape[1:]), values.dtype)
  return values[index]
