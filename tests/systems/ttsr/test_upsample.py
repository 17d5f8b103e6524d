import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.ttsr.upsample import pixel_shuffle, upsample_bicubic


@pytest.mark.parametrize("factor", [2, 4])
def test_bicubic_golden(load_golden, factor):
  _, inputs, outputs = load_golden("ttsr_fn_a")
  x = jnp.asarray(np.moveaxis(inputs["bicubic_in"], 1, -1))
  found = np.moveaxis(upsample_bicubic(x, factor), -1, 1)
  np.testing.assert_allclose(found, outputs[f"torch_bicubic_x{factor}"], atol=1e-6)


def test_constants_stay():
  x = jnp.full((1, 2, 3, 1), 0.7, jnp.bfloat16)
  assert upsample_bicubic(x, 4).dtype == jnp.bfloat16
  np.testing.assert_allclose(upsample_bicubic(x, 4).astype(np.float32), 0.7, atol=5e-3)


def test_pixel_shuffle_reads_rows_then_columns():
  x = jnp.arange(8.0).reshape(1, 1, 1, 8)
  np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, :, :, 0], [[0, 1], [2, 3]])
  np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, :, :, 1], [[4, 5], [6, 7]])
