"""Semantic segmentation: the class of every pixel."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.metrics.segmentation import SegmentationEvaluator
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.fpt import figures as draw
from vit_jax_zoo.systems.fpt.attention_figures import draw_looks, explain_looks, middles
from vit_jax_zoo.tasks import base

IGNORE = 255
"""The label of pixels that do not count."""


@dataclasses.dataclass(frozen=True)
class SemanticSegmentation(base.Task):
  """Learns to name the class of every pixel, by cross-entropy.

  Batches: `image` [b h w 3], uint8 or floats in [0, 255], padded at the right and bottom;
  `image_size` int [b 2], height and width without the padding (without this key there is none);
  `label_map` int [b h w], class ids, 255 where nothing is to be learned or scored, as in the
  padding; `mask` bool [b], False for rows that are padding altogether.

  Attributes:
    model: called as `model(images, train=...)`, see `models.fpt.PyramidSegmenter`.
    num_classes: number of classes.
    auxiliary_weight: of the auxiliary classifier's loss, if the model has one.
    class_weights: of each class's pixels in the loss, a mean weighted by them; none: all alike.
    image_mean: see `normalize_images`.
    image_std: as `image_mean`.
    class_names: by class id; for pictures and scores of single classes.
    per_class: evaluations score each class, too.
    backbone_file: an ImageNet classifier that the model's backbone starts from, where the run has
      no `init_from`: a file with a ResNet, see `weights.backbones`, or a workdir of ours.
  """

  name: ClassVar[str] = "semantic_segmentation"
  keeps_aspect_ratio: ClassVar[bool] = True

  model: base.Model
  num_classes: int
  auxiliary_weight: float = 0.4
  class_weights: tuple[float, ...] = ()
  image_mean: float | tuple[float, ...] = IMAGENET_MEAN
  image_std: float | tuple[float, ...] = IMAGENET_STD
  class_names: tuple[str, ...] = ()
  per_class: bool = False
  backbone_file: str | None = None

  def __post_init__(self) -> None:
    if self.num_classes < 1:
      raise ValueError(f"num_classes must be positive, not {self.num_classes}")
    if self.num_classes > IGNORE:
      raise ValueError(f"num_classes must not exceed {IGNORE}, the label that does not count")
    if self.auxiliary_weight < 0:
      raise ValueError(f"auxiliary_weight must not be negative, but is {self.auxiliary_weight}")
    if self.class_weights and len(self.class_weights) != self.num_classes:
      raise ValueError(
        f"{len(self.class_weights)} class_weights were given for {self.num_classes} classes"
      )
    if any(weight < 0 for weight in self.class_weights) or not any(self.class_weights or (1,)):
      raise ValueError(
        f"class_weights must not be negative, nor all 0, but are {self.class_weights}"
      )
    if len(self.class_names) > self.num_classes:
      raise ValueError(
        f"{len(self.class_names)} class_names were given for {self.num_classes} classes"
      )

  @property
  def best_metric(self) -> str:
    """Mean intersection over union."""
    return "miou"

  @property
  def weight_files(self) -> Mapping[str, str]:
    """The backbone's, if it is to start from a file."""
    return {"*/backbone": self.backbone_file} if self.backbone_file else {}

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns the model's fresh variables for images of this batch's shape."""
    return self.model.init(rng, self._images(batch), train=False)

  def normalizers(self, batch: base.Batch) -> dict[str, Array]:
    """Returns the number of examples, and the sum of the labelled pixels' weights (0: 1)."""
    pixels = jnp.sum(self._pixel_weights(batch))
    return {**super().normalizers(batch), "pixels": jnp.where(pixels > 0, pixels, 1.0)}

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the mean cross-entropy of the step's labelled pixels, as far as it is these images'.

    Each counts by its class's weight.

    Metrics: "loss", with "auxiliary_loss", unweighted, where there is one; "pixel_accuracy". A
    label that is no class makes the loss NaN: it stops a run, where a silent 0 would mislead it.
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}
    outputs, changed = self.model.apply(
      variables,
      self._images(batch),
      train=True,
      rngs={"dropout": context.rng},
      mutable=list(state),
    )
    labels, labelled = jnp.asarray(batch["label_map"]).astype(jnp.int32), self._is_labelled(batch)
    weights = self._pixel_weights(batch)
    logits = self._enlarged(outputs["logits"], batch)
    losses = self._losses(logits, labels, labelled)
    metrics = {"pixel_accuracy": _accuracy(logits, labels, labelled)}
    total = losses
    if "auxiliary_logits" in outputs:
      auxiliary = self._losses(self._enlarged(outputs["auxiliary_logits"], batch), labels, labelled)
      metrics["auxiliary_loss"] = base.Mean.of(auxiliary, weights)
      total = losses + self.auxiliary_weight * auxiliary
    unknown = jnp.any(labelled & ((labels < 0) | (labels >= self.num_classes)))
    total = jnp.where(unknown, jnp.nan, total)
    metrics["loss"] = base.Mean.of(total, weights)
    return base.LossOutput(
      loss=jnp.sum(total * weights) / context.normalizers["pixels"],
      metrics=metrics,
      model_state={**state, **changed},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns the most likely class of each pixel.

    Returns:
      `label_map` int32 [b h w], of the image with its padding; `confidence` float32 [b h w], that
      class's probability.
    """
    outputs = self.model.apply(variables, self._images(batch), train=False)
    logits = self._enlarged(outputs["logits"], batch)
    best = jnp.max(logits, axis=-1)
    confidence = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1))
    return {
      "label_map": jnp.argmax(logits, axis=-1).astype(jnp.int32),
      "confidence": confidence.astype(jnp.float32),
    }

  def explain(self, variables: base.Variables, batch: base.Batch) -> dict[str, Any]:
    """Returns where a feature pyramid transformer's levels look from the images' middles.

    Raises:
      ValueError: see `pyramid_looks.explain_looks`.
    """
    look = functools.partial(self.model.apply, train=False, mutable=["intermediates"])

    def run(first: base.Batch) -> Mapping[str, Any]:
      return look(variables, self._images(first))[1]["intermediates"]["transformer"]

    return explain_looks(self.model, run, batch, middles(batch))

  def draw_explanation(self, explanation: Any) -> base.Explained:
    """Draws where the levels look."""
    return base.Explained({"levels": draw_looks(explanation, self.model)}, {})

  def evaluator(self) -> SegmentationEvaluator:
    """Returns an empty evaluator: mean intersection over union, accuracies."""
    return SegmentationEvaluator(
      self.num_classes,
      ignore_label=IGNORE,
      class_names=self.class_names,
      per_class=self.per_class,
    )

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws training images with their label maps."""
    return {"batch": draw.draw_label_maps(batch, self.class_names)}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws predicted label maps beside the true ones."""
    if not np.asarray(batch.get("mask", True)).any():
      return {}
    figure = draw.draw_label_maps(batch, self.class_names, predictions["label_map"])
    return {"predictions": figure}

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    images = normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)
    if "image_size" not in batch:
      return images
    return jnp.where(_pixel_mask(batch)[..., None], images, 0.0)

  def _is_labelled(self, batch: base.Batch) -> Bool[Array, "b h w"]:
    labels = jnp.asarray(batch["label_map"])
    return (labels != IGNORE) & base.example_mask(batch)[:, None, None]

  def _pixel_weights(self, batch: base.Batch) -> Float[Array, "b h w"]:
    """Returns how much each pixel counts; what is not labelled does not."""
    labelled = self._is_labelled(batch).astype(jnp.float32)
    if not self.class_weights:
      return labelled
    return labelled * jnp.take(
      jnp.asarray(self.class_weights), jnp.asarray(batch["label_map"]), mode="clip"
    )

  def _enlarged(self, logits: Float[Array, "b i j k"], batch: base.Batch) -> Array:
    """Enlarges logits bilinearly by the model's stride, pixels' middles aligned, and cuts the rest.

    (Not to the image's size: maps are rounded up, and would be pressed into images of odd sides.)
    """
    if logits.shape[-1] != self.num_classes:
      raise ValueError(
        f"the model has {logits.shape[-1]} classes, but the task {self.num_classes}; give both the "
        "same num_classes"
      )
    height, width = batch["image"].shape[1:3]
    rows, columns = logits.shape[1:3]
    stride = 1
    while stride * rows < height or stride * columns < width:
      stride *= 2
    shape = (len(logits), stride * rows, stride * columns, self.num_classes)
    large = jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
    return large[:, :height, :width]

  def _losses(
    self,
    logits: Float[Array, "b h w k"],
    labels: Int[Array, "b h w"],
    labelled: Bool[Array, "b h w"],
  ) -> Float[Array, "b h w"]:
    """Returns the cross-entropy of each pixel, 0 where nothing is to be learned."""
    known = jnp.clip(labels, 0, self.num_classes - 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, known)
    return jnp.where(labelled, losses, 0.0)


def _accuracy(
  logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"], labelled: Bool[Array, "b h w"]
) -> base.Mean:
  return base.Mean.of((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32), labelled)


def _pixel_mask(batch: base.Batch) -> Bool[Array, "b h w"]:
  """Returns where a pixel belongs to an image, and not to its padding."""
  size = jnp.asarray(batch["image_size"])[:, :, None]
  rows, columns = (jnp.arange(side)[None] for side in batch["image"].shape[1:3])
  return (rows < size[:, 0])[:, :, None] & (columns < size[:, 1])[:, None, :]
