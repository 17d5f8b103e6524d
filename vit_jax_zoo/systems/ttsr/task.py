"""Super-resolution with a reference: TTSR's training losses and predictions (arXiv:2006.04139)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.ttsr import figures as draw
from vit_jax_zoo.systems.ttsr import losses
from vit_jax_zoo.systems.ttsr.psnr_ssim import SuperResolutionEvaluator
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import Batch, LossContext, LossOutput, Variables
from vit_jax_zoo.training import train_step as steps
from vit_jax_zoo.training.optim import Optimizer
from vit_jax_zoo.training.train_step import TrainState

Terms: TypeAlias = tuple[losses.PerExample, dict[str, Any]]  # loss; name -> (metric, is_active)
INPUTS = ("low_res_image", "upsampled_image", "ref_image", "blurred_ref_image")  # of the model


@dataclasses.dataclass(frozen=True)
class SuperResolution(base.Task):
  """Reconstruction, perceptual, transferal and adversarial losses; PSNR and SSIM.

  Batches, uint8 or floats in [0, 255]: `low_res_image` [b h w 3]; `upsampled_image` [b 4h 4w 3],
  its bicubic enlargement; `ref_image` [b y x 3]; `blurred_ref_image` [b y x 3], the reference
  reduced and enlarged again; `image` [b 4h 4w 3], the ground truth; optional `mask` [b], False for
  padding rows; optional `size` int32 [b 2], height and width of `image` without its padding.

  Parameters: "generator"; with an adversarial loss "discriminator". The perceptual loss uses the
  collection "vgg", a frozen VGG-19, random unless loaded. The defaults are TTSR-rec; TTSR (section
  4.1) has the weights 1, 1e-2, 1e-2 and 1e-3, the last three from `begin_step` on.
  """

  name: ClassVar[str] = "super_resolution"
  hub_task: ClassVar[str | None] = "image-to-image"
  _discriminator: ClassVar[base.Model] = losses.Discriminator()
  _vgg: ClassVar[base.Model] = losses.VGG19(("relu5_1",))

  model: base.Model  # a `TTSR`
  reconstruction_weight: float = 1.0  # of the mean absolute difference
  perceptual_weight: float = 0.0  # of the mean squared difference of VGG-19's relu5_1
  transferal_weight: float = 0.0  # of `losses.transferal_loss` (section 3.3)
  adversarial_weight: float = 0.0  # of the discriminator's score
  begin_step: int = 0  # first step of the discriminator, and of losses other than reconstruction
  discriminator_updates: int = 2  # per step
  gradient_penalty: float = 10.0  # weight in the discriminator's loss (arXiv:1704.00028, Eq. 3)
  # Pretrained VGG-19 of torchvision, for the perceptual loss and as the initial texture extractor;
  # None: random, or from `init_from`.
  vgg_file: str | None = None
  wrong_references: bool = False  # also scores images with the references of other images

  def __post_init__(self) -> None:
    weights = [f.name for f in dataclasses.fields(self) if f.name.endswith("_weight")]
    check_not_negative(self, *weights, "begin_step")
    check_positive(self, "discriminator_updates")

  @property
  def optim_groups(self) -> tuple[base.OptimGroup, ...]:
    """The discriminator first: the generator is trained against the updated one."""
    generator = base.OptimGroup("generator")
    if not self.adversarial_weight:
      return (generator,)
    updates = self.discriminator_updates
    return (base.OptimGroup("discriminator", updates, self.begin_step), generator)

  @property
  def best_metric(self) -> str:
    return "psnr"

  @property
  def weight_files(self) -> Mapping[str, str]:
    parts = ("vgg", "params/generator/extractor")
    return dict.fromkeys(parts, self.vgg_file) if self.vgg_file else {}

  @property
  def train_only_collections(self) -> tuple[str, ...]:
    """Sub-trees that only the losses use; "critic" is the discriminator of earlier runs."""
    return ("vgg", "params/discriminator", "params/critic")

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    generator, discriminator, vgg = jax.random.split(rng, 3)
    params = {"generator": self.model.init(generator, *self._inputs(batch))["params"]}
    truth = normalize_images(jnp.asarray(batch["image"]))
    if self.adversarial_weight:
      params["discriminator"] = self._discriminator.init(discriminator, truth)["params"]
    vgg_params = {"vgg": self._vgg.init(vgg, truth)["params"]} if self.perceptual_weight else {}
    return {"params": params, **vgg_params}

  def make_train_step(self, optimizers: Sequence[Optimizer], **options: Any) -> steps.TrainStep:
    return make_train_step(self, optimizers, **options)

  def precompute(self, variables: Variables, batch: Batch, context: LossContext) -> Array | None:
    """Returns the generated images [b 4h 4w 3] of all updates of the discriminator.

    The generator's loss recomputes them: reusing them would save its activations for every
    micro-batch.
    """
    if context.optim_group != "discriminator":
      return None
    return self._generate(variables["params"]["generator"], batch)["image"]

  def loss(self, variables: Variables, batch: Batch, context: LossContext) -> LossOutput:
    """Returns these examples' part of the generator's or the discriminator's loss.

    Metrics: "loss", the generator's, and its unweighted terms "reconstruction_loss",
    "perceptual_loss", "transferal_loss", "adversarial_loss"; "discriminator_loss" and its terms
    "score_difference" (of generated minus true images) and "gradient_penalty".
    """
    mask = base.example_mask(batch)
    is_generator = context.optim_group != "discriminator"
    terms = self._generator_terms if is_generator else self._discriminator_terms
    name = "loss" if is_generator else "discriminator_loss"
    values, metrics = terms(variables, batch, context)
    metrics = {k: base.Mean.of(value, mask & active) for k, (value, active) in metrics.items()}
    return LossOutput(
      loss=jnp.sum(jnp.where(mask, values, 0.0)) / context.normalizers["examples"],
      metrics={name: base.Mean.of(values, mask)} | metrics,
      model_state={key: tree for key, tree in variables.items() if key != "params"},
    )

  def predict(self, variables: Variables, batch: Batch) -> base.Predictions:
    """Returns `image` uint8 [b 4h 4w 3]; `hard_attention` and `soft_attention` of the model.

    With `wrong_references` also `wrong_reference_image`.
    """
    generator = variables["params"]["generator"]
    outputs = self._generate(generator, batch)
    predictions = {key: outputs[key] for key in ("hard_attention", "soft_attention")}
    predictions["image"] = to_pixels(outputs["image"])
    if self.wrong_references:
      other = self._generate(generator, exchange_references(batch))
      predictions["wrong_reference_image"] = to_pixels(other["image"])
    return predictions

  def evaluator(self) -> SuperResolutionEvaluator:
    return SuperResolutionEvaluator()

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    return {"batch": draw.draw_batch(batch)}

  def figures(self, batch: Batch, predictions: base.Predictions) -> dict[str, Figure]:
    real = np.asarray(base.example_mask(batch))
    rows = ({k: np.asarray(v)[real] for k, v in x.items()} for x in (batch, predictions))
    return {"super_resolution": draw.draw_results(*rows)}

  def draw_epsilon(self, rng: jax.Array, count: int) -> Float[Array, " b"]:
    return jax.random.uniform(rng, (count,))

  def _inputs(self, batch: Batch) -> list[Float[Array, "b h w 3"]]:
    return [normalize_images(jnp.asarray(batch[name])) for name in INPUTS]

  def _generate(self, params: Any, batch: Batch) -> dict[str, Any]:
    return self.model.apply({"params": params}, *self._inputs(batch))

  def _discriminator_terms(self, variables: Variables, batch: Batch, context: LossContext) -> Terms:
    params, images = variables["params"]["discriminator"], context.precomputed
    truths = normalize_images(jnp.asarray(batch["image"]))
    if images is None:
      images = jax.lax.stop_gradient(self.precompute(variables, batch, context))
    epsilon = self.draw_epsilon(context.rng, len(truths))
    score = functools.partial(self._discriminator.apply, {"params": params})
    difference, penalty = losses.wasserstein_loss(score, images, truths, epsilon)
    metrics = {"score_difference": (difference, True), "gradient_penalty": (penalty, True)}
    return difference + self.gradient_penalty * penalty, metrics

  def _generator_terms(self, variables: Variables, batch: Batch, context: LossContext) -> Terms:
    outputs = self._generate(variables["params"]["generator"], batch)
    truths = normalize_images(jnp.asarray(batch["image"]))
    reconstruction = losses.reconstruction_loss(outputs["image"], truths)
    total = self.reconstruction_weight * reconstruction
    metrics: dict[str, Any] = {"reconstruction_loss": (reconstruction, True)}
    compute = functools.partial(self._later_losses, variables, outputs, truths)
    shapes = jax.eval_shape(compute)
    if not shapes:
      return total, metrics
    begun = context.step >= self.begin_step
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    later = jax.lax.cond(begun, compute, lambda: zeros) if self.begin_step else compute()
    for name, value in later.items():
      total += getattr(self, f"{name}_weight") * value
      metrics[f"{name}_loss"] = (value, begun)
    return total, metrics

  def _later_losses(self, variables: Variables, outputs: Any, truths: Array) -> dict[str, Array]:
    params, image, values = variables["params"], outputs["image"], {}
    if self.perceptual_weight:
      values["perceptual"] = self.perceptual_loss(variables["vgg"], image, truths)
    if self.transferal_weight:
      # Gradients reach the extractor through the textures, not through its features of the output.
      frozen = jax.lax.stop_gradient(params["generator"])
      features = self.model.apply({"params": frozen}, image, method="textures")
      values["transferal"] = losses.transferal_loss(features[::-1], outputs["textures"])
    if self.adversarial_weight:
      values["adversarial"] = -self._discriminator.apply({"params": params["discriminator"]}, image)
    return values

  def perceptual_loss(self, vgg: Any, images: Array, truths: Array) -> Float[Array, " b"]:
    """Returns the squared difference of VGG-19's relu5_1, for images [b h w 3] in [-1, 1]."""
    features = [self._vgg.apply({"params": vgg}, x)["relu5_1"] for x in (images, truths)]
    return losses.squared_difference(*features)


def exchange_references(batch: Batch) -> dict[str, Any]:
  """Gives each image the reference of the one half of the real rows away."""
  real = jnp.sum(base.example_mask(batch), dtype=jnp.int32)  # int64 under JAX_ENABLE_X64
  rows = jnp.arange(len(batch["image"]), dtype=jnp.int32)
  other = (rows + jnp.maximum(real // 2, 1)) % jnp.maximum(real, 1)
  moved = {key: jnp.asarray(batch[key])[other] for key in ("ref_image", "blurred_ref_image")}
  return {**batch, **moved}


def to_pixels(images: Float[Array, "b h w c"]) -> Array:
  """Converts [-1, 1] to uint8, rounding as the official code."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def make_train_step(
  task: Any, optimizers: Sequence[Optimizer], *, accumulation_steps: int, ema_decay: float | None
) -> steps.TrainStep:
  """Returns the alternating step `train_step(state, batch) -> (state, metrics)`, not yet compiled.

  Each `OptimGroup` has its loss and optimizer; the loss of a group reads the parameters of the
  groups before it after their updates. `task.precompute(variables, batch, context)` returns arrays
  `[b ...]` that are constant in the losses of a group.
  """

  def update(state: TrainState, batch: Any, index: int, normalizers: Any) -> Any:
    optimizer, group = optimizers[index], task.optim_groups[index]
    rng = steps.update_rng(state, index, group.updates)
    context = LossContext(rng, state.step, normalizers, group.name)
    precompute = functools.partial(task.precompute, state.latest_variables, context=context)
    precomputed = _in_parts(precompute, batch, accumulation_steps)

    def loss_fn(own: Any, model_state: Any, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
      batch, precomputed = batch
      params = group.insert(state.params, optimizer.stop_frozen(own))
      at = dataclasses.replace(context, rng=rng, precomputed=precomputed)
      output = task.loss({"params": params, **model_state}, batch, at)
      return output.loss, output

    grad_fn = steps.accumulate(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)
    own, model_state = group.select(state.params), state.model_state
    opt_state, metrics = state.opt_state[index], {}
    for number in range(group.updates):
      rng = steps.update_rng(state, index, number)
      (_, output), grads = grad_fn(own, model_state, (batch, precomputed), rng)
      updates, opt_state = optimizer.tx.update(grads, opt_state, own)
      own, model_state = optax.apply_updates(own, updates), output.model_state
      norm = base.Mean.of(optax.tree.norm(grads))
      metrics = {**output.metrics, f"{group.name}_gradient_norm": norm}
    return own, model_state, opt_state, metrics

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, steps.Metrics]:
    normalizers, metrics = task.normalizers(batch), {}
    for index, group in enumerate(task.optim_groups):
      step = functools.partial(update, state, batch, index, normalizers)
      if group.begin_step:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step)[-1])
        same = group.select(state.params), state.model_state, state.opt_state[index], zeros
        updated = jax.lax.cond(state.step >= group.begin_step, step, lambda same=same: same)
      else:
        updated = step()
      own, model_state, opt_state, of_group = updated
      params = group.insert(state.params, own)
      opt_state = (*state.opt_state[:index], opt_state, *state.opt_state[index + 1 :])
      changed = {"params": params, "model_state": model_state, "opt_state": opt_state}
      state, metrics = dataclasses.replace(state, **changed), metrics | of_group
    return steps.update_ema(dataclasses.replace(state, step=state.step + 1), ema_decay), metrics

  return train_step


def _in_parts(function: Callable[[Any], Any], batch: Batch, parts: int) -> Any:
  """Returns `function` of the whole batch, computed one micro-batch after the other."""
  if parts == 1:
    return function(batch)
  found = jax.lax.map(function, steps.split_batch(batch, parts))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)
