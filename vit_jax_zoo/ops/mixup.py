"""Mixing training examples: mixup and CutMix, of images and their label weights alike.

  Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412
  Yun, Han, Oh, Chun, Choe, Yoo, "CutMix", arXiv:1905.04899

Both give an example the share `lam` ~ Beta(alpha, alpha) of itself, and its neighbour in the batch
the rest; batches are shuffled, so the neighbour is as good as a random one. As in big_vision the
neighbour is the example before it (the first one's is the last); timm pairs first with last.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.errors import unknown_name

UNITS = ("batch", "example")


@dataclasses.dataclass(frozen=True)
class Mixing:
  """How examples are mixed.

  Attributes:
    mixup_alpha: of mixup's Beta distribution; None or 0: no mixup.
    cutmix_alpha: of CutMix's; None or 0: no CutMix.
    probability: that anything is mixed (timm's `mixup_prob`).
    cutmix_share: how often, where both are on, it is CutMix (timm's `mixup_switch_prob`).
    unit: what is drawn anew, mixed or not, which way and how much, for each "batch" (big_vision,
      timm's default) or each "example" (timm's mode `elem`).
  """

  mixup_alpha: float | int | None = None
  cutmix_alpha: float | int | None = None
  probability: float | int = 1.0
  cutmix_share: float | int = 0.5
  unit: str = "batch"

  def __post_init__(self) -> None:
    if self.unit not in UNITS:
      raise ValueError(unknown_name("unit of mixing", self.unit, UNITS))
    alphas = {"mixup_alpha": self.mixup_alpha, "cutmix_alpha": self.cutmix_alpha}
    for field, alpha in alphas.items():
      if alpha is not None and alpha < 0:
        raise ValueError(f"{field} must be at least 0, but is {alpha}; None turns it off")
    shares = {"mix_probability": self.probability, "cutmix_share": self.cutmix_share}
    for field, share in shares.items():
      if not 0 <= share <= 1:
        raise ValueError(f"{field} must lie in [0, 1], but is {share}")

  @property
  def is_on(self) -> bool:
    """Whether anything can be mixed at all."""
    return bool(self.mixup_alpha or self.cutmix_alpha) and self.probability > 0


def mix_examples(
  images: Float[Array, "b h w c"],
  targets: Float[Array, "b k"],
  mask: Bool[Array, " b"],
  rng: jax.Array,
  mixing: Mixing,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Returns mixed images, and their targets mixed in the same shares.

  Args:
    images: in any units: mixing commutes with normalisation.
    targets: label weights.
    mask: True for real examples; padding neither gives nor takes, so that who is beside it stays
      whole.
    rng: a key.
    mixing: how; it must be on.
  """
  shares, from_self = _draw(rng, images.shape[0], (images.shape[1], images.shape[2]), mixing)
  whole = ~(mask & jnp.roll(mask, 1))
  shares = jnp.where(whole, 1.0, shares)
  from_self = jnp.where(whole[:, None, None], 1.0, from_self)[..., None]
  # An image in padding may hold anything, a NaN too, so it is left out and not multiplied by 0.
  other_images = jnp.where(whole[:, None, None, None], images, jnp.roll(images, 1, axis=0))
  other_targets = jnp.where(whole[:, None], targets, jnp.roll(targets, 1, axis=0))
  mixed = images * from_self + other_images * (1 - from_self)
  return mixed, targets * shares[:, None] + other_targets * (1 - shares[:, None])


def _draw(
  rng: jax.Array, count: int, size: tuple[int, int], mixing: Mixing
) -> tuple[Float[Array, " b"], Float[Array, "b h w"]]:
  """Draws each example's share of itself: in its label, and in each of its pixels."""
  draws = 1 if mixing.unit == "batch" else count
  which, whether, how_much, where = jax.random.split(rng, 4)
  ones = jnp.ones((draws, *size), jnp.float32)
  shares, pixels = jnp.ones(draws, jnp.float32), ones
  if mixing.mixup_alpha:
    drawn = jax.random.beta(how_much, mixing.mixup_alpha, mixing.mixup_alpha, (draws,))
    # The larger share is the example's own. Whose it is makes no difference to what a batch
    # consists of, but "the label" of a mixture stays that of its row.
    shares = jnp.maximum(drawn, 1 - drawn)
    pixels = jnp.broadcast_to(shares[:, None, None], ones.shape)
  if mixing.cutmix_alpha:
    cut_shares, cut_pixels = _cut(where, mixing.cutmix_alpha, draws, size)
    always = not mixing.mixup_alpha
    cut = jax.random.uniform(which, (draws,)) < (1.0 if always else mixing.cutmix_share)
    shares = jnp.where(cut, cut_shares, shares)
    pixels = jnp.where(cut[:, None, None], cut_pixels, pixels)
  mixed = jax.random.uniform(whether, (draws,)) < mixing.probability
  shares = jnp.where(mixed, shares, 1.0)
  pixels = jnp.where(mixed[:, None, None], pixels, 1.0)
  return jnp.broadcast_to(shares, (count,)), jnp.broadcast_to(pixels, (count, *size))


def _cut(
  rng: jax.Array, alpha: float | int, draws: int, size: tuple[int, int]
) -> tuple[Float[Array, " n"], Float[Array, "n h w"]]:
  """Draws boxes that go to the neighbour: the share outside each, and 1 there, 0 inside."""
  share_rng, row_rng, column_rng = jax.random.split(rng, 3)
  side = jnp.sqrt(1 - jax.random.beta(share_rng, alpha, alpha, (draws,)))
  rows = _covered(row_rng, side, size[0])
  columns = _covered(column_rng, side, size[1])
  outside = 1.0 - (rows[:, :, None] & columns[:, None, :])
  # Cut off at the edge, a box is smaller than was drawn: the labels follow the pixels.
  return jnp.mean(outside, axis=(1, 2)), outside


def _covered(rng: jax.Array, side: Float[Array, " n"], length: int) -> Bool[Array, "n length"]:
  """Tells which of `length` pixels a stretch covers, with its centre anywhere among them."""
  extent = jnp.floor(side * length).astype(jnp.int32)
  center = jax.random.randint(rng, side.shape, 0, length)
  begin, end = center - extent // 2, center + (extent + 1) // 2
  at: Int[Array, "1 length"] = jnp.arange(length)[None, :]
  return (at >= begin[:, None]) & (at < end[:, None])
