import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer


def norm_variables(weights, name):
  """Parameters and running statistics of a PyTorch batch norm."""
  params = {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}
  stats = {"mean": weights[f"{name}.running_mean"], "var": weights[f"{name}.running_var"]}
  return params, stats


def variables_of(kernel, embedding, weights, bias=None):
  params, stats = {"qkv": {"kernel": kernel}, "position_embedding": embedding}, {}
  if bias is not None:
    params["position_bias"] = bias
  for ours, theirs in (("query_norm", "norm_q"), ("value_norm", "norm_v")):
    params[ours], stats[ours] = norm_variables(weights, theirs)
  return {"params": params, "batch_stats": stats}


def timm_variables(weights):
  if "pos_emb" in weights:
    embedding, bias = weights["pos_emb"][:, :, None], None
  else:
    embedding = np.einsum("kuyxo->yxuk", weights["conv_lambda.weight"])
    bias = weights["conv_lambda.bias"]
  variables = variables_of(weights["qkv.weight"][:, :, 0, 0].T, embedding, weights, bias)
  if "qkv.bias" in weights:
    variables["params"]["qkv"]["bias"] = weights["qkv.bias"]
  return variables


def lucid_variables(weights):
  kernels = [weights[f"to_{name}.weight"][:, :, 0, 0].T for name in "qkv"]
  if "rel_pos_emb" in weights:
    embedding, bias = np.swapaxes(weights["rel_pos_emb"], 2, 3), None
  else:
    embedding = np.einsum("kuoyx->yxuk", weights["pos_conv.weight"])
    bias = weights["pos_conv.bias"]
  return variables_of(np.concatenate(kernels, axis=1), embedding, weights, bias)


def assert_close(actual, expected):
  """1e-5 of the largest value: lambdas multiply activations, sums of large terms may cancel."""
  np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def check_against(golden, layer, variables):
  """Compares lambdas and output; returns the output in PyTorch's layout."""
  _, inputs, outputs = golden
  images = jnp.asarray(np.moveaxis(inputs["x"], 1, -1))
  apply = jax.jit(lambda v, x: layer.apply(v, x, train=False, mutable=["intermediates"]))
  out, state = apply(variables, images)
  content = state["intermediates"]["content_lambda"][0]
  position = state["intermediates"]["position_lambda"][0]
  expected = outputs["position_lambda_bnkv"]
  assert_close(content, outputs["content_lambda_bkv"])
  assert_close(position.reshape(expected.shape), expected)
  return np.moveaxis(np.asarray(out), -1, 1)


@pytest.mark.parametrize("name", ["lambda_timm_local_a", "lambda_timm_global_a"])
@pytest.mark.parametrize("stride", [1, 2])
def test_timm_golden(load_golden, name, stride):
  golden = load_golden(name)
  config, _, outputs = golden
  layer = LambdaLayer(
    num_heads=config["num_heads"],
    dim_k=config["dim_qk"],
    receptive_field=config["r"],
    position_bias=config["r"] is not None,
    qkv_bias=config["qkv_bias"],
    stride=stride,
    pool_size=2,
  )
  variables = timm_variables(load_file(golden_folder(name) / "weights.safetensors"))
  out = check_against(golden, layer, variables)
  assert_close(out, outputs["out" if stride == 1 else "out_stride2"])


@pytest.mark.parametrize("name", ["lambda_lucid_local_a", "lambda_lucid_global_a"])
@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
def test_lucidrains_golden(load_golden, name, implementation):
  golden = load_golden(name)
  config, _, outputs = golden
  layer = LambdaLayer(
    dim_out=config.get("dim_out", config["dim"]),
    num_heads=config["heads"],
    dim_k=config["dim_k"],
    dim_u=config["dim_u"],
    receptive_field=config.get("r"),
    position_bias="r" in config,
    implementation=implementation,
  )
  variables = lucid_variables(load_file(golden_folder(name) / "weights.safetensors"))
  out = check_against(golden, layer, variables)
  assert_close(out, outputs["out"])


def random_layer(shape, **fields):
  """A jitted layer, its variables, and a map of this shape."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  layer = LambdaLayer(**{"dim_k": 4, "receptive_field": 3, **fields})
  variables = jax.jit(lambda x: layer.init(jax.random.key(0), x, train=False))(x)
  return jax.jit(lambda v, x: layer.apply(v, x, train=False)), variables, x


def test_scope_is_translation_equivariant_through_the_module():
  layer, variables, x = random_layer((2, 12, 12, 8), receptive_field=3)
  x = x.at[:, :3].set(0).at[:, 8:].set(0).at[:, :, :3].set(0).at[:, :, 8:].set(0)
  moved = jnp.roll(x, (2, 1), axis=(1, 2))
  out = layer(variables, x)
  np.testing.assert_allclose(jnp.roll(out, (2, 1), axis=(1, 2)), layer(variables, moved), atol=1e-4)


def test_global_table_serves_maps_of_other_sizes():
  layer, variables, x = random_layer((1, 6, 5, 8), receptive_field=None)
  assert variables["params"]["position_embedding"].shape == (11, 9, 1, 4)
  small = layer(variables, x[:, :4, :3])
  cropped = jax.tree.map(lambda v: v, variables)
  cropped["params"]["position_embedding"] = variables["params"]["position_embedding"][2:9, 2:7]
  np.testing.assert_allclose(small, layer(cropped, x[:, :4, :3]), atol=1e-5)
  assert layer(variables, np.ones((1, 8, 7, 8))).shape == (1, 8, 7, 8)


def test_paper_initialisation_has_the_stated_deviations():
  _, variables, _ = random_layer((1, 4, 4, 256), num_heads=8, dim_k=16, receptive_field=23)
  params = variables["params"]
  kernel = np.asarray(params["qkv"]["kernel"])
  assert kernel.shape == (256, 8 * 16 + 16 + 256 // 8)
  np.testing.assert_allclose(kernel[:, :128].std(), (16 * 256) ** -0.5, rtol=0.05)
  np.testing.assert_allclose(kernel[:, 128:].std(), 256**-0.5, rtol=0.05)
  np.testing.assert_allclose(np.std(params["position_embedding"]), 1, rtol=0.05)


def test_options_shapes_and_dtypes():
  layer, variables, x = random_layer(
    (2, 5, 7, 8), dim_out=12, num_heads=3, dim_u=2, qkv_bias=True, stride=2, dtype="bfloat16"
  )
  assert variables["params"]["qkv"]["bias"].shape == (3 * 4 + 2 * 4 + 2 * 4,)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
  out = layer(variables, x)
  assert out.shape == (2, 3, 4, 12)
  assert out.dtype == jnp.bfloat16


def test_strided_pooling_leaves_the_border_s_padding_out():
  fields = {"num_heads": 1, "dim_out": 2}
  layer, variables, x = random_layer((1, 4, 4, 2), **fields)
  full = layer(variables, x)
  pooled = random_layer((1, 4, 4, 2), stride=2, **fields)[0](variables, x)
  np.testing.assert_allclose(pooled[0, 0, 0], full[0, :2, :2].mean((0, 1)), atol=1e-5)
  np.testing.assert_allclose(pooled[0, 1, 1], full[0, 1:4, 1:4].mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 3}, "dim_out 8 is not a multiple of num_heads 3"),
    ({"receptive_field": 4}, "receptive_field must be odd, not 4"),
    ({"initialization": "papr"}, "did you mean 'paper'"),
    ({"stride": 3}, "stride is 1 or 2"),
    ({"pool_size": 4}, "pool_size 2 or 3"),
  ],
)
def test_errors_are_one_clear_line(fields, message):
  with pytest.raises(ValueError, match=message):
    random_layer((1, 4, 4, 8), **fields)
