import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.variables import random_variables
from vit_jax_zoo import create_model
from vit_jax_zoo.systems.fpt import weights_official as fpt_pt
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer
from vit_jax_zoo.weights import load_pretrained
from vit_jax_zoo.weights.load import flatten_variables

CHANNELS = (256, 512, 1024, 2048)


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, 1, -1))


def nchw(array):
  return np.moveaxis(np.asarray(array), -1, 1)


@functools.cache
def weights(name):
  return load_file(golden_folder(name) / "weights.safetensors")


def random_pyramid(sides, channels, batch=2, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(batch, *side, c) for side, c in zip(sides, channels, strict=True)]
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def count_parameters(model, sides=((8, 8), (4, 4), (2, 2), (1, 1))):
  pyramid = [
    jax.ShapeDtypeStruct((1, *side, c), jnp.float32)
    for side, c in zip(sides, CHANNELS, strict=True)
  ]
  shapes = jax.eval_shape(model.init, jax.random.key(0), pyramid)
  counts = {name: sum(x.size for x in jax.tree.leaves(p)) for name, p in shapes["params"].items()}
  return sum(counts.values()), counts


def test_parameter_counts_equal_official_code():
  total, of = count_parameters(create_model("fpt_pyramid_official"))
  assert total == 23_027_456
  assert [of[f"self_{i}"] for i in range(4)] == [198_144] * 4
  grounds = [v for k, v in of.items() if k.startswith("ground")]
  renders = [v for k, v in of.items() if k.startswith("render")]
  assert (grounds, renders) == ([132_224] * 6, [1_443_328] * 6)
  assert [of[f"lateral_{i}"] for i in range(4)] == [65_792, 131_328, 262_400, 524_544]
  assert [of[f"join_{i}"] for i in range(4)] == [2_949_376] * 4
  assert count_parameters(create_model("fpt_pyramid_official_gn"))[0] == 23_029_504
  assert count_parameters(create_model("fpt_pyramid_official", norm="batch_norm"))[0] == 23_029_504


def test_parameter_counts_equal_paper():
  """Per attention three projections and a mixture; per rendering three or two convolutions."""
  d, attention = 256, lambda parts: 3 * 256**2 + parts * 256
  expected = 4 * attention(2) + 6 * attention(4) + 6 * (2 * d**2 + 2 * 9 * d**2)
  expected += sum(CHANNELS) * d + 4 * d + 4 * (9 * 5 * d * d + d)
  assert count_parameters(FeaturePyramidTransformer())[0] == expected
  assert count_parameters(FeaturePyramidTransformer(window=5))[0] == expected


@functools.cache
def golden_model(name):
  """Returns the fixture's model and variables through the public function."""
  path = golden_folder(name) / "weights.safetensors"
  loaded = load_pretrained(str(path))
  return loaded.model, loaded.variables


@pytest.mark.parametrize("name", ["fpt_a", "fpt_gn_a"])
def test_outputs_equal_official_code(load_golden, name):
  _, inputs, outputs = load_golden(name)
  model, variables = golden_model(name)
  pyramid = [nhwc(inputs[f"res{i}"]) for i in range(2, 6)]
  out, state = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(
    variables, pyramid
  )
  intermediates = state["intermediates"]
  parts = {"st": "self", "gt": "ground", "rt": "render"}
  checked = 0
  for key, expected in outputs.items():
    kind, *levels = key.split("/")[1].split("_")
    numbers = [int(level[1:]) - 2 for level in levels if level.startswith("p")]
    if kind in parts:
      ours = intermediates["_".join([parts[kind], *map(str, numbers), "output"])][0]
    elif kind == "fpn":
      ours = intermediates[f"lateral_{numbers[0]}_output"][0]
    else:
      ours = out[numbers[0]]
    is_block = kind in parts or kind == "fpn"
    tolerance = 1e-5 * max(1, np.abs(expected).max()) if is_block else 1e-4
    np.testing.assert_allclose(nchw(ours), expected, atol=tolerance, err_msg=key)
    checked += 1
  assert checked >= 10


@pytest.mark.slow
def test_training_curve_equals_official_code(load_golden):
  config, inputs, outputs = load_golden("train_fpt_a")
  model, variables = golden_model("fpt_gn_a")
  model = model.clone(dropout_rate=0.0)
  optimizer = optax.sgd(config["optimizer"]["lr"], momentum=config["optimizer"]["momentum"])

  @jax.jit
  def step(params, stats, state, pyramid, targets):
    def loss_fn(params):
      out, changed = model.apply(
        {"params": params, "batch_stats": stats}, pyramid, train=True, mutable=["batch_stats"]
      )
      terms = [jnp.mean(jnp.square(o - t)) for o, t in zip(out, targets, strict=True)]
      return sum(terms) / 4, changed["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), stats, state, loss, optax.tree.norm(grads)

  params, stats = variables["params"], variables["batch_stats"]
  state, losses, norms = optimizer.init(params), [], []
  for index in range(config["steps"]):
    pyramid = [nhwc(inputs[f"res{i}_{index % 3}"]) for i in range(2, 6)]
    targets = [nhwc(inputs[f"target_p{i}_{index % 3}"]) for i in range(2, 6)]
    params, stats, state, loss, norm = step(params, stats, state, pyramid, targets)
    losses.append(float(loss))
    norms.append(float(norm))
  np.testing.assert_allclose(losses, outputs["loss"], rtol=1e-5)
  np.testing.assert_allclose(norms, outputs["grad_norm"], rtol=2e-4)
  trained = jax.device_get({"params": params, "batch_stats": stats})
  final = fpt_pt.state_dict(flatten_variables(trained))
  start = weights("fpt_gn_a")
  for key, expected in outputs.items():
    if key.startswith(("param/", "bn/")):
      name = key.split("/")[1]
      distance = np.linalg.norm(final[name] - expected)
      assert distance <= 2e-3 * np.linalg.norm(expected - start[name]), key


SIDES, NARROW = ((11, 7), (6, 4)), (6, 5)
VARIANTS = {
  "paper": {"variant": "paper", "norm": "batch_norm", "drop_block_rate": 0.2, "window": 3},
  "official": {"variant": "official", "norm": "group_norm"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request):
  """A small model of a variant, random variables, and its gradients."""
  model = FeaturePyramidTransformer(32, **VARIANTS[request.param])
  pyramid = random_pyramid(SIDES, NARROW)
  variables = random_variables(model.init, pyramid)

  def loss(params, variables, pyramid):
    out, changed = model.apply(
      {**variables, "params": params},
      pyramid,
      train=True,
      rngs={"dropout": jax.random.key(1)},
      mutable=["batch_stats"],
    )
    weighed = [jnp.mean(jnp.sin(x) * (i + 1)) for i, x in enumerate(out)]
    return sum(weighed), changed.get("batch_stats", {})

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return model, variables, pyramid, step, step(variables["params"], variables, pyramid)


def test_gradients_are_finite_and_nonzero_where_used(trained):
  _, _, _, _, (_, grads) = trained
  for path, grad in jax.tree.leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.isfinite(grad).all(), name
    unused = name.endswith(("concat/kernel", "reduce/kernel"))
    assert np.any(grad != 0) != unused, name


def test_outputs_keep_sizes_and_bfloat16_is_near_float32(trained):
  model, variables, pyramid, _, _ = trained
  exact = jax.jit(model.apply)(variables, pyramid)
  assert [x.shape for x in exact] == [(2, *side, 32) for side in SIDES]
  half = jax.jit(model.clone(dtype="bfloat16").apply)(variables, pyramid)
  for one, other in zip(exact, half, strict=True):
    assert other.dtype == jnp.bfloat16
    correlation = np.corrcoef(np.ravel(one), np.ravel(other.astype(jnp.float32)))[0, 1]
    assert correlation > 0.99


@pytest.mark.long
def test_jit_equals_eager():
  model, pyramid = FeaturePyramidTransformer(32), random_pyramid(((4, 2), (2, 1)), (3, 5), 1)
  variables = random_variables(model.init, pyramid)
  for eager, jitted in zip(
    model.apply(variables, pyramid), jax.jit(model.apply)(variables, pyramid), strict=True
  ):
    np.testing.assert_allclose(jitted, eager, atol=1e-5)


@pytest.mark.multidevice
def test_statistics_and_gradients_on_devices_equal_single_device(trained):
  _, variables, pyramid, step, ((value, stats), grads) = trained
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  split = jax.device_put(pyramid, NamedSharding(mesh, PartitionSpec("data")))
  everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
  with jax.set_mesh(mesh):
    (many, many_stats), many_grads = step(everywhere["params"], everywhere, split)
  np.testing.assert_allclose(many, value, rtol=1e-5)
  for one, other in ((stats, many_stats), (grads, many_grads)):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_levels_may_have_equal_sizes():
  """The pyramid of segmentation models has levels of equal size."""
  model = FeaturePyramidTransformer(32, lateral=False, window=3, norm="none")
  pyramid = random_pyramid(((4, 5),) * 3, (32,) * 3, 1)
  shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), pyramid)[0]
  assert [x.shape for x in shapes] == [(1, 4, 5, 32)] * 3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"variant": "papper"}, "did you mean 'paper'"),
    ({"norm": "layer_norm"}, "unknown norm 'layer_norm'"),
    ({"variant": "official", "window": 3}, "window: variant"),
    ({"self_parts": 3}, "32 channels .* 3 parts"),
    ({"lateral": False}, "level 0 has 6 channels"),
  ],
)
def test_invalid_fields_raise(fields, message):
  model = FeaturePyramidTransformer(32, **fields)
  pyramid = random_pyramid(SIDES, NARROW, 1)
  with pytest.raises(ValueError, match=message) as caught:
    jax.eval_shape(model.init, jax.random.key(0), pyramid)
  assert "\n" not in str(caught.value)
