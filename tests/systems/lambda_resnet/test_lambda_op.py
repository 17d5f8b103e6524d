import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.lambda_resnet import lambda_op

lambda_layer = jax.jit(lambda_op.lambda_layer, static_argnames="implementation")


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


def dense_reference(queries, keys, values, window, mask=None):
  """The layer from its definition, position by position, in float64."""
  queries, keys, values, window = (
    np.asarray(x, np.float64) for x in (queries, keys, values, window)
  )
  batch, height, width, heads, _ = queries.shape
  out = np.zeros((batch, height, width, heads, values.shape[-1]))
  middle = np.asarray(window.shape[:2]) // 2
  places = [(y, x) for y in range(height) for x in range(width)]
  for n, (y, x) in enumerate(places):
    context = [m for m in range(len(places)) if mask is None or mask[n, m]]
    rows, columns = zip(*[places[m] for m in context], strict=True)
    weights = np.exp(keys[:, rows, columns])
    weights /= weights.sum(axis=1, keepdims=True)
    for m, row, column in zip(range(len(context)), rows, columns, strict=True):
      offset = np.add(middle, (row - y, column - x))
      inside = np.all(offset >= 0) and np.all(offset < window.shape[:2])
      embedding = window[tuple(offset)] if inside else 0.0
      linear = np.einsum("buk,buv->bkv", weights[:, m] + embedding, values[:, row, column])
      out[:, y, x] += np.einsum("bik,bkv->biv", queries[:, y, x], linear)
  return out


@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
@pytest.mark.parametrize(
  ("size", "u", "window"),
  [((5, 7), 1, (9, 13)), ((4, 3), 2, (3, 3)), ((3, 6), 2, (7, 5)), ((2, 2), 1, (9, 9))],
)
def test_equals_its_definition(implementation, size, u, window):
  inputs = example(size=size, u=u, window=window)
  output = lambda_layer(*inputs, implementation=implementation).output
  np.testing.assert_allclose(output, dense_reference(*inputs), atol=2e-5)


def test_einsum_and_convolution_have_the_same_gradients():
  inputs = example(u=2, window=(3, 5))

  def loss(implementation, *inputs):
    return jnp.sum(lambda_op.lambda_layer(*inputs, implementation=implementation).output ** 2)

  gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
  grads = [gradient(name, *inputs) for name in ("einsum", "convolution")]
  for one, other in zip(*grads, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
    assert np.abs(one).max() > 0


@pytest.mark.parametrize("mask_name", ["mask_causal_inclusive", "mask_random", None])
def test_paper_golden(load_golden, mask_name):
  _, inputs, outputs = load_golden("lambda_paper_a")
  result = lambda_layer(
    jnp.einsum("bhnk->bnhk", inputs["queries_bhnk"])[:, None],
    jnp.einsum("bmku->bmuk", inputs["keys_bmku"])[:, None],
    jnp.einsum("bmvu->bmuv", inputs["values_bmvu"])[:, None],
    jnp.einsum("rku->ruk", inputs["rel_table_rku"])[None],
    mask=None if mask_name is None else jnp.asarray(inputs[mask_name], bool),
  )
  name = "output" if mask_name is None else mask_name.replace("mask_", "masked_") + "/output"
  expected = outputs[name]
  np.testing.assert_allclose(result.output.reshape(expected.shape), expected, atol=1e-5)
  if mask_name is None:
    np.testing.assert_allclose(result.content_lambda, outputs["content_lambda"], atol=1e-5)
    np.testing.assert_allclose(result.position_lambda[:, 0], outputs["position_lambdas"], atol=1e-5)


def test_masked_equals_cropped():
  queries, keys, values, window = example(size=(4, 6), window=(7, 11))
  visible = np.zeros((4, 6), bool)
  visible[:3, 1:5] = True
  mask = jnp.asarray(np.broadcast_to(visible.reshape(-1), (24, 24)))
  masked = lambda_layer(queries, keys, values, window, mask=mask).output

  def crop(x):
    return x[:, :3, 1:5]

  cropped = lambda_layer(crop(queries), crop(keys), crop(values), window).output
  np.testing.assert_allclose(crop(masked), cropped, atol=1e-5)


def test_masked_keys_are_normalised_among_themselves_however_small():
  queries, keys, values, window = example(size=(1, 4), window=(1, 7))
  keys = keys.at[:, :, 0].add(1e4)  # would leave the other keys nothing of a global softmax
  mask = jnp.asarray(np.tile([False, True, True, True], (4, 1)))
  masked = lambda_layer(queries, keys, values, window, mask=mask).output
  np.testing.assert_allclose(
    masked, dense_reference(queries, keys, values, window, mask), atol=2e-5
  )


def test_a_query_without_context_gets_zeros():
  inputs = example(size=(2, 2), window=(3, 3))
  mask = jnp.ones((4, 4), bool).at[1].set(False)
  output = lambda_layer(*inputs, mask=mask).output
  np.testing.assert_array_equal(output[:, 0, 1], 0)
  assert np.abs(output[:, 0, 0]).max() > 0


@pytest.mark.parametrize("implementation", ["einsum", "convolution"])
def test_position_lambdas_are_translation_equivariant(implementation):
  _, _, values, window = example(size=(8, 9), window=(5, 5))
  inside = jnp.pad(values[:, :4, :4], ((0, 0), (2, 6), (2, 7), (0, 0), (0, 0)))
  moved = jnp.roll(inside, (3, 4), axis=(1, 2))

  @jax.jit
  def apply(values):
    return lambda_op.position_lambda(values, window, implementation=implementation)

  np.testing.assert_allclose(
    jnp.roll(apply(inside), (3, 4), axis=(1, 2))[:, 3:, 4:], apply(moved)[:, 3:, 4:], atol=1e-5
  )


def intermediate_shapes(function, *inputs):
  """Shapes of every value that a function computes, those of nested functions included."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval.shape for variable in equation.outvars)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from walk(inner)

  return list(walk(jax.make_jaxpr(function)(*inputs).jaxpr))


def test_no_value_has_batch_query_and_context_axes():
  batch, positions = 11, 5 * 7
  layer = functools.partial(lambda_op.lambda_layer, implementation="einsum")
  shapes = intermediate_shapes(layer, *example(batch=batch, v=3))
  sizes = [int(np.prod(shape)) for shape in shapes]
  assert positions**2 * 4 in sizes  # the embeddings of all pairs, k = 4, once for all images
  assert max(size for size in sizes if size % batch == 0) < batch * positions**2


def test_memory_of_position_embeddings_does_not_grow_with_the_batch():
  def temporaries(batch):
    inputs = example(batch=batch, size=(16, 16), heads=1, k=8, v=2, window=(31, 31))
    layer = jax.jit(lambda *x: lambda_layer(*x, implementation="einsum").output)
    return layer.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

  embeddings = 256**2 * 8 * 4
  one, many = temporaries(1), temporaries(17)
  assert one > embeddings
  assert many - one < 16 * 256**2 * 4 / 8  # far below one attention map of one head for each image


def test_chooses_by_cost():
  choose = lambda_op.choose_implementation
  assert choose((16, 16), (31, 31, 1, 16)) == "einsum"  # global
  assert choose((16, 16), (9, 9, 1, 16)) == "einsum"
  assert choose((56, 56), (23, 23, 1, 16)) == "einsum"
  assert choose((56, 56), (7, 7, 1, 16)) == "convolution"
  assert choose((85, 85), (169, 169, 1, 16)) == "einsum"  # where the paper draws the line
  assert choose((86, 86), (171, 171, 1, 16)) == "convolution"
  assert choose((56, 56), (111, 111, 8, 16)) == "convolution"


def test_bfloat16_keeps_lambdas_in_float32_and_close():
  inputs = example(window=(3, 3))
  exact = lambda_layer(*inputs)
  half = [x.astype(jnp.bfloat16) for x in inputs]
  for implementation in ("einsum", "convolution"):
    apply = functools.partial(lambda_op.lambda_layer, implementation=implementation)
    result = lambda_layer(*half, implementation=implementation)
    assert result.output.dtype == jnp.bfloat16
    assert result.content_lambda.dtype == result.position_lambda.dtype == jnp.float32
    error = np.abs(result.output.astype(jnp.float32) - exact.output).max()
    assert error < 0.03 * np.abs(exact.output).max()
    grads = jax.jit(jax.grad(lambda *x: jnp.sum(apply(*x).output), argnums=(0, 1, 2, 3)))  # noqa: B023
    for grad in grads(*half):
      assert np.isfinite(grad.astype(np.float32)).all()


def test_errors_are_one_clear_line():
  queries, keys, values, window = example()
  with pytest.raises(ValueError, match=r"sides \(4, 13\); both must be odd"):
    lambda_layer(queries, keys, values, window[:4])
  with pytest.raises(ValueError, match="use 'einsum' or 'auto'"):
    lambda_op.position_lambda(
      values, window, mask=jnp.ones((35, 35), bool), implementation="convolution"
    )
