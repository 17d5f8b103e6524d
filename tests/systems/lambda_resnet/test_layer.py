import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.half_precision import bfloat16_errors
from vit_jax_zoo.systems.lambda_resnet import layer as lambdas
from vit_jax_zoo.systems.lambda_resnet.layer import LambdaLayer

apply_lambdas = jax.jit(lambdas.apply_lambdas, static_argnames="implementation")


def random_map(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def example(batch=2, size=(5, 7), heads=3, k=4, u=1, v=6, window=(9, 13)):
  """Queries, keys, values and embeddings."""
  return (
    random_map(0, (batch, *size, heads, k)),
    random_map(1, (batch, *size, u, k)),
    random_map(2, (batch, *size, u, v)),
    random_map(3, (*window, u, k)),
  )


def dense_reference(queries, keys, values, window):
  """The layer from its definition, position by position, in float64."""
  queries, keys, values, window = (
    np.asarray(x, np.float64) for x in (queries, keys, values, window)
  )
  batch, height, width, heads, _ = queries.shape
  out = np.zeros((batch, height, width, heads, values.shape[-1]))
  middle = np.asarray(window.shape[:2]) // 2
  places = [(y, x) for y in range(height) for x in range(width)]
  weights = np.exp(keys)
  weights /= weights.sum(axis=(1, 2), keepdims=True)
  for y, x in places:
    for row, column in places:
      offset = np.add(middle, (row - y, column - x))
      inside = np.all(offset >= 0) and np.all(offset < window.shape[:2])
      embedding = window[tuple(offset)] if inside else 0.0
      linear = np.einsum(
        "buk,buv->bkv", weights[:, row, column] + embedding, values[:, row, column]
      )
      out[:, y, x] += np.einsum("bik,bkv->biv", queries[:, y, x], linear)
  return out


@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
@pytest.mark.parametrize(
  ("size", "u", "window"),
  [((5, 7), 1, (9, 13)), ((4, 3), 2, (3, 3)), ((3, 6), 2, (7, 5)), ((2, 2), 1, (9, 9))],
)
def test_apply_lambdas_equals_definition(implementation, size, u, window):
  inputs = example(size=size, u=u, window=window)
  output = apply_lambdas(*inputs, implementation=implementation).output
  np.testing.assert_allclose(output, dense_reference(*inputs), atol=2e-5)


def test_einsum_and_convolution_have_equal_gradients():
  inputs = example(u=2, window=(3, 5))

  def loss(implementation, *inputs):
    return jnp.sum(lambdas.apply_lambdas(*inputs, implementation=implementation).output ** 2)

  gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
  grads = [gradient(name, *inputs) for name in ("einsum", "convolution")]
  for one, other in zip(*grads, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
    assert np.abs(one).max() > 0


def test_lambdas_equal_paper_pseudocode(load_golden):
  _, inputs, outputs = load_golden("lambda_paper_a")
  result = apply_lambdas(
    jnp.einsum("bhnk->bnhk", inputs["queries_bhnk"])[:, None],
    jnp.einsum("bmku->bmuk", inputs["keys_bmku"])[:, None],
    jnp.einsum("bmvu->bmuv", inputs["values_bmvu"])[:, None],
    jnp.einsum("rku->ruk", inputs["rel_table_rku"])[None],
  )
  expected = outputs["output"]
  np.testing.assert_allclose(result.output.reshape(expected.shape), expected, atol=1e-5)
  np.testing.assert_allclose(result.content_lambda, outputs["content_lambda"], atol=1e-5)
  np.testing.assert_allclose(result.position_lambda[:, 0], outputs["position_lambdas"], atol=1e-5)


@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
def test_position_lambdas_are_translation_equivariant(implementation):
  _, _, values, window = example(size=(8, 9), window=(5, 5))
  inside = jnp.pad(values[:, :4, :4], ((0, 0), (2, 6), (2, 7), (0, 0), (0, 0)))
  moved = jnp.roll(inside, (3, 4), axis=(1, 2))

  @jax.jit
  def apply(values):
    queries, keys, _, _ = example(size=values.shape[1:3])
    return lambdas.apply_lambdas(
      queries, keys, values, window, implementation=implementation
    ).position_lambda

  np.testing.assert_allclose(
    jnp.roll(apply(inside), (3, 4), axis=(1, 2))[:, 3:, 4:], apply(moved)[:, 3:, 4:], atol=1e-5
  )


def intermediate_shapes(function, *inputs):
  """Returns the shapes of all intermediate values of a function, including nested functions."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval.shape for variable in equation.outvars)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from walk(inner)

  return list(walk(jax.make_jaxpr(function)(*inputs).jaxpr))


def test_no_intermediate_has_batch_query_and_context_axes():
  batch, positions = 11, 5 * 7
  apply = functools.partial(lambdas.apply_lambdas, implementation="einsum")
  shapes = intermediate_shapes(apply, *example(batch=batch, v=3))
  sizes = [int(np.prod(shape)) for shape in shapes]
  assert positions**2 * 4 in sizes  # the embeddings of all pairs (k = 4), shared by all images
  assert max(size for size in sizes if size % batch == 0) < batch * positions**2


def test_memory_of_position_embeddings_is_independent_of_batch_size():
  def temporaries(batch):
    inputs = example(batch=batch, size=(16, 16), heads=1, k=8, v=2, window=(31, 31))
    apply = jax.jit(lambda *x: apply_lambdas(*x, implementation="einsum").output)
    return apply.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

  embeddings = 256**2 * 8 * 4
  one, many = temporaries(1), temporaries(17)
  assert one > embeddings
  assert many - one < 16 * 256**2 * 4 / 8  # far below one attention map per image


def test_choose_implementation_minimizes_cost():
  choose = lambdas.choose_implementation
  assert choose((16, 16), (31, 31, 1, 16)) == "einsum"  # global
  assert choose((16, 16), (9, 9, 1, 16)) == "einsum"
  assert choose((56, 56), (23, 23, 1, 16)) == "einsum"
  assert choose((56, 56), (7, 7, 1, 16)) == "convolution"
  assert choose((85, 85), (169, 169, 1, 16)) == "einsum"  # the paper's limit
  assert choose((86, 86), (171, 171, 1, 16)) == "convolution"
  assert choose((56, 56), (111, 111, 8, 16)) == "convolution"


@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
def test_bfloat16_outputs_and_gradients_are_near_float32(implementation):
  apply = functools.partial(apply_lambdas, implementation=implementation)
  inputs = example(size=(16, 16), window=(3, 3))
  assert max(bfloat16_errors(lambda *x: apply(*x).output, *inputs)) < 0.02
  result = apply(*(x.astype(jnp.bfloat16) for x in inputs))
  assert result.output.dtype == jnp.bfloat16
  assert result.content_lambda.dtype == result.position_lambda.dtype == jnp.float32


def test_position_embedding_of_even_side_raises():
  queries, keys, values, window = example()
  with pytest.raises(ValueError, match=r"position_embedding: sides \(4, 13\)"):
    apply_lambdas(queries, keys, values, window[:4])


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
  """1e-5 of the largest value: lambdas multiply activations, and sums of large terms may cancel."""
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
def test_layer_equals_timm(load_golden, name, stride):
  golden = load_golden(name)
  config, _, outputs = golden
  layer = LambdaLayer(
    num_heads=config["num_heads"],
    dim_k=config["dim_qk"],
    receptive_field=config["r"],
    position_bias=config["r"] is not None,
    stride=stride,
    pool_size=2,
  )
  variables = timm_variables(load_file(golden_folder(name) / "weights.safetensors"))
  out = check_against(golden, layer, variables)
  assert_close(out, outputs["out" if stride == 1 else "out_stride2"])


@pytest.mark.parametrize("name", ["lambda_lucid_local_a", "lambda_lucid_global_a"])
@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
def test_layer_equals_lucidrains(load_golden, name, implementation):
  golden = load_golden(name)
  config, _, outputs = golden
  layer = LambdaLayer(
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


NORM = {"scale": 1, "bias": 0, "mean": 0, "var": 1}


def random_layer(shape, **fields):
  """Returns a jitted layer, its variables, and a random map of this shape."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  layer = LambdaLayer(**{"dim_k": 4, "receptive_field": 3, **fields})
  shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, train=False), x)
  rng = np.random.default_rng(2)
  variables = jax.tree.map_with_path(
    lambda path, leaf: (
      np.full(leaf.shape, NORM[path[-1].key], np.float32)
      if path[-1].key in NORM
      else rng.normal(0, 0.5, leaf.shape).astype(np.float32)
    ),
    shapes,
  )
  return jax.jit(lambda v, x: layer.apply(v, x, train=False)), variables, x


def test_jit_equals_eager():
  layer, variables, x = random_layer((1, 4, 3, 8))
  variables = jax.tree.map(jnp.asarray, variables)
  eager = LambdaLayer(dim_k=4, receptive_field=3).apply(variables, x, train=False)
  np.testing.assert_allclose(layer(variables, x), eager, atol=1e-4)


def test_local_layer_is_translation_equivariant():
  layer, variables, x = random_layer((2, 12, 12, 8), receptive_field=3)
  x = x.at[:, :3].set(0).at[:, 8:].set(0).at[:, :, :3].set(0).at[:, :, 8:].set(0)
  moved = jnp.roll(x, (2, 1), axis=(1, 2))
  out = layer(variables, x)
  np.testing.assert_allclose(jnp.roll(out, (2, 1), axis=(1, 2)), layer(variables, moved), atol=1e-4)


def test_global_table_is_cropped_or_extended_for_other_map_sizes():
  layer, variables, x = random_layer((1, 6, 5, 8), receptive_field=None)
  assert variables["params"]["position_embedding"].shape == (11, 9, 1, 4)
  small = layer(variables, x[:, :4, :3])
  cropped = jax.tree.map(lambda v: v, variables)
  cropped["params"]["position_embedding"] = variables["params"]["position_embedding"][2:9, 2:7]
  np.testing.assert_allclose(small, layer(cropped, x[:, :4, :3]), atol=1e-5)
  assert layer(variables, np.ones((1, 8, 7, 8))).shape == (1, 8, 7, 8)


def test_paper_initialisation_has_stated_standard_deviations():
  layer = LambdaLayer(num_heads=8, dim_k=16, receptive_field=23)
  init = jax.jit(functools.partial(layer.init, train=False))
  params = init(jax.random.key(0), jnp.zeros((1, 4, 4, 256)))["params"]
  kernel = np.asarray(params["qkv"]["kernel"])
  assert kernel.shape == (256, 8 * 16 + 16 + 256 // 8)
  np.testing.assert_allclose(kernel[:, :128].std(), (16 * 256) ** -0.5, rtol=0.05)
  np.testing.assert_allclose(kernel[:, 128:].std(), 256**-0.5, rtol=0.05)
  np.testing.assert_allclose(np.std(params["position_embedding"]), 1, rtol=0.05)


def test_outputs_have_expected_shapes_and_dtypes():
  layer, variables, x = random_layer(
    (2, 5, 7, 12), num_heads=3, dim_u=2, stride=2, dtype="bfloat16"
  )
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
  out = layer(variables, x)
  assert out.shape == (2, 3, 4, 12)
  assert out.dtype == jnp.bfloat16


def test_strided_pooling_excludes_padding():
  fields = {"num_heads": 1}
  layer, variables, x = random_layer((1, 4, 4, 2), **fields)
  full = layer(variables, x)
  pooled = random_layer((1, 4, 4, 2), stride=2, **fields)[0](variables, x)
  np.testing.assert_allclose(pooled[0, 0, 0], full[0, :2, :2].mean((0, 1)), atol=1e-5)
  np.testing.assert_allclose(pooled[0, 1, 1], full[0, 1:4, 1:4].mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 3}, "num_heads: 3"),
    ({"receptive_field": 4}, "receptive_field: 4"),
    ({"stride": 3}, "stride: 3"),
    ({"pool_size": 4}, "pool_size 4"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    random_layer((1, 4, 4, 8), **fields)
