"""Generative modelling of pixels: the next one, or those that are masked; with labels if wanted.

Chen et al., "Generative Pretraining from Pixels", ICML 2020, sections 2.1, 2.2 and 3.4.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.metrics.majority_vote import majority_vote
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.igpt import figures as draw
from vit_jax_zoo.systems.igpt import palette as host
from vit_jax_zoo.systems.igpt.bigram import count_bigrams, log_bigrams, score_bigrams
from vit_jax_zoo.systems.igpt.metrics import PixelEvaluator
from vit_jax_zoo.systems.igpt.palette import cluster_colors
from vit_jax_zoo.tasks import base


class PixelModel(base.Model, Protocol):
  """What the task asks of a model; `models.igpt.ImageGPT` has it."""

  num_colors: int
  num_positions: int
  num_classes: int | None
  causal: bool

  def complete(self, *args: Any, **kwargs: Any) -> Any:
    """Draws the pixels of images from a length on."""
    ...


@dataclasses.dataclass(frozen=True)
class PixelModelling(base.Task):
  """Learns the distribution of images as sequences of colours.

  A causal model predicts each pixel from those before, and its loss is the mean over all of them
  (Eq. 2). Another predicts masked pixels from visible ones: each is masked with
  `mask_probability`, and an image's loss is the mean over those that are, so that images weigh the
  same however many that is (Eq. 3). With `class_weight` the cross-entropy of the label is added.

  Batches: `image` [b h w 3], uint8 or floats in [0, 255]; `label` int [b], needed with
  `class_weight`; `mask` [b], True for real rows. When a batch to be predicted has `prefix_length`
  int [b], its images are completed from so many pixels on.

  Attributes:
    model: a `PixelModel`.
    class_weight: of the label's loss; 0 for pre-training, 1 for fine-tuning in the paper.
    mask_probability: of a pixel, in models that are not causal.
    maskings: so often an image is masked to be classified by a model that is not causal, in
      predictions and by probes of its features; the majority names the label (section 4, BERT).
    palette: file to read the colours from, see `palette.read_palette`; None: they are fitted to
      the training images before the first step.
    palette_images: so many training images are used for that, and for the bigram baseline.
    temperature: of completions.
    top_k: completions draw among so many of the likeliest colours; None: among all.
    completions: how many of each image.
    seed: of masks in evaluations, of completions, and of the palette.
  """

  name: ClassVar[str] = "pixel_modelling"

  model: Any  # a PixelModel; Python 3.13 cannot tell a Linen module for one
  class_weight: float = 0.0
  mask_probability: float = 0.15
  maskings: int = 5
  palette: str | None = None
  palette_images: int = 2048
  temperature: float = 1.0
  top_k: int | None = None
  completions: int = 4
  seed: int = 0

  def __post_init__(self) -> None:
    if not 0 < self.mask_probability < 1:
      raise ValueError(f"mask_probability must lie in (0, 1), but is {self.mask_probability}")
    if self.class_weight < 0 or self.temperature < 0:
      raise ValueError(
        "class_weight and temperature cannot be negative, but are "
        f"{self.class_weight} and {self.temperature}"
      )
    counts = (self.maskings, self.palette_images, self.completions)
    if min(*counts, 1 if self.top_k is None else self.top_k) < 1:
      raise ValueError(
        "maskings, palette_images, completions and top_k must be positive, but are "
        f"{self.maskings}, {self.palette_images}, {self.completions} and {self.top_k}"
      )
    if self.class_weight and self.model.num_classes is None:
      raise ValueError(
        f"class_weight is {self.class_weight}, but the model has no num_classes; set it"
      )

  @property
  def best_metric(self) -> str:
    """Accuracy when labels are learned, else the mean log-likelihood of a pixel."""
    return "accuracy" if self.class_weight else "log_likelihood"

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns the model's fresh variables, and a bigram baseline that knows nothing yet."""
    variables, colors = self.model.init(rng, self._images(batch)), self.model.num_colors
    blank = jnp.full((colors + 1, colors), -jnp.log(float(colors)), jnp.float32)
    return {**variables, "baseline": {"bigram": blank}}

  def prepare(self, batches: Iterable[Mapping[str, np.ndarray]]) -> base.Variables:
    """Returns the palette, read or fitted, and the bigram baseline of the first images."""
    images = _take(batches, self.palette_images)
    colors = self.model.num_colors
    if self.palette is None:
      clusters = host.fit_palette(images, colors, seed=self.seed)
      logging.info("fitted a palette of %d colours to %d images", colors, len(images))
    else:
      clusters = host.read_palette(self.palette)
      if len(clusters) != colors:
        raise ValueError(
          f"the palette {self.palette} has {len(clusters)} colours, but the model {colors}; "
          f"set the model's num_colors={len(clusters)}"
        )
    tokens = host.encode(images, clusters).reshape(len(images), -1)
    return {
      "palette": {"clusters": clusters},
      "baseline": {"bigram": log_bigrams(count_bigrams(tokens, colors))},
    }

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the mean loss of the step's examples, as far as it is these examples'.

    Metrics: "nats" (of a pixel), "loss", and with labels "class_loss" and "accuracy".
    """
    outputs, nats = self._model(variables, batch, context.rng, train=True)
    real = base.example_mask(batch)
    losses, metrics = nats, {"nats": base.Mean.of(nats, real)}
    if self.class_weight:
      class_losses, correct = self._classify(outputs, batch)
      losses = nats + self.class_weight * class_losses
      metrics["class_loss"] = base.Mean.of(class_losses, real)
      metrics["accuracy"] = base.Mean.of(correct.astype(jnp.float32), real)
    losses = jnp.where(real, losses, 0.0)
    return base.LossOutput(
      loss=jnp.sum(losses) / context.normalizers["examples"],
      metrics={"loss": base.Mean.of(losses, real), **metrics},
      model_state={name: tree for name, tree in variables.items() if name != "params"},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Scores images, and completes them where asked.

    Returns:
      `nats` float32 [b], the mean over an image's pixels (or masked pixels; the masks are always
      the same); of a causal model `bigram_nats` [b], those of the baseline; of a model with a head
      `labels` int32 [b], and `class_loss` [b] and `correct` [b] if the batch has labels too; and
      with `prefix_length`, `completions` uint8 [b completions h w 3] and `quantized` uint8
      [b h w 3], the image in the palette's colours. Where there are several `maskings`, losses are
      the means over them.
    """
    if not self.model.causal and self.model.num_classes is not None:
      return self._vote(variables, batch)
    outputs, nats = self._model(variables, batch, self._view(0), train=False)
    predictions = {"nats": nats}
    if self.model.causal:
      bigram = variables["baseline"]["bigram"]
      predictions["bigram_nats"] = score_bigrams(outputs["tokens"], bigram)
    if self.model.num_classes is not None:
      predictions["labels"] = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)
      if "label" in batch:
        predictions["class_loss"], predictions["correct"] = self._classify(outputs, batch)
    if "prefix_length" in batch:
      rng = jax.random.key(self.seed)
      predictions |= self._complete(variables, batch, outputs["tokens"], rng)
    return predictions

  def _vote(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Predicts labels by the majority of `maskings` views; losses are means over them."""

    def look(view: Array) -> dict[str, Array]:
      outputs, nats = self._model(variables, batch, self._view(view), train=False)
      seen = {"nats": nats, "labels": jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)}
      return seen | ({"class_loss": self._classify(outputs, batch)[0]} if "label" in batch else {})

    seen = jax.lax.map(look, jnp.arange(self.maskings))
    labels = majority_vote(seen.pop("labels"), jax.random.key(self.seed))
    predictions = {name: jnp.mean(losses, axis=0) for name, losses in seen.items()}
    if "label" in batch:
      predictions["correct"] = labels == jnp.asarray(batch["label"])
    return predictions | {"labels": labels}

  @property
  def feature_views(self) -> int:
    """`maskings` of a model that is not causal."""
    return 1 if self.model.causal else self.maskings

  def features(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns `layers` [b depth+1 d], see `ImageGPT.from_tokens`, and `pixels` [b h*w*3].

    A model that is not causal sees images masked as in training, each `view` in its own way.
    """
    view = jnp.asarray(batch["view"])[0] if "view" in batch else 0
    outputs, _ = self._model(variables, batch, self._view(view), train=False)
    images = self._images(batch)
    pixels = images.reshape(images.shape[0], -1)
    return {"layers": outputs["layer_features"], "pixels": pixels}

  def evaluator(self) -> PixelEvaluator:
    """Returns an empty evaluator."""
    return PixelEvaluator()

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws training images."""
    return {"batch": draw.draw_images(batch["image"], title="Training batch")}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws completions beside what was given and what was there, where there are any."""
    real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
    if "completions" not in predictions or not real.any():
      return {}
    figure = draw.draw_completions(
      np.asarray(predictions["quantized"])[real],
      np.asarray(batch["prefix_length"])[real],
      np.asarray(predictions["completions"])[real],
    )
    return {"completions": figure}

  def _view(self, view: int | Array) -> jax.Array:
    """Returns the key of an evaluation's masks: the same each time."""
    return jax.random.fold_in(jax.random.key(self.seed), view)

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]))

  def _model(
    self, variables: base.Variables, batch: base.Batch, rng: jax.Array, *, train: bool
  ) -> tuple[dict[str, Array], Float[Array, " b"]]:
    """Returns the model's outputs, and each image's loss in nats a pixel."""
    images = self._images(batch)
    visible = None
    if not self.model.causal:
      shape = (images.shape[0], images.shape[1] * images.shape[2])
      visible = jax.random.uniform(rng, shape) > self.mask_probability
    model_variables = {name: tree for name, tree in variables.items() if name != "baseline"}
    outputs = self.model.apply(model_variables, images, visible=visible, train=train)
    return outputs, pixel_nats(outputs["pixel_logits"], outputs["tokens"], visible)

  def _classify(
    self, outputs: Mapping[str, Array], batch: base.Batch
  ) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    labels = jnp.asarray(batch["label"])
    logits = outputs["logits"]
    # A label that is no class gives NaN, which stops a run; in rows of padding none may.
    known = (labels >= 0) & (labels < logits.shape[-1])
    inside = jnp.where(known, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, inside)
    losses = jnp.where(known | ~base.example_mask(batch), losses, jnp.nan)
    return losses, jnp.argmax(logits, axis=-1) == labels

  def _complete(
    self, variables: base.Variables, batch: base.Batch, tokens: Int[Array, "b n"], rng: jax.Array
  ) -> dict[str, Array]:
    count, shape = self.completions, batch["image"].shape[:3]
    repeated = jnp.repeat(tokens, count, axis=0)
    lengths = jnp.repeat(jnp.asarray(batch["prefix_length"], jnp.int32), count)
    drawn = self.model.complete(
      variables, repeated, lengths, rng, temperature=self.temperature, top_k=self.top_k
    )
    clusters = variables["palette"]["clusters"]
    return {
      "completions": cluster_colors(drawn, clusters).reshape(shape[0], count, *shape[1:], 3),
      "quantized": cluster_colors(tokens, clusters).reshape(*shape, 3),
    }


def pixel_nats(
  logits: Float[Array, "b n k"], tokens: Int[Array, "b n"], visible: Bool[Array, "b n"] | None
) -> Float[Array, " b"]:
  """Returns each image's mean cross-entropy over its pixels, or over those that are not visible.

  An image without a masked pixel (the reference divides 0 by 0) has the loss 0.
  """
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  if visible is None:
    return jnp.mean(nats, axis=-1)
  masked = jnp.sum(~visible, axis=-1)
  return jnp.sum(jnp.where(visible, 0.0, nats), axis=-1) / jnp.maximum(masked, 1)


def _take(batches: Iterable[Mapping[str, np.ndarray]], count: int) -> np.ndarray:
  """Returns the first `count` images, or all if there are fewer, as uint8."""
  images, found = [], 0
  for batch in batches:
    images.append(np.asarray(batch["image"]))
    found += len(images[-1])
    if found >= count:
      break
  if not images:
    raise ValueError("there are no training images to fit a palette to")
  whole = np.concatenate(images)[:count]
  return np.clip(np.rint(whole), 0, 255).astype(np.uint8)
