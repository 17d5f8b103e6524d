"""Filters of a first layer and their principal components, by hand."""

import numpy as np

from vit_jax_zoo.figures.attention import draw_filters, principal_filters


def test_components_are_principal_directions():
  # Filters of 1 x 2 pixels and one channel: points at (+-3, 0) and (0, +-1) around (5, 5).
  points = np.array([[3, 0], [-3, 0], [0, 1], [0, -1]], np.float32) + 5
  kernel = points.T.reshape(1, 2, 1, 4)
  components, fractions = principal_filters(kernel)
  np.testing.assert_allclose(components.reshape(2, 2), [[1, 0], [0, 1]], atol=1e-6)
  np.testing.assert_allclose(fractions, [18 / 20, 2 / 20], rtol=1e-6)


def test_components_equal_covariance_eigenvectors():
  kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 40)).astype(np.float32)
  components, fractions = principal_filters(kernel, count=5)
  values, vectors = np.linalg.eigh(np.cov(kernel.reshape(12, 40).astype(np.float64)))
  expected = vectors[:, ::-1].T[:5]
  alike = np.abs((components.reshape(5, 12) * expected).sum(axis=1))
  np.testing.assert_allclose(alike, 1, rtol=1e-4)
  np.testing.assert_allclose(fractions, values[::-1][:5] / values.sum(), rtol=1e-5)
  largest = np.abs(components.reshape(5, 12)).argmax(axis=1)
  assert (components.reshape(5, 12)[np.arange(5), largest] > 0).all()


def test_filters_drawn_around_gray():
  kernel = np.zeros((1, 1, 3, 2), np.float32)
  kernel[0, 0, :, 0], kernel[0, 0, :, 1] = [2, -2, 0], [0, 0, 1]
  figure = draw_filters(kernel)
  image = np.asarray(figure.axes[0].images[0].get_array())
  np.testing.assert_allclose(image[5, 5], [1, 0, 0.5])
  np.testing.assert_allclose(image[5, 30], [0.5, 0.5, 1])
  assert figure.texts[1].get_text() == "2 of 2, 1 × 1 pixels"
  wide = np.random.default_rng(0).normal(size=(4, 4, 64, 5)).astype(np.float32)
  draw_filters(wide, principal=True).canvas.draw()
