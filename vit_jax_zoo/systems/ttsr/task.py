"""Super-resolution with a reference: what TTSR learns, and its game against a critic.

Yang et al., arXiv:2006.04139, section 3.3. TTSR-rec has the first loss alone, TTSR all four: the
first alone for some steps, then all, which is one config with `begin_step`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.metrics.psnr_ssim import SuperResolutionEvaluator
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.ttsr import figures as draw
from vit_jax_zoo.systems.ttsr.discriminator import Critic
from vit_jax_zoo.systems.ttsr.train_step import make_train_step
from vit_jax_zoo.systems.ttsr.upsample import upsample_bicubic
from vit_jax_zoo.systems.ttsr.vgg import VGG19, WIDTHS
from vit_jax_zoo.tasks import base
from vit_jax_zoo.training.optim import Optimizer
from vit_jax_zoo.training.train_step import TrainStep

PICTURES = ("low_res_image", "upsampled_image", "ref_image", "blurred_ref_image")
"""What the model is given, in this order."""

_PERCEPTUAL_LAYER = "relu5_1"
_KINDS, _GAMES = ("l1", "l2"), ("wasserstein", "logistic")


@dataclasses.dataclass(frozen=True)
class SuperResolution(base.Task):
  """Learns to enlarge pictures with the help of references.

  Batches, uint8 or floats in [0, 255]: `low_res_image` [b h w 3]; `upsampled_image` [b 4h 4w 3],
  its bicubic enlargement; `ref_image` [b y x 3]; `blurred_ref_image` [b y x 3], the reference made
  smaller and enlarged again; `image` [b 4h 4w 3], the truth; when a batch is padded, `mask` [b],
  True for real rows; where pictures of several sizes share a batch, `size` int32 [b 2], height and
  width of what counts of `image`, from the upper left.

  Parameters: "generator", the model's; with an adversarial loss "critic". With a perceptual loss
  the collection "vgg" holds VGG-19, which is never trained; fresh ones are random, so load it.

  The defaults are TTSR-rec; TTSR (section 4.1) has the weights 1, 1e-2, 1e-2 and 1e-3.

  Attributes:
    model: called with the four pictures in [-1, 1], returns "image", "textures" and both
      attentions; its method "textures" returns the extractor's features of a picture.
    reconstruction_weight: of the mean absolute difference.
    perceptual_weight: of the mean squared difference of VGG-19's relu5_1.
    transferal_weight: of the mean squared difference between the extractor's features of the result
      and the textures that were transferred, averaged over the levels.
    adversarial_weight: of the critic's score.
    transferal_kind: "l2", or "l1" for mean absolute differences; the released code has both.
    transferal_by_trust: weighs both sides of it by the sigmoid of the soft attention, an option of
      the released code.
    adversarial_kind: "wasserstein", a Wasserstein GAN with gradient penalty; or "logistic", the
      first GAN's, with cross entropies and without a penalty: an option of the released code.
    begin_step: the first step that has losses other than reconstruction; the critic begins there.
    critic_updates: of the critic in each step.
    gradient_penalty: weight in the critic's loss (arXiv:1704.00028, eq. 3).
    critic_widths: see `Critic`.
    critic_hidden: see `Critic`.
    perceptual_widths: of VGG-19.
    vgg_file: torchvision's VGG-19, a published file: what the perceptual loss looks through, and
      what the texture extractor starts as; None: both are random, or as `init_from` has them.
    wrong_references: predictions are made a second time, with another picture's reference, half a
      batch away; so scores tell what the right reference is worth.
  """

  name: ClassVar[str] = "super_resolution"

  model: base.Model
  reconstruction_weight: float = 1.0
  perceptual_weight: float = 0.0
  transferal_weight: float = 0.0
  adversarial_weight: float = 0.0
  transferal_kind: str = "l2"
  transferal_by_trust: bool = False
  adversarial_kind: str = "wasserstein"
  begin_step: int = 0
  critic_updates: int = 2
  gradient_penalty: float = 10.0
  critic_widths: tuple[int, ...] = (32, 64, 128, 256, 512)
  critic_hidden: int = 1024
  perceptual_widths: tuple[int, ...] = WIDTHS
  vgg_file: str | None = None
  wrong_references: bool = False

  def __post_init__(self) -> None:
    for name in ("reconstruction", "perceptual", "transferal", "adversarial"):
      weight = getattr(self, f"{name}_weight")
      if weight < 0:
        raise ValueError(f"{name}_weight is {weight}; give 0 to leave that loss out, or more")
    for field, known in (("transferal_kind", _KINDS), ("adversarial_kind", _GAMES)):
      if getattr(self, field) not in known:
        raise ValueError(unknown_name(field, getattr(self, field), known))
    if self.begin_step < 0 or self.critic_updates < 1:
      raise ValueError(
        f"begin_step is {self.begin_step} and critic_updates is {self.critic_updates}; "
        "expected at least 0 and 1"
      )

  @property
  def optim_groups(self) -> tuple[base.OptimGroup, ...]:
    """The critic, if there is one, first: the generator is trained against the updated one."""
    generator = base.OptimGroup("generator")
    if not self.adversarial_weight:
      return (generator,)
    return (base.OptimGroup("critic", self.critic_updates, self.begin_step), generator)

  @property
  def weight_files(self) -> Mapping[str, str]:
    """VGG-19's, which the perceptual loss and the texture extractor share."""
    parts = ("vgg", "params/generator/extractor")
    return dict.fromkeys(parts, self.vgg_file) if self.vgg_file else {}

  @property
  def training_only(self) -> tuple[str, ...]:
    """What the losses look through: a picture is enlarged by the generator alone."""
    return ("vgg", "params/critic")

  @property
  def best_metric(self) -> str:
    """PSNR as the official code measures it."""
    return "psnr"

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns fresh variables of the generator, and of critic and VGG-19 where there are losses."""
    generator, critic, vgg = jax.random.split(rng, 3)
    params = {"generator": self.model.init(generator, *self._pictures(batch))["params"]}
    truth = _to_range(batch["image"])
    if self.adversarial_weight:
      params["critic"] = self._critic.init(critic, truth)["params"]
    variables = {"params": params}
    if self.perceptual_weight:
      variables["vgg"] = self._vgg.init(vgg, truth)["params"]
    return variables

  def make_train_step(
    self, optimizers: Sequence[Optimizer], *, accumulation_steps: int, ema_decay: float | None
  ) -> TrainStep:
    """Returns the alternating step."""
    return make_train_step(
      self, optimizers, accumulation_steps=accumulation_steps, ema_decay=ema_decay
    )

  def precompute(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> Float[Array, "b h w 3"] | None:
    """Returns the pictures that the critic is shown, for all of its updates.

    The generator's own loss makes them once more: its gradient needs all that lies between, which
    would have to be kept for every micro-batch while the critic moves.
    """
    if context.optim_group != "critic":
      return None
    return self._generate(variables["params"]["generator"], batch, train=True)["image"]

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the loss of the generator or the critic, as far as it is these examples'.

    Metrics: "loss", the generator's, and its terms, unweighted: "reconstruction_loss",
    "perceptual_loss", "transferal_loss", "adversarial_loss"; of the critic "critic_loss", and in it
    "critic_difference" (mean score of made pictures minus that of real ones) and
    "gradient_penalty".
    """
    mask = base.example_mask(batch)
    terms = self._critic_terms if context.optim_group == "critic" else self._generator_terms
    losses, metrics = terms(variables, batch, context)
    name = "critic_loss" if context.optim_group == "critic" else "loss"
    metrics = {k: base.Mean.of(value, mask & active) for k, (value, active) in metrics.items()}
    return base.LossOutput(
      loss=jnp.sum(jnp.where(mask, losses, 0.0)) / context.normalizers["examples"],
      metrics={name: base.Mean.of(losses, mask)} | metrics,
      model_state={key: tree for key, tree in variables.items() if key != "params"},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Enlarges the pictures.

    Returns:
      `image` uint8 [b 4h 4w 3]; `hard_attention` int32 [b h w] and `soft_attention` float32
      [b h w], as the model returns them; with `wrong_references`, `wrong_reference_image`.
    """
    generator = variables["params"]["generator"]
    outputs = self._generate(generator, batch)
    predictions = {
      "image": to_pixels(outputs["image"]),
      "hard_attention": outputs["hard_attention"],
      "soft_attention": outputs["soft_attention"],
    }
    if self.wrong_references:
      other = self._generate(generator, exchange_references(batch))
      predictions["wrong_reference_image"] = to_pixels(other["image"])
    return predictions

  def evaluator(self) -> SuperResolutionEvaluator:
    """Returns an empty evaluator: PSNR and SSIM of results and of bicubic enlargements."""
    return SuperResolutionEvaluator()

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws small pictures, their truths and their references."""
    return {"batch": draw.draw_batch(batch)}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws small pictures, results, truths, and where in the reference patches were found."""
    real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
    if not real.any():
      return {}
    kept = {k: np.asarray(v)[real] for k, v in batch.items()}
    found = {k: np.asarray(v)[real] for k, v in predictions.items()}
    return {"super_resolution": draw.draw_results(kept, found)}

  def draw_epsilon(self, rng: jax.Array, count: int) -> Float[Array, " b"]:
    """Returns how real each picture is at which the critic's slope is measured, in [0, 1]."""
    return jax.random.uniform(rng, (count,))

  @property
  def _critic(self) -> base.Model:
    return Critic(self.critic_widths, self.critic_hidden)

  @property
  def _vgg(self) -> base.Model:
    return VGG19((_PERCEPTUAL_LAYER,), self.perceptual_widths)

  def _pictures(self, batch: base.Batch) -> list[Float[Array, "b h w 3"]]:
    return [_to_range(batch[name]) for name in PICTURES]

  def _generate(self, params: Any, batch: base.Batch, *, train: bool = False) -> dict[str, Any]:
    return self.model.apply({"params": params}, *self._pictures(batch), train=train)

  def _critic_terms(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> tuple[Float[Array, " b"], dict[str, Any]]:
    params, real = variables["params"], _to_range(batch["image"])
    made = context.precomputed
    if made is None:
      made = jax.lax.stop_gradient(self.precompute(variables, batch, context))
    epsilon = self.draw_epsilon(context.rng, len(real))

    def score(images: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
      return self._critic.apply({"params": params["critic"]}, images)

    if self.adversarial_kind == "logistic":
      return (jax.nn.softplus(-score(real)) + jax.nn.softplus(score(made))) / 2, {}
    difference, penalty = wasserstein_terms(score, made, real, epsilon)
    metrics = {"critic_difference": (difference, True), "gradient_penalty": (penalty, True)}
    return difference + self.gradient_penalty * penalty, metrics

  def _generator_terms(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> tuple[Float[Array, " b"], dict[str, Any]]:
    outputs = self._generate(variables["params"]["generator"], batch, train=True)
    real = _to_range(batch["image"])
    reconstruction = _mean(jnp.abs(outputs["image"] - real))
    losses = self.reconstruction_weight * reconstruction
    metrics: dict[str, Any] = {"reconstruction_loss": (reconstruction, True)}

    def later_losses() -> dict[str, Float[Array, " b"]]:
      return self._later_losses(variables, outputs, real)

    kinds = jax.eval_shape(later_losses)
    if not kinds:
      return losses, metrics
    begun = context.step >= self.begin_step
    later = later_losses() if not self.begin_step else _if(begun, later_losses, kinds)
    for name, value in later.items():
      losses += getattr(self, f"{name}_weight") * value
      metrics[f"{name}_loss"] = (value, begun)
    return losses, metrics

  def _later_losses(
    self, variables: base.Variables, outputs: Mapping[str, Any], real: Float[Array, "b h w 3"]
  ) -> dict[str, Float[Array, " b"]]:
    """Returns the losses that begin at `begin_step`, by name, for each example."""
    params, image, losses = variables["params"], outputs["image"], {}
    if self.perceptual_weight:
      losses["perceptual"] = self.perceptual_loss(variables["vgg"], image, real)
    if self.transferal_weight:
      # The extractor learns from the textures that it gave, not from its view of the result.
      frozen = jax.lax.stop_gradient(params["generator"])
      features = self.model.apply({"params": frozen}, image, method="textures")
      trust = outputs["soft_attention"] if self.transferal_by_trust else None
      losses["transferal"] = transferal_loss(
        features[::-1], outputs["textures"], trust, self.transferal_kind
      )
    if self.adversarial_weight:
      score = self._critic.apply({"params": params["critic"]}, image)
      losses["adversarial"] = (
        jax.nn.softplus(-score) if self.adversarial_kind == "logistic" else -score
      )
    return losses

  def perceptual_loss(
    self, vgg: Any, images: Float[Array, "b h w 3"], truths: Float[Array, "b h w 3"]
  ) -> Float[Array, " b"]:
    """Returns the mean squared difference of VGG-19's relu5_1; pictures in [-1, 1]."""
    ours, theirs = (
      self._vgg.apply({"params": vgg}, x)[_PERCEPTUAL_LAYER] for x in (images, truths)
    )
    return _mean((ours - theirs) ** 2)


def exchange_references(batch: base.Batch) -> dict[str, Any]:
  """Gives each picture the reference of the one that is half of the real rows away."""
  real = jnp.sum(base.example_mask(batch).astype(jnp.int32))
  rows = jnp.arange(len(batch["image"]))
  other = (rows + jnp.maximum(real // 2, 1)) % jnp.maximum(real, 1)
  moved = {key: jnp.asarray(batch[key])[other] for key in ("ref_image", "blurred_ref_image")}
  return {**batch, **moved}


def transferal_loss(
  features: tuple[Float[Array, "b ..."], ...],
  textures: tuple[Float[Array, "b ..."], ...],
  soft_attention: Float[Array, "b h w"] | None = None,
  kind: str = "l2",
) -> Float[Array, " b"]:
  """Returns the mean difference from the transferred textures, averaged over the levels.

  Args:
    features: of the result, level by level, the coarsest first.
    textures: in the same order.
    soft_attention: weighs both by its sigmoid, after it was enlarged; None: nothing does.
    kind: "l2", squared differences, or "l1", absolute ones.
  """
  levels = []
  for level, (feature, texture) in enumerate(zip(features, textures, strict=True)):
    difference = feature.astype(jnp.float32) - texture.astype(jnp.float32)
    if soft_attention is not None:
      difference *= jax.nn.sigmoid(upsample_bicubic(soft_attention[..., None], 2**level))
    levels.append(_mean(jnp.abs(difference) if kind == "l1" else difference**2))
  return jnp.mean(jnp.stack(levels), axis=0)


def wasserstein_terms(
  score: Callable[[Float[Array, "b h w c"]], Float[Array, " b"]],
  made: Float[Array, "b h w c"],
  real: Float[Array, "b h w c"],
  epsilon: Float[Array, " b"],
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """Returns what a Wasserstein critic minimises (arXiv:1704.00028, eq. 3).

  Args:
    score: the critic; each score depends on its own picture alone.
    made: pictures of the generator.
    real: pictures of the data.
    epsilon: share of the real picture in the mixture at which the slope is measured.

  Returns:
    For each example: the score of the made picture minus that of the real one, and the squared
    difference of the slope's length from 1.
  """
  share = epsilon.reshape(-1, 1, 1, 1)
  mixed = made * (1 - share) + real * share
  slopes = jax.grad(lambda images: jnp.sum(score(images)))(mixed)
  # Kept off zero, where the root has no slope of its own.
  lengths = jnp.sqrt(jnp.maximum(jnp.sum(slopes**2, axis=(1, 2, 3)), 1e-24))
  return score(made) - score(real), (lengths - 1) ** 2


def to_pixels(images: Float[Array, "b h w c"]) -> Array:
  """Maps [-1, 1] to uint8, as the official code saves its results."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _to_range(images: Any) -> Float[Array, "b h w 3"]:
  """Maps pixels in [0, 255] to [-1, 1]."""
  return normalize_images(jnp.asarray(images))


def _mean(values: Float[Array, "b ..."]) -> Float[Array, " b"]:
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _if(condition: Array, compute: Callable[[], Any], kinds: Any) -> Any:
  """Computes where the condition holds; else returns zeros, and saves the work."""
  zeros = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), kinds)
  return jax.lax.cond(condition, compute, lambda: zeros)
