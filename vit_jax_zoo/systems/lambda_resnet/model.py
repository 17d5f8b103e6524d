"""LambdaResNet: a ResNet with lambda layers. Bello, ICLR 2021, arXiv:2102.08602.

The paper's code was not released. Choices where its text is ambiguous:

* squeeze-and-excitation in c2 and c3 only: this reproduces the published parameter counts
  (according to the text, lambda blocks have none);
* a lambda layer is followed by batch norm and ReLU, like the convolution that it replaces; the 3x3
  average pooling of strided ones comes before these;
* the indices of c4's blocks with a lambda layer count from zero;
* "N(0, x)" in the initialization gives the standard deviation x.

timm's `lambda_resnet26t`, `50ts` and `26rpt_256` are other networks of the same name: no
squeeze-and-excitation, convolutional shortcuts, scope 9 (or a table) with a bias, 2x2 pooling.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num
from matplotlib.figure import Figure

from vit_jax_zoo.errors import part_fields
from vit_jax_zoo.figures import canvas
from vit_jax_zoo.figures.attention import draw_filters
from vit_jax_zoo.figures.canvas import MARGIN, add_axes
from vit_jax_zoo.nn.resnet import ACTIVATIONS, RESNET_BLOCKS, STAGES, Bottleneck, ResNet
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer

# Blocks of c4 with a lambda layer by network depth (appendix, architectures): step, number.
_C4 = {50: (3, 1), 101: (6, 3), 152: (5, 6), 200: (5, 6), 270: (8, 6), 350: (10, 6), 420: (10, 8)}
_C4_BLOCKS = {n: tuple(range(step, step * last + 1, step)) for n, (step, last) in _C4.items()}


def _paper(depth: int, c4: tuple[int, ...] | str) -> dict[str, Any]:
  return {"blocks": RESNET_BLOCKS[depth], "lambda_blocks": ("none", "none", c4, "all")}


def _ablation(placement: str) -> dict[str, Any]:
  blocks = tuple("all" if stage == "L" else "none" for stage in placement)
  return {"blocks": RESNET_BLOCKS[50], "lambda_blocks": blocks, "stem": "conv7", **_PLAIN}


def _timm(activation: str = "relu", receptive_field: int | None = 9) -> dict[str, Any]:
  scope = {"receptive_field": receptive_field, "position_bias": receptive_field is not None}
  layer = {**scope, "pool_size": 2}
  return {"stem": "tiered", **_PLAIN, "activation": activation, "lambda_layer": layer}


_PLAIN = {"shortcut": "conv", "se_ratio": 0.0}
_TIMM26 = {"blocks": (2, 2, 2, 2), "lambda_blocks": ("none", "none", (1,), "all")}
_TIMM50 = {"blocks": (3, 4, 6, 3), "lambda_blocks": ("none", (3,), (1, 3, 5), (1,))}

VARIANTS: dict[str, dict[str, Any]] = (
  {f"lambda_resnet_{depth}": _paper(depth, blocks) for depth, blocks in _C4_BLOCKS.items()}
  # The "C4" networks: every block of c4 and c5.
  | {f"lambda_resnet_{depth}_c4": _paper(depth, "all") for depth in (50, 101, 152, 200, 270)}
  # The ablation of placements: C for convolutions, L for lambda layers in c2, c3, c4, c5.
  | {
    f"lambda_resnet_50_{placement.lower()}": _ablation(placement)
    for placement in ("CCCC", "CCCL", "CCLL", "CLLL", "LLLL")
  }
  # timm 1.0, byobnet.py.
  | {
    "lambda_resnet26t": _TIMM26 | _timm(),
    "lambda_resnet26rpt_256": _TIMM26 | _timm(receptive_field=None),
    "lambda_resnet50ts": _TIMM50 | _timm(activation="silu"),
  }
)
"""Fields of `LambdaResNet` by model name."""

DETECTORS: dict[str, dict[str, Any]] = {
  f"mask_rcnn_lambda_resnet_{depth}": {
    "backbone_kind": "lambda_resnet",
    "backbone": {**VARIANTS[f"lambda_resnet_{depth}"], "norm": "batch_norm"},
    "neck": "fpn",
    "neck_fields": {"norm": "batch_norm"},
    "convention": "detectron2",
    "mask_head": {},
  }
  for depth in (101, 152)
}
"""Detectors of the paper's COCO experiment: fields of Mask R-CNN by model name."""

SHARDING_RULES = ((r".*/(bias|scale|position_bias|position_embedding)", ()), (r".*", "fsdp"))
"""Kernels are sharded over `fsdp`, small arrays replicated."""


class LambdaBottleneck(Bottleneck):
  """A bottleneck with a lambda layer, norm and activation instead of the 3x3 convolution."""

  lambda_fields: Mapping[str, Any] | None = None  # overrides of the fields of `LambdaLayer`

  def spatial(self, x: Float[Array, "b h w c"], stride: int, *, train: bool) -> Array:
    given = part_fields("lambda_layer", LambdaLayer, self.lambda_fields)
    fields: dict[str, Any] = {"norm": self.norm, "dtype": self.dtype, **given}
    layer = LambdaLayer(stride=stride, **fields, name="lambda_layer")
    x = self.norm(name="lambda_norm")(layer(x, train=train), train=train)
    return ACTIVATIONS[self.activation](x)


class LambdaResNet(ResNet):
  """A ResNet classifier (default: ResNet-RS) with lambda layers in some of its blocks."""

  stem: str = "deep_strided"  # ResNet-RS; "conv7" in the paper's ablations, "tiered" in timm's
  shortcut: str = "avg_pool"  # ResNet-RS; "conv" in the paper's ablations and timm's
  se_ratio: float = 0.25  # ResNet-RS; 0 in the paper's ablations and timm's
  se_stages: tuple[str, ...] = ("c2", "c3")  # by the published parameter counts
  pointwise_products: bool = True
  num_classes: int | None = 1000  # number of classes; None: no head
  # for each of c2 to c5: "all", "none" or block indices from zero (appendix, architectures)
  lambda_blocks: tuple[tuple[int, ...] | str, ...] = ("none", "none", (3,), "all")
  lambda_layer: Mapping[str, Any] | None = None  # overrides of the fields of `LambdaLayer`
  dropout_rate: float = 0.0  # before the classifier; 0.2 or 0.3 in the appendix's table

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> dict[str, Array]:
    """Classifies images, normalized with ImageNet's mean and std, of any size (timm's: 32 n).

    Returns float32 `features` [b d], the mean over positions, and `logits` [b num_classes] unless
    that is None. For `train` see `ResNet`; dropout uses the "dropout" stream.
    """
    x = self.pyramid(images, train=train)["c5"]
    self.sow("intermediates", "c5", x)
    features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
    self.sow("intermediates", "pooled", features)
    if self.num_classes is None:
      return {"features": features}
    dropped = nn.Dropout(self.dropout_rate)(features, deterministic=not train)
    init = nn.initializers.normal(0.01)
    head = nn.Dense(self.num_classes, kernel_init=init, dtype=features.dtype, name="head")
    return {"features": features, "logits": head(dropped)}

  def explain(
    self, variables: Mapping[str, Any], intermediates: Any, image_size: tuple[int, int]
  ) -> dict[str, Any]:
    """Returns the norms [b h w] of each layer's position lambdas, and the stem's filters."""
    del image_size
    layers = {name: x["lambda_layer"] for name, x in intermediates.items() if "lambda_layer" in x}
    lambdas = {name: layer["position_lambda"][0] for name, layer in layers.items()}
    lambdas = {name: jnp.linalg.norm(x, axis=(3, 4)) for name, x in lambdas.items()}
    return {"lambdas": lambdas, "filters": variables["params"]["stem"]["conv1"]["conv"]["kernel"]}

  def draw_explanation(
    self, images: np.ndarray, captions: Sequence[str], explanation: Mapping[str, Any]
  ) -> tuple[dict[str, Figure], dict[str, Figure]]:
    del captions
    first = {name: norms[0] for name, norms in explanation["lambdas"].items()}
    drawn = {"lambdas": draw_lambdas(images[0], first)} if first else {}
    return drawn, {"filters": draw_filters(explanation["filters"])}

  def block(self, stage: str, index: int, **fields: Any) -> nn.Module:
    chosen = self.lambda_blocks[STAGES.index(stage)]
    if chosen == "all" or (not isinstance(chosen, str) and index in chosen):
      return LambdaBottleneck(**fields, lambda_fields=self.lambda_layer)
    return Bottleneck(**fields)

  def check(self) -> None:
    super().check()
    check_positive(self, "num_classes", hint=", or None for no head")
    check_rates(self, "dropout_rate")
    if (given := len(self.lambda_blocks)) != len(STAGES):
      raise ValueError(f"lambda_blocks: {given} entries; expected four, for c2 to c5")
    for stage, count, chosen in zip(STAGES, self.blocks, self.lambda_blocks, strict=True):
      if isinstance(chosen, str) and chosen not in ("all", "none"):
        raise ValueError(f"lambda_blocks: {chosen!r} for {stage}; expected 'all', 'none', indices")
      for index in () if isinstance(chosen, str) else chosen:
        if not 0 <= index < count:
          raise ValueError(f"lambda_blocks: block {index} of {stage}, which has {count}, from 0")


class LambdaBackbone(LambdaResNet):
  """A LambdaResNet without classifier, which returns its feature pyramid."""

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> dict[str, Array]:
    """Returns the outputs of the stages, "c2" to "c5"."""
    return self.pyramid(images, train=train)


MAX_LAYERS = 6


def draw_lambdas(
  image: Num[np.ndarray, "h w c"], lambdas: Mapping[str, Float[np.ndarray, "h2 w2"]]
) -> Figure:
  """Draws an image in [0, 255], and over it the Frobenius norm of each position's lambda by layer.

  Layers ("c4_block10") are in the order of the numbers in their names; the last six are drawn.
  """
  numbers = {name: [int(digits) for digits in re.findall(r"\d+", name)] for name in lambdas}
  shown = sorted(lambdas, key=numbers.__getitem__)[-MAX_LAYERS:]
  height, width = image.shape[:2]
  cell = float(np.clip(width / 110, 1.7, 2.6))
  sides = (cell, cell * float(np.clip(height / width, 0.4, 1.6)))
  across = (len(shown) + 1) * (cell + 0.12)
  figure = Figure(figsize=(max(across + MARGIN + 1.0, 5.2), sides[1] + 1.15), dpi=110)
  canvas.write_title(figure, "Position lambdas", "norm of each position's lambda, over the image")
  axes = [add_axes(figure, MARGIN + i * (cell + 0.12), 0.4, *sides) for i in range(len(shown) + 1)]
  canvas.show_image(axes[0], image)
  for ax, name in zip(axes[1:], shown, strict=True):
    norms = lambdas[name]
    lowest, highest = float(norms.min()), float(norms.max())
    canvas.show_image(ax, canvas.heat_map(image, (norms - lowest) / max(highest - lowest, 1e-12)))
    text = f"{name.replace('_', ' ')}, {norms.shape[0]} × {norms.shape[1]}"
    ax.set_xlabel(f"{text}\n{lowest:.3g} to {highest:.3g}", fontsize=8, labelpad=4)
  bar = add_axes(figure, MARGIN + across, 0.4, 0.12, sides[1])
  canvas.add_color_bar(figure, "norm", ("lowest", "highest"), cax=bar)
  return figure
