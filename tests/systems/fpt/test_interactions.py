import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.variables import random_variables
from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.systems.fpt import transformer as official
from vit_jax_zoo.systems.fpt import weights_official as fpt_pt
from vit_jax_zoo.systems.fpt.transformer import (
  GroundingTransformer,
  RenderingTransformer,
  SelfTransformer,
  side_ratio,
)
from vit_jax_zoo.weights.key_map import read
from vit_jax_zoo.weights.torch_layouts import batch_norm_rows


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, 1, -1))


def nchw(array):
  return np.moveaxis(np.asarray(array), -1, 1)


def paper_variables(kind):
  arrays = load_file(golden_folder("fpt_paper_a") / "weights.safetensors")
  names = {"query": "q", "key": "k", "value": "v"}
  params = {name: {"kernel": jnp.asarray(arrays[f"{kind}.{n}"].T)} for name, n in names.items()}
  return {"params": {**params, "mixture": jnp.asarray(arrays[f"{kind}.mos"])}}


@pytest.mark.parametrize("kind", ["st", "gt", "lgt"])
def test_interactions_equal_paper_golden(load_golden, kind):
  config, inputs, outputs = load_golden("fpt_paper_a")
  fields = {"width": config["d"], "num_parts": config["N"]}
  module = {
    "st": SelfTransformer(**fields),
    "gt": GroundingTransformer(**fields),
    "lgt": GroundingTransformer(**fields, window=config["window"]),
  }[kind]
  maps = {"st": ["x_fine"], "gt": ["x_fine", "x_coarse"], "lgt": ["x_fine", "x_coarse_same_size"]}
  maps = [nhwc(inputs[name]) for name in maps[kind]]
  apply = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))
  out, state = apply(paper_variables(kind), *maps)
  intermediates = state["intermediates"]
  np.testing.assert_allclose(intermediates["mixture"][0], outputs[f"{kind}/pi"], atol=1e-5)
  np.testing.assert_allclose(intermediates["weights"][0], outputs[f"{kind}/weights"], atol=1e-5)
  np.testing.assert_allclose(nchw(out), outputs[kind], atol=1e-5)
  blocks = module.clone(block_elements=400)  # 2 or 9 of 48 queries per block
  alone = jax.jit(blocks.apply)(paper_variables(kind), *maps)
  np.testing.assert_allclose(alone, out, atol=1e-6)


def official_module(name, config):
  """Returns the module of a golden's entry, and the rows of its parameter names."""
  if name.startswith("st_"):
    return official.OfficialSelfTransformer(32, config["n_mix"]), fpt_pt.module_rows(
      "st", name, "m"
    )
  if name.startswith("gt_"):
    return official.OfficialGroundingTransformer(32), fpt_pt.module_rows("gt", name, "m")
  rows = fpt_pt.module_rows("rt", name, "m")
  if config.get("upsample"):  # the strided convolution has another norm's name
    rows += batch_norm_rows(f"{name}.bn_upsample", "m/added_norm")
  return official.OfficialRenderingTransformer(32), rows


def module_variables(module, rows, published, maps):
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), *maps)
  expected_shapes = {
    ("m/" if collection == "params" else "batch_stats/m/") + path: leaf.shape
    for collection, tree in shapes.items()
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()
  }
  if any("conv_upsample" in key for key in published):  # then there is no `conv_reduction`
    published[f"{next(iter(published)).split('.')[0]}.conv_reduction.weight"] = np.zeros(
      (32,) * 2 + (1, 1)
    )
  ignore = [r".*(num_batches|conv_ks|conv_upsample).*"]
  flat = read(published, rows, expected_shapes, source="golden", ignore=ignore)
  tree = {"params": {}, "batch_stats": {}}
  for path, array in flat.items():
    collection, _, rest = path.rpartition("m/") if path.count("m/") == 1 else path.partition("m/")
    tree["batch_stats" if collection else "params"][rest] = array
  return {k: traverse_util.unflatten_dict(v, sep="/") for k, v in tree.items() if v}


MODULES = (
  "st_mix1",
  "st_mix2",
  "st_mix4",
  "gt_dot",
  "rt",
  "rt_up",
  "rt_ratio4_repeat",
)


@pytest.mark.parametrize("name", MODULES)
def test_interactions_equal_official_code(load_golden, name):
  config, inputs, outputs = load_golden("fpt_modules_a")
  module, rows = official_module(name, config["modules"][name])
  weights = load_file(golden_folder("fpt_modules_a") / "weights.safetensors")
  published = {key: array for key, array in weights.items() if key.split(".")[0] == name}
  names = {
    "st": ["x"],
    "gt": ["x", "x_high"],
    "rt": ["x_high", "x_low_ratio4" if "ratio4" in name else "x"],
  }[name[:2]]
  maps = [nhwc(inputs[key]) for key in names]
  variables = module_variables(module, rows, published, maps)
  apply = functools.partial(module.apply, train=False, mutable=["intermediates"])
  out, state = jax.jit(apply)(variables, *maps)
  np.testing.assert_allclose(nchw(out), outputs[name], rtol=1e-5, atol=1e-5)
  if f"{name}/attn" in outputs:
    weights = state["intermediates"]["weights"][0]
    np.testing.assert_allclose(weights, outputs[f"{name}/attn"], atol=1e-5)
  if name == "st_mix2":
    blocks = module.clone(block_elements=200)
    again = jax.jit(functools.partial(blocks.apply, train=False))(variables, *maps)
    np.testing.assert_allclose(again, out, atol=1e-5)


def test_rendering_transformer_equals_definition():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 2, 3, 4)), jnp.float32)
  fine = jnp.asarray(rng.normal(size=(2, 7, 9, 4)), jnp.float32)  # 7 -> 4 -> 2, 9 -> 5 -> 3
  module = RenderingTransformer(4)
  params = random_variables(module.init, x, fine)["params"]
  out = jax.jit(module.apply)({"params": params}, x, fine)
  kernels = {name: np.asarray(layer["kernel"]) for name, layer in params.items()}
  gate = (np.asarray(fine) @ kernels["key"]).mean((1, 2), keepdims=True)
  gated, padded = (
    np.pad(m, ((0, 0), (1, 1), (1, 1), (0, 0))) for m in (x @ kernels["query"] * gate, fine)
  )
  for i in range(2):
    for j in range(3):
      refined = np.einsum("bijc,ijcd->bd", gated[:, i : i + 3, j : j + 3], kernels["refine"])
      pooled = padded[:, 4 * i : 4 * i + 3, 4 * j : 4 * j + 3]
      pooled = np.einsum("bijc,ijcd->bd", pooled, kernels["value"])
      np.testing.assert_allclose(out[:, i, j], refined + pooled, atol=1e-5)


def test_side_ratio_is_power_of_two_or_raises():
  assert [side_ratio((25, 38), size) for size in ((25, 38), (13, 19), (7, 10), (4, 5))] == [
    1,
    2,
    4,
    8,
  ]
  assert side_ratio((1, 8), (1, 1)) == 8
  for size in ((12, 19), (26, 38), (5, 13)):
    with pytest.raises(ValueError, match="25x38"):
      side_ratio((25, 38), size)


def test_grounding_window_is_centered_on_coarse_cell():
  """With a window of one position, a query attends to the coarse cell that contains it."""
  module = GroundingTransformer(4, 2, window=1)
  x, coarse = jnp.ones((1, 4, 6, 4)), jnp.arange(24.0).reshape(1, 2, 3, 4)
  params = jax.jit(module.init)(jax.random.key(0), x, coarse)["params"]
  params["value"]["kernel"] = jnp.eye(4)
  out = jax.jit(module.apply)({"params": params}, x, coarse)
  np.testing.assert_array_equal(out, coarse.repeat(2, axis=1).repeat(2, axis=2))
  with pytest.raises(ValueError, match="window: 4"):
    jax.eval_shape(GroundingTransformer(4, 2, window=4).init, jax.random.key(0), x, coarse)


def test_attention_dropout_keeps_mean_and_is_random():
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 20, 20, 4)), jnp.float32)
  module = official.OfficialSelfTransformer(4, dropout_rate=0.5, block_elements=2 * 100 * 40)
  variables = random_variables(functools.partial(module.init, train=False), x)
  variables["params"]["norm"]["scale"] = jnp.ones(4)

  @jax.jit
  def weights(key):
    rngs = {"dropout": key}
    state = module.apply(
      variables, x, train=True, rngs=rngs, mutable=["batch_stats", "intermediates"]
    )
    return state[0], state[1]["intermediates"]["weights"][0]

  outputs, maps = zip(*(weights(jax.random.key(i)) for i in range(8)), strict=True)
  assert np.std(outputs[0] - outputs[1]) > 0.01
  np.testing.assert_allclose(np.mean([m.sum(-1) for m in maps]), 1.0, atol=0.02)
  assert np.mean(np.asarray(maps[0]) == 0) == pytest.approx(0.25, abs=0.02)  # both parts dropped


def test_drop_block_drops_squares_at_given_rate():
  x = jnp.ones((4, 40, 40, 8))
  module = DropBlock(0.2, 5)
  out = np.asarray(module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
  dropped = out == 0
  assert 0.13 < dropped.mean() < 0.2  # squares overlap
  assert out.mean() == pytest.approx(1.0, abs=1e-4)
  runs = np.diff(np.pad(dropped, ((0, 0), (1, 1), (0, 0), (0, 0))).astype(int), axis=1)
  starts, ends = np.argwhere(runs == 1), np.argwhere(runs == -1)
  assert len(starts) == len(ends)
  lengths = [
    np.flatnonzero(column == -1) - np.flatnonzero(column == 1)
    for column in np.moveaxis(runs, 1, -1).reshape(-1, runs.shape[1])
  ]
  assert min(length.min() for length in lengths if length.size) == 5
  np.testing.assert_array_equal(module.apply({}, x, train=False), x)
  for fields in ({"rate": 1.0}, {"rate": 0.1, "block_size": 0}):
    with pytest.raises(ValueError, match=r"rate|block_size"):
      DropBlock(**fields).apply({}, x, train=True)
