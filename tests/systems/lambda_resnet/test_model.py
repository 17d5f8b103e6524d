import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.systems.lambda_resnet.timm_file import read_variables, write_variables
from vit_jax_zoo.figures.canvas import heat_map
from vit_jax_zoo.systems.lambda_resnet import model as lambda_model
from vit_jax_zoo.systems.lambda_resnet.model import VARIANTS, LambdaResNet

# Published counts in millions (timm's exactly); none are published for 50 and for 200 to 420.
PARAMETERS = {
  "lambda_resnet_101": 36.9,
  "lambda_resnet_152": 51.4,
  "lambda_resnet_101_c4": 26.0,
  "lambda_resnet_152_c4": 35.1,
  "lambda_resnet_50_llll": 15.0,
  "lambda_resnet_50_clll": 15.1,
  "lambda_resnet_50_cccl": 18.8,
  "lambda_resnet_50_cccc": 25.6,
  "lambda_resnet26t": 10_958_272,
  "lambda_resnet26rpt_256": 10_988_688,
  "lambda_resnet50ts": 21_536_832,
}
SMALL = {"widths": (8, 8, 8, 8), "stem_width": 8, "num_classes": 5}
PAPER_LAYER = {"dim_k": 4, "receptive_field": 5}


def small(name="lambda_resnet_50", **overrides):
  fields = {**VARIANTS[name], **SMALL, **overrides}
  fields["blocks"] = (1, 1, 1, 1)
  fields["lambda_blocks"] = ("none", "none", "none", "all")
  fields["lambda_layer"] = {**PAPER_LAYER, **(fields.get("lambda_layer") or {})}
  return LambdaResNet(**fields)


def random_images(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def initialise(model, images):
  return jax.jit(lambda x: model.init(jax.random.key(0), x))(images)


def count_parameters(name, size):
  model = LambdaResNet(**VARIANTS[name])
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def check_published(counts):
  for name, published in PARAMETERS.items():
    if name in counts:
      ours = counts[name] if isinstance(published, int) else round(counts[name] / 1e6, 1)
      assert ours == published, name


def test_parameter_counts_equal_published(golden_json):
  names = ("_50_llll", "26t", "26rpt_256", "50ts")
  names = [f"lambda_resnet{name}" for name in names]
  counts = {name: count_parameters(name, 224 if "50_" in name else 256) for name in names}
  check_published(counts)
  golden_json("lambda_resnet_parameters", counts)


@pytest.mark.slow
def test_parameter_counts_of_all_variants_equal_published(golden_json):
  counts = {name: count_parameters(name, 224 if "50_" in name else 256) for name in VARIANTS}
  check_published(counts)
  assert counts.keys() >= PARAMETERS.keys()
  assert round(counts["lambda_resnet_200_c4"] / 1e6) == 42
  golden_json("lambda_resnet_parameters_all", counts)


def timm_model(config):
  """Returns the model of a fixture that timm made with `width_factor`."""
  stages = config["block_types"]
  blocks = [tuple(i for i, kind in enumerate(s) if kind == "self_attn") for s in stages]
  fields = dict(VARIANTS[config["arch"]])
  assert [
    tuple(range(len(stage))) if chosen == "all" else () if chosen == "none" else chosen
    for stage, chosen in zip(stages, fields["lambda_blocks"], strict=True)
  ] == blocks
  return LambdaResNet(
    **fields,
    widths=tuple(channels // 4 for channels in config["stage_channels"]),
    stem_width=config["stem_channels"][-1],
    num_classes=config["kwargs"]["num_classes"],
  )


def timm_weights(name):
  return load_file(golden_folder(name) / "weights.safetensors")


def timm_variables(model, images, name):
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  return read_variables(timm_weights(name), shapes, name)


@pytest.mark.parametrize(
  "name", ["lambda_resnet26t_a", "lambda_resnet26rpt_a", "lambda_resnet50ts_a"]
)
def test_outputs_equal_timm(load_golden, name):
  config, inputs, outputs = load_golden(name)
  model, images = timm_model(config), jnp.asarray(np.moveaxis(inputs["x"], 1, -1))
  variables = timm_variables(model, images, name)
  apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
  out, state = apply(variables, images)
  np.testing.assert_allclose(out["logits"], outputs["logits_float64"], rtol=1e-4, atol=1e-4)
  named = state["intermediates"]
  for key, expected in outputs.items():
    block = re.fullmatch(r"stages\.(\d)\.(\d+)(\.self_attn)?", key)
    if block:
      node = named[f"c{int(block[1]) + 2}_block{block[2]}"]
      value = (node["lambda_layer"] if block[3] else node)["output"][0]
    elif key in ("stem", "features"):
      value = named["stem"]["output"][0] if key == "stem" else named["c5"][0]
    else:
      continue
    tolerance = 1e-4 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.moveaxis(value, -1, 1), expected, atol=tolerance, err_msg=key)
  np.testing.assert_allclose(out["features"], outputs["pre_logits"], rtol=1e-4, atol=1e-4)


def training_images(config):
  """Draws the images of a curve from its seed; as a file they would take 2.2 MB."""
  values = np.random.default_rng(config["seed"]).normal(size=config["images"]["shape"])
  images = values.astype(np.float32)
  assert hashlib.sha256(images.tobytes()).hexdigest() == config["images"]["sha256"]
  return images


def training_curve(name, dtype, learning_rate, steps, load_golden):
  """Repeats the reference's training; returns losses, gradient norms and the final variables."""
  config, inputs, _ = load_golden(name)
  start = config["start_weights"].split("/")[0]
  model = timm_model(load_golden(start)[0]).clone(dtype=dtype)
  images = jnp.asarray(np.moveaxis(training_images(config), 2, -1), dtype)
  variables = timm_variables(model, images[0], start)
  variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
  labels = jnp.asarray(inputs["labels"])
  decayed = jax.tree.map(lambda p: p.ndim > 1, variables["params"])
  optimizer = optax.chain(
    optax.add_decayed_weights(config["optimizer"]["weight_decay"], mask=decayed),
    optax.sgd(learning_rate, momentum=config["optimizer"]["momentum"], nesterov=True),
  )

  @jax.jit
  def step(params, stats, state, images, labels):
    def loss_fn(params):
      variables = {"params": params, "batch_stats": stats}
      out, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
      loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], labels)
      return jnp.mean(loss), updated["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    norm = optax.tree.norm(grads)
    return optax.apply_updates(params, updates), stats, state, loss, norm

  params, stats = variables["params"], variables["batch_stats"]
  state, losses, norms = optimizer.init(params), [], []
  for index in range(steps):
    batch = index % len(images)
    params, stats, state, loss, norm = step(params, stats, state, images[batch], labels[batch])
    losses.append(float(loss))
    norms.append(float(norm))
  return losses, norms, {"params": params, "batch_stats": stats}


def check_final(outputs, prefix, variables, start, tolerance, leave_out=()):
  """Bounds the error of the final values, relative to the norm of the whole update."""
  final = write_variables(variables)
  for key, expected in outputs.items():
    match = re.fullmatch(re.escape(prefix) + r"(param|bn)/(.*)", key)
    if not match or match[2] in leave_out:
      continue
    update = np.linalg.norm(expected - start[match[2]])
    distance = np.linalg.norm(final[match[2]] - expected)
    assert distance <= tolerance * update, key


@pytest.mark.slow
def test_training_curve_in_float32_equals_timm(load_golden):
  name = "train_lambda_resnet26t_a"
  config, _, outputs = load_golden(name)
  learning_rate = config["optimizer"]["lr"]
  losses, norms, variables = training_curve(name, "float32", learning_rate, 20, load_golden)
  np.testing.assert_allclose(losses[:5], outputs["loss"][:5], rtol=1e-4)
  np.testing.assert_allclose(losses, outputs["loss"], rtol=3e-3)
  np.testing.assert_allclose(norms, outputs["grad_norm"], rtol=5e-2)
  start = timm_weights("lambda_resnet26t_a")
  chaotic = ("stages.3.1.conv3_1x1.bn.weight",)
  check_final(outputs, "", variables, start, 5e-2, leave_out=chaotic)


@pytest.mark.slow
def test_training_curve_in_float64_equals_timm(load_golden):
  name = "train_lambda_resnet26t_a"
  _, _, outputs = load_golden(name)
  with jax.enable_x64(True):
    losses, norms, variables = training_curve(name, "float64", 1e-4, 20, load_golden)
  np.testing.assert_allclose(losses, outputs["f64_lr1e-4/loss"], rtol=1e-7)
  np.testing.assert_allclose(norms, outputs["f64_lr1e-4/grad_norm"], rtol=1e-5)
  # The reference's final values are rounded to float32, which bounds the achievable error.
  start = timm_weights("lambda_resnet26t_a")
  check_final(outputs, "f64_lr1e-4/", variables, start, 1e-3)


@pytest.fixture(scope="module")
def trained():
  """A small model, its variables, a batch, and the jitted gradient of a loss."""
  model = small()
  images, labels = random_images((8, 32, 32, 3)), jnp.arange(8) % 5
  variables = initialise(model, images)

  def loss(params, stats, images, model=model):
    variables = {"params": params, "batch_stats": stats}
    out, state = model.apply(
      variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)}
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(out["logits"], labels)
    return jnp.mean(losses), state["batch_stats"]

  return model, variables, images, loss


def with_nonzero_scales(variables):
  """Sets zero-initialised scales to 0.5, so that every branch passes gradients."""
  return jax.tree.map(lambda x: x + 0.5 * (jnp.abs(x).max() == 0), variables)


def test_last_scales_are_initialized_to_zero(trained):
  _, variables, _, _ = trained
  zeros = {k for k, v in jax.tree.leaves_with_path(variables["params"]) if not np.any(v)}
  names = {jax.tree_util.keystr(k) for k in zeros if "scale" in jax.tree_util.keystr(k)}
  blocks = [k for k in variables["params"] if "block" in k]
  assert names == {f"['{block}']['conv3']['norm']['scale']" for block in blocks}


@pytest.fixture(scope="module")
def one_step(trained):
  """Returns parameters, statistics, and on one device the loss, new statistics and gradients."""
  _, variables, images, loss = trained
  params, stats = with_nonzero_scales(variables["params"]), variables["batch_stats"]
  (value, new_stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, images)
  return params, stats, value, new_stats, grads


def test_gradients_are_finite_and_nonzero(one_step):
  for path, grad in jax.tree.leaves_with_path(one_step[-1]):
    assert np.isfinite(grad).all(), path
    assert np.any(grad != 0), path


def test_bfloat16_outputs_have_expected_shapes_and_dtypes(trained, one_step):
  model, images = trained[0].clone(dtype="bfloat16"), random_images((2, 48, 36, 3))
  variables = {"params": one_step[0], "batch_stats": one_step[1]}
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  out = jax.jit(model.apply)(variables, images)
  assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
    "logits": ((2, 5), jnp.float32),
    "features": ((2, 32), jnp.float32),
  }
  assert np.isfinite(out["logits"]).all()
  headless = model.clone(num_classes=None)
  shapes = jax.eval_shape(lambda x: headless.init(jax.random.key(0), x), images)
  assert "head" not in shapes["params"]


@pytest.mark.multidevice
def test_batch_statistics_on_devices_equal_single_device(trained, one_step):
  _, _, images, loss = trained
  params, stats, value, new_stats, grads = one_step
  mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  split = jax.device_put(images, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
  everywhere = NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (many_loss, many_stats), many_grads = step(
      jax.device_put(params, everywhere), jax.device_put(stats, everywhere), split
    )
  np.testing.assert_allclose(value, many_loss, rtol=1e-5)
  assert np.any(jax.tree.leaves(new_stats)[0] != jax.tree.leaves(stats)[0])
  assert new_stats.keys() == many_stats.keys()
  for one, many in zip(jax.tree.leaves(new_stats), jax.tree.leaves(many_stats), strict=True):
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)
  for one, many in zip(jax.tree.leaves(grads), jax.tree.leaves(many_grads), strict=True):
    np.testing.assert_allclose(one, many, rtol=1e-2, atol=1e-3)


def test_stochastic_depth_and_dropout_apply_only_in_training(trained, one_step):
  model, _, images, loss = trained
  params, stats, value, _, _ = one_step
  dropping = model.clone(drop_path_rate=0.9, dropout_rate=0.5)
  variables = {"params": params, "batch_stats": stats}
  evaluations = [str(jax.make_jaxpr(m.apply)(variables, images)) for m in (model, dropping)]
  assert evaluations[0] == evaluations[1]
  dropped = jax.jit(functools.partial(loss, model=dropping))(params, stats, images)[0]
  assert abs(dropped - value) > 1e-3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"lambda_blocks": ("none", "none", (9,), "all")}, "lambda_blocks: block 9 of c4"),
    ({"lambda_blocks": ("none", "none", "al", "all")}, "lambda_blocks: 'al' for c4"),
    ({"lambda_blocks": ("none", "all")}, "lambda_blocks: 2 entries"),
    ({"num_classes": 0}, "num_classes: 0"),
    ({"widths": (64, 0, 256, 512)}, r"widths: \(64, 0, 256, 512\)"),
    ({"blocks": (3, 4, 6, 0)}, r"blocks: \(3, 4, 6, 0\)"),
    ({"stem_width": -1}, "stem_width: -1"),
    ({"lambda_layer": {"dim_k": 0}}, "dim_k: 0"),
    ({"lambda_layer": {"receptive_field": -3}}, "receptive_field: -3"),
    ({"stem": "conv77"}, "did you mean 'conv7'"),
    ({"se_stages": ("c6",)}, "unknown stage 'c6'"),
    ({"blocks": (1, 2, 3)}, "blocks: 3 entries"),
    ({"output_stride": 5}, "output_stride: 5"),
    ({"norm": "batchnorm"}, "did you mean 'batch_norm'"),
  ],
)
def test_invalid_fields_raise(fields, message):
  short = {"blocks": (1, 1, 1, 1), "lambda_blocks": ("none", "none", "none", "all")}
  model = LambdaResNet(**{**VARIANTS["lambda_resnet_50"], **short, **fields})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))


def test_image_size_unlike_timm_variant_raises():
  model = LambdaResNet(**VARIANTS["lambda_resnet26t"])
  with pytest.raises(ValueError, match="multiples of 32"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 80, 80, 3))))


def test_lambdas_are_drawn_in_block_order_scaled_to_their_range(monkeypatch):
  monkeypatch.setattr(lambda_model, "MAX_LAYERS", 2)
  norms = np.array([[1, 2], [3, 5]], np.float32)
  layers = {"c4_block10": norms, "c4_block9": 7 * norms, "c3_block1": np.ones((4, 4), np.float32)}
  image = np.full((8, 8, 1), 200, np.uint8)
  figure = lambda_model.draw_lambdas(image, layers)
  labels = [ax.get_xlabel() for ax in figure.axes]
  assert labels == ["", "c4 block9, 2 × 2\n7 to 35", "c4 block10, 2 × 2\n1 to 5", ""]
  for ax in figure.axes[1:3]:
    scaled = (norms - 1) / 4
    np.testing.assert_array_equal(ax.images[0].get_array(), heat_map(image, scaled))
