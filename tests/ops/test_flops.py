import jax
import jax.numpy as jnp
import pytest

from vit_jax_zoo.ops.flops import count_flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_batched_matrix_product():
  flops = count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(2, 3, 4), shape(2, 4, 5))
  assert flops == 2 * 2 * 3 * 4 * 5


def test_scan_times_length_gradient_twice_forward():
  def loss(x, weights):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

  arguments = shape(64, 16), shape(24, 16, 16)
  forward = 2 * 64 * 16 * 16 * 24
  assert count_flops(loss, *arguments) == forward
  assert count_flops(jax.jit(jax.grad(loss, argnums=(0, 1))), *arguments) == 3 * forward


def test_remat_recomputation_counted():
  def loss(x, w1, w2):
    return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w1) @ w2))(x))

  once = 2 * 8 * 8 * 8
  arguments = shape(8, 8), shape(8, 8), shape(8, 8)
  assert count_flops(loss, *arguments) == 2 * once
  # Forward, recomputed forward, and two products per product for the gradients (w1, w2 constant).
  assert count_flops(jax.grad(loss), *arguments) == 2 * once + 2 * once + 2 * once


@pytest.mark.multidevice
def test_shard_map_counts_all_devices():
  with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)):
    split = jax.shard_map(jnp.matmul, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    # Half of the rows on each device; the `model` axis repeats the computation.
    assert count_flops(split, shape(8, 4), shape(4, 16)) == 2 * (2 * 8 * 4 * 16)


def convolution(stride, padding, groups=1):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  return convolve


def test_patch_embedding():
  flops = count_flops(convolution(4, "VALID"), shape(2, 16, 16, 3), shape(4, 4, 3, 8))
  assert flops == 2 * (2 * 4 * 4) * (4 * 4 * 3) * 8


def test_convolution_padding_not_counted():
  # 3 taps at each of 5 positions, minus one at each end.
  flops = count_flops(convolution(1, "SAME"), shape(1, 5, 5, 1), shape(3, 3, 1, 1))
  assert flops == 2 * (3 * 5 - 2) ** 2


@pytest.mark.parametrize(
  ("stride", "padding"), [(1, "SAME"), (2, "SAME"), (2, "VALID"), (3, "SAME")]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_gradients(stride, padding, groups):
  convolve = convolution(stride, padding, groups)
  arguments = shape(2, 9, 9, 4), shape(3, 3, 4 // groups, 6)
  forward = count_flops(convolve, *arguments)
  assert forward > 0
  for argument in (0, 1):
    gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), argnums=argument)
    assert count_flops(gradient, *arguments) == 2 * forward


def test_conditional_counts_largest_branch():
  def choose(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

  assert count_flops(choose, shape(4, 4)) == 2 * 2 * 4**3


def test_loop_of_unknown_length_raises():
  def loop(x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

  with pytest.raises(ValueError, match="while loop"):
    count_flops(loop, shape(4, 4))
