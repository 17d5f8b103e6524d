"""R-CNN: published sizes, proposals, padding, all necks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.variables import random_variables
from vit_jax_zoo import create_model
from vit_jax_zoo.registry import systems, variants
from vit_jax_zoo.systems.rcnn.model import RCNN

WITH_LAMBDA = pytest.mark.skipif("lambda_resnet" not in systems(), reason="no LambdaResNet")

TINY = {
  "num_classes": 4,
  "backbone": {
    "blocks": (1, 1, 1, 1),
    "widths": (4, 4, 8, 8),
    "stem_width": 8,
    "norm": "frozen_batch_norm",
  },
  "levels": ("c2", "c3", "c4"),
  "width": 32,
  "anchor_sizes": (16, 24, 32, 48),
  "proposals": {"pre_nms_top_n": (50, 40), "post_nms_top_n": (20, 12)},
  "canonical_size": 28,
  "canonical_stride": 8,
  "pool_size": 3,
  "mask_pool_size": 4,
  "box_head": {"width": 16},
}

HEADS = ("proposal_head", "box_outputs")  # with small weights in an untrained model


def tiny(**fields):
  return RCNN(**{**TINY, **fields})


def random_images(seed=0, side=64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(2, side, side, 3)), jnp.float32)


def count_parameters(name):
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), image)
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
  ("name", "expected"),
  # torchvision's documentation: 41.8 and 44.4 M.
  [
    ("faster_rcnn_r50_fpn", 41_755_286),
    ("mask_rcnn_r50_fpn", 44_401_393),
    ("faster_rcnn_r50_bfp", 41_755_286),
  ],
)
def test_parameter_counts_equal_published(name, expected):
  assert count_parameters(name) == expected


@pytest.mark.slow
def test_parameter_counts_of_all_variants(golden_json):
  names = [*variants("faster_rcnn"), *variants("mask_rcnn")]
  golden_json("rcnn_parameters", {name: count_parameters(name) for name in names})


def test_proposals_lie_in_image_and_ignore_padding():
  check_proposals(tiny(neck="fpn"))


def check_proposals(model):
  size = jnp.asarray([[64, 64], [50, 40]])
  variables = random_variables(model.init, random_images(), size, small=HEADS)
  compiled = jax.jit(lambda x: model.apply(variables, x, size, method="propose"))

  def propose(images):
    return jax.device_get(compiled(images))

  proposals = propose(random_images())
  assert proposals.boxes_xyxy.shape == (2, 12, 4)
  assert proposals.exists[:, 0].all()
  for box, exists, (height, width) in zip(
    proposals.boxes_xyxy, proposals.exists, size, strict=True
  ):
    real = box[exists]
    assert (real >= 0).all()
    assert (real[:, 2:] > real[:, :2]).all()
    assert (real <= [width, height, width, height]).all()
    assert not box[~exists].any()
  assert (np.diff(proposals.scores) <= 0)[proposals.exists[:, 1:]].all()
  noisy = random_images().at[1, 50:].set(9.0).at[1, :, 40:].set(-9.0)
  for ours, theirs in zip(jax.tree.leaves(proposals), jax.tree.leaves(propose(noisy)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_image_is_padded_to_stride_of_coarsest_level():
  model = tiny()
  variables = jax.eval_shape(model.init, jax.random.key(0), random_images())
  image = jax.ShapeDtypeStruct((1, 50, 33, 3), jnp.float32)
  proposals = jax.eval_shape(lambda v, x: model.apply(v, x, method="propose"), variables, image)
  assert [x.shape[1:3] for x in proposals.pyramid] == [(16, 12), (8, 6), (4, 3)]
  assert len(proposals.anchors_xyxy) == 3 * (16 * 12 + 8 * 6 + 4 * 3 + 2 * 2)


@pytest.mark.parametrize(
  "fields",
  [
    {"neck": "bfp", "mask_head": {"width": 8, "num_convs": 1}},
    pytest.param({
      "backbone_kind": "lambda_resnet",
      "backbone": {**TINY["backbone"], "lambda_blocks": ("none", "none", "all", "none"),
                   "lambda_layer": {"dim_k": 4, "receptive_field": 3}, "norm": "batch_norm"},
      "convention": "detectron2",
      "mask_head": {"width": 8, "num_convs": 1},
    }, marks=[pytest.mark.slow, WITH_LAMBDA]),
  ],
  ids=["bfp", "lambda"],
)  # fmt: skip
def test_outputs_have_expected_shapes_and_are_finite(fields):
  check_outputs(tiny(**fields))


def check_outputs(model):
  variables = random_variables(model.init, random_images(), small=HEADS)
  out = jax.jit(model.apply)(variables, random_images())
  assert out["logits"].shape == (2, 12, 5)
  assert out["deltas"].shape == (2, 12, 5, 4)
  assert all(x.dtype == jnp.float32 for k, x in out.items() if k != "exists")
  pyramid = [jnp.zeros((2, 16 // s, 16 // s, 32)) for s in (1, 2, 4)]
  boxes = out["boxes_xyxy"][:, :3]
  masks = jax.jit(lambda b: model.apply(variables, pyramid, b, method="segment"))(boxes)
  assert masks.shape == (2, 3, 8, 8, 5)
  assert all(np.isfinite(x).all() for x in [*out.values(), masks])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"neck": "fpnn"}, "neck 'fpnn'.*'fpn'"),
    ({"levels": ("c4", "c2", "c3")}, r"levels: .*fine to coarse"),
    ({"anchor_sizes": (16, 32)}, "anchor_sizes: 2 entries"),
    ({"convention": "detectron3"}, "'detectron2?'"),
    ({"anchor_sizes": (16, 32, 0, 128)}, r"anchor_sizes: \(16, 32, 0, 128\)"),
    ({"aspect_ratios": ()}, r"aspect_ratios: \(\)"),
    ({"proposals": {"post_nms_top_n": (8, 0)}}, "post_nms_top_n: 0"),
    ({"proposals": {"post_nms_top_n": ()}}, r"proposals\.post_nms_top_n: \(\)"),
    ({"extra_levels": -1}, "extra_levels: -1"),
    ({"box_head": {"num_convs": -1}}, "num_convs: -1"),
    ({"mask_head": {"num_convs": -1}}, "num_convs: -1"),
    ({"box_head": {"num_dense": 0}, "adaptive": True}, "box_head: an adaptive head"),
    ({"mask_head": {"num_convs": 0}, "adaptive": True}, "mask_head: an adaptive head"),
    ({"box_head": {"width": 0}}, "width: 0"),
    ({"pool_size": 0}, "pool_size: 0"),
    ({"backbone_kind": "vgg"}, "unknown backbone_kind 'vgg'"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message) as info:
    jax.eval_shape(tiny(**fields).init, jax.random.key(0), random_images())
  assert "\n" not in str(info.value).split("\n---")[0]  # JAX appends a note
