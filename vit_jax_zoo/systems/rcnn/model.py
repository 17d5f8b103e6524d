"""Faster and Mask R-CNN on feature pyramids, one of them the feature pyramid transformer.

Ren et al., "Faster R-CNN", arXiv:1506.01497; He et al., "Mask R-CNN", arXiv:1703.06870; Lin et al.,
"Feature Pyramid Networks for Object Detection", arXiv:1612.03144; Zhang et al., "Feature Pyramid
Transformer", arXiv:2007.09451.

A network proposes boxes; a head sees what the pyramid holds inside each of them and gives it a
class and a better box; another one gives it a mask. All sizes are fixed, so that everything, also
the choice of proposals, is part of one compiled program: where there is less, arrays are padded.

`num_classes` is the number of classes, or the highest class id + 1 where ids are used as they are.
The last logit, one more, is the background. (Detectron and torchvision have it first.)

Boxes are (left, top, right, bottom) in pixels of the image as it is given, right and bottom behind
the last pixel, in all conventions.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Num

from vit_jax_zoo.errors import part_fields, unknown_name
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, STAGES, ResNet
from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.images import clear_padding, pad_images
from vit_jax_zoo.ops.sharding import on_own_examples, shard_batch
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer
from vit_jax_zoo.systems.lambda_resnet.model import VARIANTS as LAMBDA_RESNETS
from vit_jax_zoo.systems.lambda_resnet.model import LambdaResNet
from vit_jax_zoo.systems.rcnn.anchors import cell_anchors, inclusive, pyramid_anchors
from vit_jax_zoo.systems.rcnn.conventions import Convention, find_convention
from vit_jax_zoo.systems.rcnn.heads import BoxHead, BoxOutputs, MaskHead, RegionProposalHead
from vit_jax_zoo.systems.rcnn.proposals import ProposalLimits, choose_proposals, pick_limits
from vit_jax_zoo.systems.rcnn.pyramid import FeaturePyramid, subsample
from vit_jax_zoo.systems.rcnn.roi_align import box_levels, every_level_roi_align, pyramid_roi_align

BACKBONES = ("resnet", "lambda_resnet")
NECKS = ("bfp", "fpn", "fpt")

_MASK: dict[str, Any] = {"mask_head": {}}
# The official code's heads; see `layers.rcnn_heads`.
_OFFICIAL_BOX = {"num_convs": 4, "num_dense": 1, "norm": "group_norm"}
_OFFICIAL_MASK = {"norm": "group_norm", "fused": True}


def _resnet(depth: int, neck: str, **fields: Any) -> dict[str, Any]:
  return {"backbone": {"blocks": RESNET_BLOCKS[depth]}, "neck": neck, **fields}


def _official(depth: int, *, with_masks: bool) -> dict[str, Any]:
  """As the official repository's configs have it: Caffe's ResNet, group norms, adaptive heads."""
  masks = {"mask_head": _OFFICIAL_MASK} if with_masks else {}
  return {
    "num_classes": 80,
    "backbone": {"blocks": RESNET_BLOCKS[depth], "stride_in_1x1": True},
    "neck": "fpt",
    "neck_fields": {"flavor": "official", "norm": "group_norm"},
    "adaptive": True,
    "box_head": _OFFICIAL_BOX,
    "convention": "detectron",
    **masks,
  }


def _lambda(depth: int) -> dict[str, Any]:
  """The backbones of arXiv:2102.08602's COCO experiment, their norms trained."""
  return {
    "backbone_kind": "lambda_resnet",
    "backbone": {**LAMBDA_RESNETS[f"lambda_resnet_{depth}"], "norm": "batch_norm"},
    "neck": "fpn",
    "neck_fields": {"norm": "batch_norm"},
    "convention": "detectron2",
    **_MASK,
  }


VARIANTS: dict[str, dict[str, Any]] = {
  **{f"faster_rcnn_r{d}_{neck}": _resnet(d, neck) for d in (50, 101) for neck in NECKS},
  **{f"mask_rcnn_r{d}_{neck}": _resnet(d, neck, **_MASK) for d in (50, 101) for neck in NECKS},
  **{
    f"{kind}_rcnn_r{d}_fpt_official": _official(d, with_masks=kind == "mask")
    for kind in ("faster", "mask")
    for d in (50, 101)
  },
  **{f"mask_rcnn_lambda_resnet_{d}": _lambda(d) for d in (101, 152)},
}
"""Fields of `RCNN` by model name. Those of ResNets without "official" are torchvision's networks
(but for their necks), with the classes of COCO: ids up to 90."""

SHARDING_RULES = (
  (r".*box_head/dense_0/kernel", ("fsdp", "model")),
  (r".*box_head/dense_0/bias", ("model",)),
  (r".*box_head/dense_1/kernel", ("model", "fsdp")),
  (r".*(bias|scale|position_embedding)", ()),
  (r".*", "fsdp"),
)
"""The two large matrices of the box head over `model`; all kernels over `fsdp`."""


class Proposals(NamedTuple):
  """What the first stage says of each image."""

  pyramid: tuple[Float[Array, "b _ _ d"], ...]
  anchors_xyxy: Float[Array, "n 4"]
  objectness: Float[Array, "b n"]  # logits
  deltas: Float[Array, "b n 4"]
  boxes_xyxy: Float[Array, "b p 4"]
  scores: Float[Array, "b p"]  # logits, best first
  exists: Bool[Array, "b p"]


class RCNN(nn.Module):
  """Finds objects in two stages; a task calls them one after the other.

  Attributes:
    num_classes: see the module's docstring.
    backbone_kind: "resnet" or "lambda_resnet".
    backbone: fields of it; norms are frozen unless "norm" says otherwise.
    levels: maps of the backbone that are seen, from fine to coarse.
    extra_levels: maps beyond the coarsest, for large anchors, by leaving out every second place.
    neck: "fpn", "bfp" (a plain bottom-up pyramid) or "fpt" (the feature pyramid transformer).
    neck_fields: of `FeaturePyramid` or `FeaturePyramidTransformer`, over `width`.
    width: channels of the pyramid.
    anchor_sizes: for each level (also the extra ones) the square root of its anchors' area in
      pixels, or several.
    aspect_ratios: of the anchors, height / width.
    proposals: fields of `ops.proposals.ProposalLimits`; of two values the first is for training. By
      default 2000 and 1000 boxes, before and after suppression.
    convention: "torchvision", "detectron" or "detectron2"; see `ops.detection_conventions`.
    canonical_size: side in pixels of a box that is seen at the level of stride `canonical_stride`;
      twice as large ones are seen one level further up.
    canonical_stride: see above.
    adaptive: heads see a box at all levels.
    pool_size: side of what the box head sees.
    mask_pool_size: of what the mask head sees; masks have twice as many places.
    box_head: fields of `BoxHead`.
    mask_head: fields of `MaskHead`; None: boxes alone.
    dtype: of the computation. Parameters, norms' statistics, logits and boxes are float32.
  """

  num_classes: int = 90
  backbone_kind: str = "resnet"
  backbone: Mapping[str, Any] | None = None
  levels: tuple[str, ...] = STAGES
  extra_levels: int = 1
  neck: str = "fpn"
  neck_fields: Mapping[str, Any] | None = None
  width: int = 256
  anchor_sizes: tuple[Any, ...] = (32, 64, 128, 256, 512)
  aspect_ratios: tuple[float | int, ...] = (0.5, 1, 2)
  proposals: Mapping[str, Any] | None = None
  convention: str = "torchvision"
  canonical_size: float | int = 224
  canonical_stride: int = 16
  adaptive: bool = False
  pool_size: int = 7
  mask_pool_size: int = 14
  box_head: Mapping[str, Any] | None = None
  mask_head: Mapping[str, Any] | None = None
  dtype: Dtype = "float32"

  def setup(self) -> None:
    """Makes the parts."""
    self._check()
    kind = ResNet if self.backbone_kind == "resnet" else _LambdaBackbone
    given = part_fields("backbone", kind, self.backbone)
    fields: dict[str, Any] = {"norm": "frozen_batch_norm", **given, "dtype": self.dtype}
    self._backbone = kind(**fields, name="backbone")
    self._neck = self._make_neck()
    count = len(self.cell_anchors[0])
    self._proposal_head = RegionProposalHead(count, self.dtype, name="proposal_head")
    box = part_fields("box_head", BoxHead, self.box_head)
    self._box_head = BoxHead(**box, dtype=self.dtype, name="box_head")
    self._box_outputs = BoxOutputs(self.num_classes, self.dtype, name="box_outputs")
    if self.has_masks:
      mask: dict[str, Any] = {"num_classes": self.num_classes}
      mask |= part_fields("mask_head", MaskHead, self.mask_head)
      self._mask_head = MaskHead(**mask, dtype=self.dtype, name="mask_head")

  def __call__(
    self,
    images: Float[Array, "b h w c"],
    image_size: Num[Array, "b 2"] | None = None,
    *,
    train: bool = False,
  ) -> dict[str, Array]:
    """Runs both stages on the proposals.

    Args:
      images: normalised.
      image_size: height and width of each image without its padding at the right and bottom, whose
        content does not matter. None: there is no padding.
      train: see `propose`.

    Returns:
      `boxes_xyxy` [b p 4], the proposals; `exists` [b p], False where there are fewer; `logits`
      [b p num_classes + 1] and `deltas` [b p num_classes + 1 4] of them, float32.
    """
    found = self.propose(images, image_size, train=train)
    logits, deltas = self.classify(found.pyramid, found.boxes_xyxy, train=train)
    if self.is_initializing() and self.has_masks:
      self.segment(found.pyramid, found.boxes_xyxy[:, :1], train=train)
    return {
      "boxes_xyxy": found.boxes_xyxy,
      "exists": found.exists,
      "logits": logits,
      "deltas": deltas,
    }

  def propose(
    self,
    images: Float[Array, "b h w c"],
    image_size: Num[Array, "b 2"] | None = None,
    *,
    train: bool = False,
  ) -> Proposals:
    """Runs the first stage.

    Args:
      images: see `__call__`.
      image_size: see `__call__`.
      train: batch norms that are not frozen take this batch's statistics (and renew "batch_stats",
        which must then be mutable); DropBlock, dropout and stochastic depth draw from the "dropout"
        stream; and it chooses between the two values in `proposals`.

    Returns:
      No gradient flows through boxes and scores of the proposals.
    """
    if image_size is None:
      image_size = jnp.broadcast_to(jnp.asarray(images.shape[1:3]), (len(images), 2))
    images = pad_images(clear_padding(images, image_size), self.size_multiple)
    maps = self._backbone(images, train=train)
    seen = self._neck([maps[level] for level in self.levels], train=train)
    pyramid = tuple(shard_batch(x) for x in seen)
    all_levels = list(pyramid)
    for _ in range(self.extra_levels):
      all_levels.append(subsample(all_levels[-1]))
    objectness, deltas = self._proposal_head(all_levels)
    anchors = pyramid_anchors(
      self.cell_anchors,
      [(x.shape[1], x.shape[2]) for x in all_levels],
      self.strides,
      len(self.levels),
      convention=self.small_print.anchors,
    )
    choose_one = functools.partial(
      choose_proposals,
      lengths=tuple(len(x) for x in anchors),
      limits=self._limits(train=train),
      convention=self.small_print,
    )

    def choose(objectness: Array, deltas: Array, image_size: Array) -> tuple[Array, ...]:
      return jax.vmap(choose_one, (0, 0, None, 0))(
        objectness, deltas, jnp.concatenate(anchors), image_size
      )

    logits, boxes = jax.lax.stop_gradient((objectness, deltas))
    chosen = on_own_examples(choose, logits, boxes, image_size)
    return Proposals(pyramid, jnp.concatenate(anchors), objectness, deltas, *chosen)

  def classify(
    self,
    pyramid: Sequence[Float[Array, "b _ _ d"]],
    boxes_xyxy: Float[Array, "b r 4"],
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k 4"]]:
    """Returns logits and, for each class, deltas (`ops.box_coding`) of boxes in the images."""
    crops = self._crops(pyramid, boxes_xyxy, self.pool_size)
    return self._box_outputs(shard_batch(self._box_head(crops, train=train)))

  def segment(
    self,
    pyramid: Sequence[Float[Array, "b _ _ d"]],
    boxes_xyxy: Float[Array, "b r 4"],
    *,
    train: bool = False,
  ) -> Float[Array, "b r m m k"]:
    """Returns logits of the masks inside boxes, one for each class."""
    crops = self._crops(pyramid, boxes_xyxy, self.mask_pool_size)
    return shard_batch(self._mask_head(crops, train=train))

  @property
  def has_masks(self) -> bool:
    """Whether there is a mask head."""
    return self.mask_head is not None

  @property
  def size_multiple(self) -> int:
    """What images' sides are padded to multiples of, so that every level is half the finer one."""
    return self.strides[len(self.levels) - 1]

  @property
  def level_names(self) -> tuple[str, ...]:
    """Names of the pyramid's levels, from fine to coarse."""
    return tuple(f"p{level[1:]}" for level in self.levels)

  @property
  def small_print(self) -> Convention:
    """The convention's details."""
    return find_convention(self.convention)

  @property
  def strides(self) -> tuple[int, ...]:
    """Pixels between two places of each level, the extra ones too."""
    first = 1 if (self.backbone or {}).get("stem") == "conv3" else 4
    own = [first * 2 ** STAGES.index(level) for level in self.levels]
    return (*own, *(own[-1] * 2 ** (i + 1) for i in range(self.extra_levels)))

  @property
  def cell_anchors(self) -> list[Float[np.ndarray, "a 4"]]:
    """The anchors of each level's first place."""
    return [
      cell_anchors(
        stride,
        np.atleast_1d(sizes).tolist(),
        self.aspect_ratios,
        convention=self.small_print.anchors,
      )
      for stride, sizes in zip(self.strides, self.anchor_sizes, strict=True)
    ]

  def _make_neck(self) -> nn.Module:
    kind = FeaturePyramidTransformer if self.neck == "fpt" else FeaturePyramid
    given = part_fields("neck_fields", kind, self.neck_fields)
    fields: dict[str, Any] = {"width": self.width, **given, "dtype": self.dtype}
    if self.neck != "fpt":
      fields["top_down"] = self.neck == "fpn"
    return kind(**fields, name="neck")

  def _limits(self, *, train: bool) -> ProposalLimits:
    fields: dict[str, Any] = {
      "before_nms": (2000, 1000),
      "after_nms": (2000, 1000),
      **part_fields("proposals", ProposalLimits, self.proposals),
    }
    return pick_limits(fields, train=train)

  def _crops(
    self, pyramid: Sequence[Float[Array, "b _ _ d"]], boxes_xyxy: Float[Array, "b r 4"], size: int
  ) -> list[Float[Array, "b r s s d"]]:
    strides = self.strides[: len(self.levels)]
    boxes = inclusive(boxes_xyxy) if self.small_print.inclusive_boxes else boxes_xyxy
    fields: dict[str, Any] = {"strides": strides, "size": size, "aligned": self.small_print.aligned}
    if self.adaptive:
      return every_level_roi_align(pyramid, boxes, **fields)
    first, last, canonical = (
      int(math.log2(stride)) for stride in (strides[0], strides[-1], self.canonical_stride)
    )
    level = box_levels(
      boxes_xyxy, (first, last), canonical_size=self.canonical_size, canonical_level=canonical
    )
    return [pyramid_roi_align(pyramid, boxes, level - first, **fields)]

  def _check(self) -> None:
    for field, known in (("backbone_kind", BACKBONES), ("neck", NECKS)):
      if getattr(self, field) not in known:
        raise ValueError(unknown_name(field, getattr(self, field), known))
    for level in self.levels:
      if level not in STAGES:
        raise ValueError(unknown_name("level", level, STAGES))
    if list(self.levels) != sorted(set(self.levels)) or not self.levels:
      raise ValueError(f"levels go from fine to coarse, each once, not {self.levels}")
    if (self.backbone or {}).get("output_stride", 32) != 32:
      raise ValueError("a pyramid needs a backbone of output_stride 32")
    check_positive(self, "num_classes", "width", "anchor_sizes", "aspect_ratios", "canonical_size")
    check_positive(self, "canonical_stride", "pool_size", "mask_pool_size")
    check_not_negative(self, "extra_levels")
    self._check_anchors()

  def _check_anchors(self) -> None:
    levels = len(self.levels) + self.extra_levels
    if len(self.anchor_sizes) != levels:
      raise ValueError(f"there are {len(self.anchor_sizes)} anchor_sizes for {levels} levels")
    if len({len(np.atleast_1d(sizes)) for sizes in self.anchor_sizes}) > 1:
      raise ValueError("anchor_sizes must have equally many sizes for every level: the head is one")
    find_convention(self.convention)


class _LambdaBackbone(LambdaResNet):
  """A LambdaResNet that gives its pyramid, and has no classifier."""

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> dict[str, Float[Array, "b _ _ _"]]:
    """Returns the outputs of the stages."""
    return self.pyramid(images, train=train)
