import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from vit_jax_zoo.config import rename_fields
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.vit.model import (
  SHARDING_RULES,
  PositionEmbedding,
  StandardizedConv,
  StandardizedResNet,
  VisionTransformer,
  sincos_2d,
)
from vit_jax_zoo.training import sharding
from vit_jax_zoo.weights import key_map as table

TINY = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "num_classes": 5}
STAGES = {"stage_sizes": (3,), "width": 32}
IMAGES = jax.random.uniform(jax.random.key(3), (2, 8, 12, 3), minval=-1, maxval=1)


def tiny(**fields):
  return VisionTransformer(**{**TINY, **fields})


def abstract_variables(model, images):
  return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(model, images=IMAGES, seed=0):
  """Returns random variables; a zero head would hide the other parameters."""
  shapes = abstract_variables(model, images)
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


# From the tests of google-research/vision_transformer, at 224 pixels and 1000 classes.
PUBLISHED = {
  "vit_ti16": 5_717_416,
  "vit_s16": 22_050_664,
  "vit_s32": 22_878_952,
  "vit_b16": 86_567_656,
  "vit_b32": 88_224_232,
  "vit_b8": 86_576_872,
  "vit_l16": 304_326_632,
  "vit_l32": 306_535_400,
  "vit_h14": 632_045_800,
  "vit_r_ti16": 6_337_704,
  "vit_r26_s32": 36_431_912,
  "vit_r26_b32": 101_383_976,
  "vit_r50_b16": 98_659_112,
  "vit_r50_l32": 328_994_856,
}
PUBLISHED_MEAN_POOL = {
  "vit_s16": 22_049_896,
  "vit_s32": 22_878_184,
  "vit_b16": 86_566_120,
  "vit_b32": 88_222_696,
}


def parameter_count(model, size=224):
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_equal_published(name, count):
  assert parameter_count(create_model(name)) == count


@pytest.mark.parametrize(("name", "count"), PUBLISHED_MEAN_POOL.items())
def test_parameter_counts_with_mean_pooling_equal_published(name, count):
  assert parameter_count(create_model(name, pool="mean")) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("resnet", [None, {"stage_sizes": (1,), "width": 32}])
def test_outputs_have_expected_dtypes_and_gradients_are_nonzero(dtype, resnet):
  model = tiny(dtype=dtype, resnet=resnet, patch_size=4 if resnet is None else 1)
  variables = random_variables(model)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

  def loss(variables):
    out = model.apply(variables, IMAGES)
    return jnp.sum(jnp.sin(out["logits"])), out

  gradient, out = jax.jit(jax.grad(loss, has_aux=True))(variables)
  assert out["logits"].shape == (2, 5)
  assert out["logits"].dtype == out["features"].dtype == jnp.float32
  assert out["tokens"].shape == (2, 7, 16)
  assert out["tokens"].dtype == dtype
  # The softmax is invariant to the key's bias, so its gradient is 0.
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert leaf.dtype == jnp.float32, name
    assert np.isfinite(leaf).all(), name
    assert name.endswith("key/bias") or np.abs(leaf).max() > 0, name


def test_jit_equals_eager():
  model = tiny()
  variables = random_variables(model)
  eager = model.apply(variables, IMAGES)
  compiled = jax.jit(model.apply)(variables, IMAGES)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, compiled)


def test_initialisation_equals_reference():
  model = tiny(head_bias_init=-10.0, width=64, mlp_dim=256, representation_size=8, num_classes=3)
  params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
  block = params["encoder"]["blocks"]
  assert not params["head"]["kernel"].any()
  np.testing.assert_array_equal(params["head"]["bias"], -10)
  assert not params["cls_token"].any()
  assert np.std(params["position_embedding"]["table"]) == pytest.approx(0.02, rel=0.2)
  limit = np.sqrt(6 / (64 + 64))  # Xavier for the whole 64x64 matrix, not for one head
  assert 0.9 * limit < np.abs(block["attention"]["query"]["kernel"]).max() <= limit
  assert 0.9 * limit < np.abs(block["attention"]["out"]["kernel"]).max() <= limit
  assert 0 < np.abs(block["mlp"]["hidden"]["bias"]).max() < 1e-5
  layers = np.asarray(block["mlp"]["hidden"]["kernel"])
  assert np.abs(layers[0] - layers[1]).max() > 0.01  # scanned layers are initialized differently


def test_logits_without_position_embedding_ignore_patch_order():
  """Logits are invariant to the order of patches only without a position embedding."""
  left, right = jnp.split(IMAGES, 2, axis=2)[0], jnp.split(IMAGES, [4], axis=2)[1]
  swapped = jnp.concatenate([right[:, :, 4:], right[:, :, :4], left[:, :, :4]], axis=2)
  images = jnp.concatenate([IMAGES[:, :, :4], right[:, :, :4], right[:, :, 4:]], axis=2)
  for kind, invariant in (("none", True), ("learned_1d", False), ("sincos_2d", False)):
    model = tiny(position_embedding=kind)
    run = jax.jit(lambda v, x, model=model: model.apply(v, x)["logits"])
    variables = random_variables(model)
    difference = np.abs(run(variables, images) - run(variables, swapped)).max()
    assert (difference < 1e-4) == invariant, kind


def test_examples_are_independent():
  model = tiny()
  variables = random_variables(model)
  apply = jax.jit(model.apply)
  alone = apply(variables, IMAGES.at[1].set(0.0))["logits"][0]
  np.testing.assert_allclose(alone, apply(variables, IMAGES)["logits"][0], atol=1e-5)


def test_dropout_and_stochastic_depth_apply_only_in_training():
  model = tiny(dropout_rate=0.3, drop_path_rate=0.3)
  variables = random_variables(model)
  train = jax.jit(
    lambda key: model.apply(variables, IMAGES, train=True, rngs={"dropout": key})["logits"]
  )
  assert np.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max() > 1e-3
  np.testing.assert_array_equal(train(jax.random.key(0)), train(jax.random.key(0)))
  out = jax.jit(model.apply)(variables, IMAGES)["logits"]
  np.testing.assert_allclose(out, jax.jit(tiny().apply)(variables, IMAGES)["logits"], atol=1e-6)


def test_mean_pooling_excludes_class_token():
  model = tiny(pool="mean", cls_token=True, fc_norm=True, num_classes=None)
  variables = random_variables(model)
  out, state = jax.jit(lambda v: model.apply(v, IMAGES, mutable="intermediates"))(variables)
  patches = np.asarray(state["intermediates"]["encoded"][0])[:, 1:]
  pooled = patches.mean(axis=1)
  centred = pooled - pooled.mean(-1, keepdims=True)
  scale, bias = (np.asarray(variables["params"]["norm"][key]) for key in ("scale", "bias"))
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
  np.testing.assert_allclose(out["features"], expected, atol=1e-5)
  assert "logits" not in out


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((1, 9, 8, 3), "image height: 9 .* 8 or 12"),
    ((1, 8, 3, 3), "image width: 3 .* to 4"),
  ],
)
def test_image_size_not_multiple_of_patch_size_raises(shape, message):
  with pytest.raises(ValueError, match=message):
    abstract_variables(tiny(), jnp.zeros(shape))


def test_token_stride_of_hybrid_includes_resnet():
  model = tiny(resnet={"stage_sizes": (1, 1, 1)}, patch_size=1)
  assert model.token_stride == 16
  assert model.token_grid((32, 48)) == (2, 3)
  with pytest.raises(ValueError, match="image height: 24"):
    abstract_variables(model, jnp.zeros((1, 24, 32, 3)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"pool": "max"}, "pool 'max'"),
    ({"cls_token": False}, "cls_token"),
    ({"num_classes": 0}, "num_classes"),
    ({"depth": 0}, "depth"),
    ({"dropout_rate": -1.0}, "dropout_rate"),
    ({"activation": "gelu_tan"}, "'gelu_tanh'"),
    ({"num_heads": 3}, "num_heads"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    abstract_variables(tiny(**fields), IMAGES)


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "sincos_2d", "none"])
def test_position_embedding_kinds_have_expected_tables(kind):
  module = PositionEmbedding(kind)
  variables = module.init(jax.random.key(1), (2, 3), 8)
  shapes = {key: x.shape for key, x in variables.get("params", {}).items()}
  expected = {"learned_1d": {"table": (1, 6, 8)}, "learned_2d": {"rows": (2, 4), "columns": (3, 4)}}
  assert shapes == expected.get(kind, {})
  grid = np.asarray(module.apply(variables, (2, 3), 8)).reshape(2, 3, 8)
  if kind == "none":
    assert not grid.any()
  if kind == "learned_2d":  # rows in the first half, columns in the second
    np.testing.assert_allclose(grid[:, 0, :4], grid[:, 2, :4], atol=1e-6)
    np.testing.assert_allclose(grid[0, :, 4:], grid[1, :, 4:], atol=1e-6)


def test_position_embedding_has_row_for_class_token():
  module = PositionEmbedding("learned_1d", cls_row=True)
  assert module.init_with_output(jax.random.key(1), (2, 3), 8)[0].shape == (1, 7, 8)


def test_sincos_position_embedding_values():
  grid = sincos_2d(3, 4, 8).reshape(3, 4, 8)
  frequencies = [1, 1e-4]
  np.testing.assert_allclose(grid[2, 3, :2], np.sin(3 * np.asarray(frequencies)), atol=1e-6)
  np.testing.assert_allclose(grid[2, 3, 2:4], np.cos(3 * np.asarray(frequencies)), atol=1e-6)
  np.testing.assert_allclose(grid[2, 3, 4:6], np.sin(2 * np.asarray(frequencies)), atol=1e-6)
  np.testing.assert_allclose(grid[2, 3, 6:], np.cos(2 * np.asarray(frequencies)), atol=1e-6)
  with pytest.raises(ValueError, match="width: 10"):
    sincos_2d(2, 2, 10)


def test_unknown_position_embedding_raises():
  with pytest.raises(ValueError, match="position_embedding 'sincos'"):
    PositionEmbedding("sincos").init(jax.random.key(0), (1, 5), 8)


def test_sharding_rules_shard_heads_and_hidden_units():
  mesh = sharding.create_mesh({"data": 1, "fsdp": 4, "model": 2})
  for scan_layers in (True, False):
    params = abstract_variables(tiny(scan_layers=scan_layers), IMAGES)["params"]
    specs = sharding.parameter_specs(params, SHARDING_RULES, mesh)
    block = specs["encoder"]["blocks" if scan_layers else "block_1"]
    depth = (None,) * scan_layers
    assert block["attention"]["query"]["kernel"] == PartitionSpec(*depth, "fsdp", "model", None)
    assert block["attention"]["out"]["kernel"] == PartitionSpec(*depth, "model", None, "fsdp")
    assert block["mlp"]["hidden"]["kernel"] == PartitionSpec(*depth, "fsdp", "model")
    assert block["mlp"]["out"]["kernel"] == PartitionSpec(*depth, "model", "fsdp")
    assert block["mlp_norm"]["scale"] == PartitionSpec()


@pytest.mark.multidevice
def test_logits_with_sharded_parameters_equal_single_device():
  mesh = sharding.create_mesh({"data": 2, "fsdp": 2, "model": 2})
  model = tiny(remat="dots")
  images = jnp.concatenate([IMAGES, -IMAGES])
  variables = random_variables(model, images)
  specs = {"params": sharding.parameter_specs(variables["params"], SHARDING_RULES, mesh)}
  with jax.set_mesh(mesh):
    apply = jax.jit(
      model.apply,
      in_shardings=(sharding.named_shardings(specs, mesh), sharding.batch_sharding(mesh)),
    )
    sharded = apply(variables, images)["logits"]
  expected = jax.jit(model.apply)(variables, images)["logits"]
  np.testing.assert_allclose(sharded, expected, atol=1e-5)


def test_old_config_fields_are_renamed():
  assert rename_fields({"model": {"norm_after_pool": True}}) == {"model": {"fc_norm": True}}


def test_create_model_overrides_variant_fields():
  model = create_model("vit_b16", num_classes=10, dtype="bfloat16", depth=2)
  assert (model.num_classes, model.dtype, model.depth, model.width) == (10, "bfloat16", 2, 768)


def loss_and_gradients(model, params, images):
  def loss(params):
    return jnp.sum(jnp.sin(model.apply({"params": params}, images)))

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  return float(value), traverse_util.flatten_dict(gradients, sep="/")


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scanned_units_equal_unrolled(remat):
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  scanned = StandardizedResNet(**STAGES, remat=remat)
  unrolled = StandardizedResNet(**STAGES, scan_layers=False)
  shapes = jax.eval_shape(lambda: scanned.init(jax.random.key(0), images))["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  flat = traverse_util.flatten_dict(params, sep="/")
  assert flat["stage_0_units/conv_2/kernel"].shape == (2, 3, 3, 32, 32)
  layers = table.unroll(flat)
  assert {"stage_0_unit_0/shortcut_conv/kernel", "stage_0_unit_2/conv_1/kernel"} < layers.keys()
  for key, array in table.stack(layers, flat).items():
    np.testing.assert_array_equal(array, flat[key])

  value, gradients = loss_and_gradients(scanned, params, images)
  expected, expected_gradients = loss_and_gradients(
    unrolled, traverse_util.unflatten_dict(layers, sep="/"), images
  )
  assert value == pytest.approx(expected, rel=1e-5)
  gradients = table.unroll(jax.device_get(gradients))
  assert gradients.keys() == expected_gradients.keys()
  for key, gradient in expected_gradients.items():
    np.testing.assert_allclose(gradients[key], gradient, atol=1e-5 * np.abs(gradient).max() + 1e-7)


def test_units_are_initialized_differently():
  model = StandardizedResNet(stage_sizes=(3,), width=32)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  first, second = params["stage_0_units"]["conv_1"]["kernel"]
  assert np.abs(first - second).max() > 0.01


def test_kernel_is_standardized():
  """The output is invariant to shift and scale of the kernel."""
  images = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
  conv = StandardizedConv(4, 3)
  kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32)
  out = conv.apply({"params": {"kernel": kernel}}, images)
  again = conv.apply({"params": {"kernel": 3 * kernel + 0.5}}, images)
  np.testing.assert_allclose(out, again, atol=1e-3)
