"""mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of images and label weights.

An example keeps the fraction `lam` ~ Beta(alpha, alpha) of itself and takes the rest from its
neighbour in the batch: the example before it, cyclically, as in big_vision (timm pairs the first
with the last).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Settings of mixup and CutMix."""

  mixup_alpha: float | int | None = None  # of mixup's Beta distribution; None or 0: no mixup
  cutmix_alpha: float | int | None = None  # of CutMix's Beta distribution; None or 0: no CutMix
  probability: float | int = 1.0  # of mixing (timm's `mixup_prob`)
  cutmix_fraction: float | int = 0.5  # of CutMix if both are on (timm's `mixup_switch_prob`)

  def __post_init__(self) -> None:
    alphas = {"mixup_alpha": self.mixup_alpha, "cutmix_alpha": self.cutmix_alpha}
    for field, alpha in alphas.items():
      if alpha is not None and alpha < 0:
        raise ValueError(f"{field}: {alpha}; expected a number of at least 0, or None")
    fractions = {"mix_probability": self.probability, "cutmix_fraction": self.cutmix_fraction}
    for field, fraction in fractions.items():
      if not 0 <= fraction <= 1:
        raise ValueError(f"{field}: {fraction}; expected a number in [0, 1]")

  @property
  def is_on(self) -> bool:
    """Whether mixup or CutMix is on."""
    return bool(self.mixup_alpha or self.cutmix_alpha) and self.probability > 0


def mix_examples(
  images: Float[Array, "b h w c"],
  targets: Float[Array, "b k"],
  mask: Bool[Array, " b"],
  rng: jax.Array,
  mixing: Mixing,
  draws: int = 1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Returns images and targets (label weights), mixed alike; padding and its successor are not.

  One draw serves the whole batch (big_vision, timm's default), or each of `b` draws an example.
  """
  fractions, from_self = _draw(rng, draws, (images.shape[1], images.shape[2]), mixing)
  whole = ~(mask & jnp.roll(mask, 1))
  fractions = jnp.where(whole, 1.0, fractions)
  from_self = jnp.where(whole[:, None, None], 1.0, from_self)[..., None]
  # Padding may contain NaN: it is replaced, not multiplied by 0.
  other_images = jnp.where(whole[:, None, None, None], images, jnp.roll(images, 1, axis=0))
  other_targets = jnp.where(whole[:, None], targets, jnp.roll(targets, 1, axis=0))
  mixed = images * from_self + other_images * (1 - from_self)
  return mixed, targets * fractions[:, None] + other_targets * (1 - fractions[:, None])


def _draw(
  rng: jax.Array, draws: int, size: tuple[int, int], mixing: Mixing
) -> tuple[Float[Array, " n"], Float[Array, "n h w"]]:
  """Samples weights of an example in its label and in each of its pixels."""
  kind_rng, mix_rng, mixup_rng, cutmix_rng = jax.random.split(rng, 4)
  ones = jnp.ones((draws, *size), jnp.float32)
  fractions, pixels = jnp.ones(draws, jnp.float32), ones
  if mixing.mixup_alpha:
    drawn = jax.random.beta(mixup_rng, mixing.mixup_alpha, mixing.mixup_alpha, (draws,))
    # The larger fraction is the example's own, so that its label stays the mixture's largest.
    fractions = jnp.maximum(drawn, 1 - drawn)
    pixels = jnp.broadcast_to(fractions[:, None, None], ones.shape)
  if mixing.cutmix_alpha:
    cut_fractions, cut_pixels = _cut(cutmix_rng, mixing.cutmix_alpha, draws, size)
    always = not mixing.mixup_alpha
    cut = jax.random.uniform(kind_rng, (draws,)) < (1.0 if always else mixing.cutmix_fraction)
    fractions = jnp.where(cut, cut_fractions, fractions)
    pixels = jnp.where(cut[:, None, None], cut_pixels, pixels)
  mixed = jax.random.uniform(mix_rng, (draws,)) < mixing.probability
  return jnp.where(mixed, fractions, 1.0), jnp.where(mixed[:, None, None], pixels, 1.0)


def _cut(
  rng: jax.Array, alpha: float | int, draws: int, size: tuple[int, int]
) -> tuple[Float[Array, " n"], Float[Array, "n h w"]]:
  """Samples boxes for the neighbour: the fraction outside each, and a mask of the outside."""
  area_rng, row_rng, column_rng = jax.random.split(rng, 3)
  side = jnp.sqrt(1 - jax.random.beta(area_rng, alpha, alpha, (draws,)))
  rows, columns = _covered(row_rng, side, size[0]), _covered(column_rng, side, size[1])
  outside = 1.0 - (rows[:, :, None] & columns[:, None, :])
  # A box is cut off at the edge: the labels follow the pixels.
  return jnp.mean(outside, axis=(1, 2)), outside


def _covered(rng: jax.Array, side: Float[Array, " n"], length: int) -> Bool[Array, "n length"]:
  """Returns the pixels of `length` in an interval with a random centre."""
  extent = jnp.floor(side * length).astype(jnp.int32)
  center = jax.random.randint(rng, side.shape, 0, length, jnp.int32)
  begin, end = center - extent // 2, center + (extent + 1) // 2
  at: Int[Array, "1 length"] = jnp.arange(length, dtype=jnp.int32)[None, :]
  return (at >= begin[:, None]) & (at < end[:, None])
