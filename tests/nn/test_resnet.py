import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.nn.norm import BatchNorm
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, Bottleneck, ResNet, SqueezeExcite, Stem

TINY = {"blocks": (1, 1, 2, 2), "widths": (4, 4, 8, 8), "stem_width": 8}


def shapes_of(model, images, **kwargs):
  return jax.eval_shape(lambda: model.init(jax.random.key(0), images, **kwargs))


def count(model, size=64):
  variables = shapes_of(model, jnp.zeros((1, size, size, 3)))
  return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_parameter_counts():
  classifier = 2048 * 1000 + 1000
  # torchvision's resnet50 without classifier, and DETR's backbones with frozen norms.
  assert count(ResNet()) == 25_557_032 - classifier
  assert count(ResNet(norm="frozen_batch_norm")) == 23_454_912
  assert count(ResNet(blocks=RESNET_BLOCKS[101], norm="frozen_batch_norm")) == 42_394_816


def test_resnet_rs_101_parameter_counts():
  """63.6 million, and 44.6 without squeeze-and-excite."""
  model = ResNet(blocks=RESNET_BLOCKS[101], stem="deep_strided", shortcut="avg_pool", se_ratio=0.25)
  leaves = jax.tree.leaves_with_path(shapes_of(model, jnp.zeros((1, 64, 64, 3)))["params"])
  classifier = 2048 * 1000 + 1000
  total = classifier + sum(leaf.size for _, leaf in leaves)
  gates = sum(x.size for path, x in leaves if {"reduce", "expand"} & {key.key for key in path})
  assert (round(total / 1e6, 1), round((total - gates) / 1e6, 1)) == (63.6, 44.6)


@pytest.mark.parametrize(
  ("output_stride", "sides"), [(32, (17, 9, 5, 3)), (16, (17, 9, 5, 5)), (8, (17, 9, 9, 9))]
)
def test_odd_sides_round_up(output_stride, sides):
  model, images = ResNet(**TINY, output_stride=output_stride), jnp.zeros((1, 67, 67, 3))
  variables = shapes_of(model, images)
  features = jax.eval_shape(model.apply, variables, images)
  channels = (16, 16, 32, 32)
  assert {k: v.shape for k, v in features.items()} == {
    f"c{i + 2}": (1, side, side, c) for i, (side, c) in enumerate(zip(sides, channels, strict=True))
  }


def test_dilation_equals_torchvision():
  strides = ResNet(blocks=(2, 2, 2, 3), output_stride=8)._strides()
  assert strides[1] == [(2, 1), (1, 1)]
  assert strides[2] == [(1, 1), (1, 2)]  # DC5: the first block of the stage is not dilated
  assert strides[3] == [(1, 2), (1, 4), (1, 4)]


def images_of(shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def init_block(block, x):
  """Returns variables with a last scale of 1: blocks are initialized as the identity."""
  variables = block.init(jax.random.key(0), x, train=False)
  last = variables["params"]["conv3"]["norm"]
  last["scale"] = jnp.ones_like(last["scale"])
  return variables


def test_dilated_output_contains_strided():
  """Two blocks with stride 2 give a subgrid of the unstrided, dilated ones (DC5)."""
  first, second = Bottleneck(2, BatchNorm, stride=2), Bottleneck(2, BatchNorm)
  x = jnp.asarray(images_of((1, 9, 9, 4)))

  @jax.jit
  def run(x):
    variables = init_block(first, x)
    coarse = first.apply(variables, x, train=False)
    fine = first.clone(stride=1).apply(variables, x, train=False)
    variables = init_block(second, coarse)
    coarse = second.apply(variables, coarse, train=False)
    return coarse, second.clone(dilation=2).apply(variables, fine, train=False)

  coarse, fine = run(x)
  assert np.std(coarse) > 0.1
  np.testing.assert_allclose(fine[:, ::2, ::2], coarse, atol=1e-5)


def test_frozen_norms_not_updated():
  model = ResNet(**TINY | {"blocks": (1, 1, 1, 1)}, norm="frozen_batch_norm")
  images = jnp.asarray(images_of((2, 40, 32, 3)))
  variables = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes_of(model, images))
  apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
  _, state = apply(variables, images)
  for old, new in zip(
    jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(state["batch_stats"]), strict=True
  ):
    np.testing.assert_array_equal(old, new)
  names = {path[-1].key for path, _ in jax.tree.leaves_with_path(variables["params"])}
  assert names == {"kernel"}


def test_group_norm_bfloat16_caffe_strides():
  model = ResNet(**{**TINY, "widths": (8,) * 4}, norm="group_norm", stride_in_1x1=True)
  model = model.clone(dtype="bfloat16", stem_width=32)
  images = jnp.zeros((1, 64, 64, 3))
  with pytest.raises(ValueError, match="Number of groups"):
    shapes_of(model, images)
  model = model.clone(widths=(32,) * 4)
  variables = shapes_of(model, images)
  assert "batch_stats" not in variables
  features = jax.eval_shape(model.apply, variables, images)
  assert all(x.dtype == jnp.bfloat16 for x in features.values())


@pytest.mark.parametrize(
  ("kind", "sides", "widths"),
  [
    ("conv7", (5, 5), [16]),
    ("deep", (5, 5), [8, 8, 16]),
    ("deep_strided", (5, 5), [8, 8, 16, 16]),
    ("tiered", (5, 5), [6, 8, 16]),
    ("conv3", (19, 19), [16]),
  ],
)
def test_stem_shapes(kind, sides, widths):
  stem, images = Stem(kind, 16, BatchNorm), jnp.zeros((1, 19, 19, 3))
  variables = shapes_of(stem, images, train=False)
  out = jax.eval_shape(functools.partial(stem.apply, train=False), variables, images)
  assert out.shape == (1, *sides, 16)
  kernels = [variables["params"][name]["conv"]["kernel"] for name in sorted(variables["params"])]
  assert [kernel.shape[-1] for kernel in kernels] == widths


def test_max_pool_pads_with_minus_infinity():
  stem, images = Stem("conv7", 4, BatchNorm), -jnp.ones((1, 8, 8, 3))
  variables = stem.init(jax.random.key(0), images, train=False)
  variables["params"]["conv1"]["norm"]["bias"] = jnp.full(4, -1.0)
  silu = stem.clone(activation="silu")  # has negative values, which zero padding would hide
  variables["params"]["conv1"]["conv"]["kernel"] = jnp.zeros((7, 7, 3, 4))
  out = silu.apply(variables, images, train=False)
  np.testing.assert_allclose(out, np.full((1, 2, 2, 4), -1 / (1 + np.e)), rtol=1e-5)


def test_squeeze_excite_equals_formula():
  x = jnp.asarray(images_of((2, 3, 3, 8)))
  layer = SqueezeExcite(0.25)
  variables = layer.init(jax.random.key(0), x)
  p = jax.tree.map(np.asarray, variables["params"])
  hidden = np.maximum(np.asarray(x).mean((1, 2)) @ p["reduce"]["kernel"] + p["reduce"]["bias"], 0)
  assert hidden.shape == (2, 2)
  gates = 1 / (1 + np.exp(-(hidden @ p["expand"]["kernel"] + p["expand"]["bias"])))
  np.testing.assert_allclose(
    layer.apply(variables, x), np.asarray(x) * gates[:, None, None], atol=1e-5
  )


def test_invalid_fields_raise():
  for fields, message in (
    ({"stem": "conv"}, "did you mean 'conv3'|did you mean 'conv7'"),
    ({"shortcut": "avgpool"}, "did you mean 'avg_pool'"),
    ({"activation": "rellu"}, "did you mean 'relu'"),
    ({"drop_path_rate": 1.0}, "drop_path_rate"),
  ):
    with pytest.raises(ValueError, match=message):
      shapes_of(ResNet(**TINY, **fields), jnp.zeros((1, 32, 32, 3)))


def test_1x1_kernel_gradients_by_matrix_product():
  block = Bottleneck(2, BatchNorm, stride=2)
  x = jnp.asarray(images_of((2, 5, 6, 4)))
  variables = jax.jit(functools.partial(init_block, block))(x)

  def gradients(params, block):
    loss = lambda params: jnp.sum(  # noqa: E731
      jnp.sin(block.apply({**variables, "params": params}, x, train=False))
    )
    return jax.grad(loss)(params)

  programs = {
    products: functools.partial(gradients, block=block.clone(pointwise_products=products))
    for products in (False, True)
  }
  counts = [str(jax.make_jaxpr(f)(variables["params"])).count("dot_gen") for f in programs.values()]
  assert counts == [0, 3]  # conv1, conv3 and the shortcut
  plain, ours = (jax.jit(f)(variables["params"]) for f in programs.values())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, plain)
