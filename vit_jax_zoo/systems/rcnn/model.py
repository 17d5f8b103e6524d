"""Faster R-CNN, arXiv:1506.01497, and Mask R-CNN, 1703.06870, on feature pyramids, 1612.03144.

The first stage proposes boxes; the second classifies and refines them, and predicts a mask in each.
All shapes are static and padded, so that both stages are one compiled program.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Num

from vit_jax_zoo.errors import check_names, part_fields
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, STAGES
from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.images import clear_padding, pad_images
from vit_jax_zoo.ops.sharding import on_own_examples, shard_batch
from vit_jax_zoo.registry import registry_of
from vit_jax_zoo.systems.rcnn import boxes as box_ops
from vit_jax_zoo.systems.rcnn.heads import BoxHead, BoxOutputs, MaskHead, RegionProposalHead

VARIANTS: dict[str, dict[str, Any]] = {
  f"{kind}_rcnn_r{depth}_{neck}": {
    "backbone": {"blocks": RESNET_BLOCKS[depth]},
    "neck": neck,
    **mask,
  }
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {}}))
  for depth in (50, 101)
  for neck in ("bfp", "fpn")
}
"""Fields of `RCNN` by model name: torchvision's networks with COCO's class ids up to 90 (fpn), and
the same without top-down path (bfp)."""

SHARDING_RULES = (
  (r".*box_head/dense_0/kernel", ("fsdp", "model")),
  (r".*box_head/dense_0/bias", ("model",)),
  (r".*box_head/dense_1/kernel", ("model", "fsdp")),
  (r".*(bias|scale|position_embedding)", ()),
  (r".*", "fsdp"),
)
"""The box head's two large matrices are sharded over `model`, all kernels over `fsdp`."""

Images: TypeAlias = Float[Array, "b h w c"]
Sizes: TypeAlias = Num[Array, "b 2"]  # heights and widths
Boxes: TypeAlias = Float[Array, "b r 4"]
Pyramid: TypeAlias = Sequence[Float[Array, "b _ _ d"]]


class Proposals(NamedTuple):
  """Output of the first stage."""

  pyramid: Pyramid
  anchors_xyxy: Float[Array, "n 4"]
  objectness: Float[Array, "b n"]  # logits
  deltas: Float[Array, "b n 4"]
  boxes_xyxy: Float[Array, "b p 4"]
  scores: Float[Array, "b p"]  # logits, best first
  exists: Bool[Array, "b p"]


class RCNN(nn.Module):
  """A two-stage detector; tasks call its stages one by one."""

  num_classes: int = 90  # highest class id + 1; the last logit is the background
  backbone_kind: str = "resnet"  # name of the backbone, "resnet" or one registered by a system
  backbone: Mapping[str, Any] | None = None  # fields of the backbone; norms are frozen by default
  levels: tuple[str, ...] = STAGES  # maps of the backbone, fine to coarse (1612.03144, section 3)
  extra_levels: int = 1  # further coarse maps, each the subsampled previous: P6 (1612.03144, 4.1)
  neck: str = "fpn"  # name of the neck, "fpn", "bfp" (bottom-up) or one registered by a system
  neck_fields: Mapping[str, Any] | None = None  # fields of the neck except `width`
  width: int = 256  # channels of the pyramid
  anchor_sizes: tuple[float | int, ...] = (32, 64, 128, 256, 512)  # sqrt(area) (1612.03144, 4.1)
  aspect_ratios: tuple[float | int, ...] = (0.5, 1, 2)  # height / width (1612.03144, section 4.1)
  # fields of `ProposalLimits`; a pair of values is (training, inference)
  proposals: Mapping[str, Any] | None = None
  convention: str = "torchvision"  # a key of `boxes.CONVENTIONS`
  # boxes of this side, in pixels, are pooled from the level of `canonical_stride`, boxes of twice
  # that side from the next one (arXiv:1612.03144, Eq. 1)
  canonical_size: float | int = 224
  canonical_stride: int = 16
  adaptive: bool = False  # pools boxes from all levels (arXiv:1803.01534; FPT's official configs)
  pool_size: int = 7  # side of the box head's input (1612.03144, section 4.2)
  mask_pool_size: int = 14  # of the mask head's input; masks have twice it (1703.06870, figure 4)
  box_head: Mapping[str, Any] | None = None  # fields of `BoxHead`; FPT's official code has others
  mask_head: Mapping[str, Any] | None = None  # of `MaskHead` (1703.06870); None: Faster R-CNN
  dtype: Dtype = "float32"  # of the computation; parameters, statistics, logits, boxes are float32

  def setup(self) -> None:
    self._check()
    kind = registry_of("backbone_kind", "backbones")[self.backbone_kind]
    fields: dict[str, Any] = part_fields("backbone", kind, self.backbone)
    fields = {"norm": "frozen_batch_norm", **fields, "dtype": self.dtype}
    self._backbone = kind(**fields, name="backbone")
    fields = {"width": self.width, **part_fields("neck_fields", self.neck_class, self.neck_fields)}
    self._neck = self.neck_class(**{**fields, "dtype": self.dtype}, name="neck")
    count = len(self.aspect_ratios)
    self._proposal_head = RegionProposalHead(count, self.dtype, name="proposal_head")
    fields = part_fields("box_head", BoxHead, self.box_head)
    self._box_head = BoxHead(**fields, dtype=self.dtype, name="box_head")
    self._box_outputs = BoxOutputs(self.num_classes, self.dtype, name="box_outputs")
    if self.has_masks:
      fields = part_fields("mask_head", MaskHead, self.mask_head)
      fields = {"num_classes": self.num_classes, **fields}
      self._mask_head = MaskHead(**fields, dtype=self.dtype, name="mask_head")

  def __call__(
    self, images: Images, image_size: Sizes | None = None, *, train: bool = False
  ) -> dict[str, Array]:
    """Runs both stages; see `propose` for the arguments.

    Returns `boxes_xyxy` [b p 4], the proposals; `exists` [b p], False for padding; `logits`
    [b p num_classes + 1] and `deltas` [b p num_classes + 1 4], float32.
    """
    found = self.propose(images, image_size, train=train)
    boxes = found.boxes_xyxy
    logits, deltas = self.classify(found.pyramid, boxes, train=train)
    if self.is_initializing() and self.has_masks:
      self.segment(found.pyramid, boxes[:, :1], train=train)
    return {"boxes_xyxy": boxes, "exists": found.exists, "logits": logits, "deltas": deltas}

  def propose(
    self, images: Images, image_size: Sizes | None = None, *, train: bool = False
  ) -> Proposals:
    """Runs the first stage on normalized images; the proposals have no gradient.

    `image_size` is height and width of each image without its padding at the right and bottom, by
    default all of it. In training, batch norms that are not frozen update "batch_stats", which must
    be mutable, and dropout uses the "dropout" stream.
    """
    if image_size is None:
      image_size = jnp.broadcast_to(jnp.asarray(images.shape[1:3]), (len(images), 2))
    images = pad_images(clear_padding(images, image_size), self.size_multiple)
    maps = self._backbone(images, train=train)
    pyramid = self._neck([maps[level] for level in self.levels], train=train)
    pyramid = tuple(shard_batch(x) for x in pyramid)
    levels = list(pyramid)
    for _ in range(self.extra_levels):
      levels.append(levels[-1][:, ::2, ::2])
    objectness, deltas = self._proposal_head(levels)
    sizes, own = [(x.shape[1], x.shape[2]) for x in levels], len(self.levels)
    kind, each = self.convention_details.anchors, zip(self.strides, self.anchor_sizes, strict=True)
    cells = [box_ops.cell_anchors(stride, size, self.aspect_ratios, kind) for stride, size in each]
    anchors = box_ops.pyramid_anchors(cells, sizes, self.strides, own, kind)

    def choose(*each: Array) -> tuple[Array, ...]:
      choose_one = functools.partial(
        box_ops.choose_proposals,
        anchors_xyxy=jnp.concatenate(anchors),  # here: arrays from outside have another mesh
        lengths=tuple(len(x) for x in anchors),
        limits=box_ops.pick_limits(self.proposals, train=train),
        convention=self.convention_details,
      )
      return jax.vmap(choose_one)(*each)

    chosen = on_own_examples(choose, *jax.lax.stop_gradient((objectness, deltas)), image_size)
    return Proposals(pyramid, jnp.concatenate(anchors), objectness, deltas, *chosen)

  def classify(
    self, pyramid: Pyramid, boxes_xyxy: Boxes, *, train: bool = False
  ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k 4"]]:
    """Returns logits and, per class, box deltas (`boxes.encode_boxes`)."""
    crops = self._crops(pyramid, boxes_xyxy, self.pool_size)
    return self._box_outputs(shard_batch(self._box_head(crops, train=train)))

  def segment(
    self, pyramid: Pyramid, boxes_xyxy: Boxes, *, train: bool = False
  ) -> Float[Array, "b r m m k"]:
    crops = self._crops(pyramid, boxes_xyxy, self.mask_pool_size)
    return shard_batch(self._mask_head(crops, train=train))

  @property
  def has_masks(self) -> bool:
    return self.mask_head is not None

  @property
  def size_multiple(self) -> int:
    """Image sides are padded to multiples of this, so that each level has half the finer's size."""
    return self.strides[len(self.levels) - 1]

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f"p{level[1:]}" for level in self.levels)

  @property
  def neck_class(self) -> type[nn.Module]:
    return registry_of("neck", "necks")[self.neck]

  @property
  def convention_details(self) -> box_ops.Convention:
    return box_ops.CONVENTIONS[self.convention]

  @property
  def strides(self) -> tuple[int, ...]:
    first = 1 if (self.backbone or {}).get("stem") == "conv3" else 4
    own = [first * 2 ** STAGES.index(level) for level in self.levels]
    return (*own, *(own[-1] * 2 ** (i + 1) for i in range(self.extra_levels)))

  def _crops(
    self, pyramid: Pyramid, boxes_xyxy: Boxes, size: int
  ) -> list[Float[Array, "b r s s d"]]:
    strides, convention = self.strides[: len(self.levels)], self.convention_details
    boxes = boxes_xyxy.at[..., 2:].add(-1) if convention.inclusive_boxes else boxes_xyxy
    align = functools.partial(box_ops.roi_align, size=size, aligned=convention.aligned)
    if self.adaptive:
      first = jnp.zeros(boxes.shape[:2], jnp.int32)
      return [align([x], boxes, first, strides=[s]) for x, s in zip(pyramid, strides, strict=True)]
    ends = strides[0], strides[-1], self.canonical_stride
    first, last, canonical = (int(math.log2(stride)) for stride in ends)
    level = box_ops.box_levels(boxes_xyxy, (first, last), self.canonical_size, canonical)
    return [align(pyramid, boxes, level - first, strides=strides)]

  def _check(self) -> None:
    check_names("level", self.levels, STAGES)
    check_names("convention", [self.convention], box_ops.CONVENTIONS)
    if list(self.levels) != sorted(set(self.levels)) or not self.levels:
      raise ValueError(f"levels: {self.levels}; expected each level once, from fine to coarse")
    if (self.backbone or {}).get("output_stride", 32) != 32:
      raise ValueError("backbone.output_stride: a feature pyramid needs 32")
    check_positive(self, "num_classes", "width", "anchor_sizes", "aspect_ratios", "canonical_size")
    check_positive(self, "canonical_stride", "pool_size", "mask_pool_size")
    check_not_negative(self, "extra_levels")
    expected = len(self.levels) + self.extra_levels
    if len(self.anchor_sizes) != expected:
      raise ValueError(f"anchor_sizes: {len(self.anchor_sizes)} entries; expected {expected}")
