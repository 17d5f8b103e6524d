import numpy as np
import pytest
from matplotlib import pyplot

from vit_jax_zoo.systems.ttsr.figures import (
  BATCH_COLUMNS,
  COLUMNS,
  draw_batch,
  draw_results,
  position_colors,
)
from vit_jax_zoo.systems.ttsr.psnr_ssim import psnr_y


def example(count=2):
  rng = np.random.default_rng(0)

  def random_images(height, width):
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)

  batch = {
    "low_res_image": random_images(5, 6),
    "upsampled_image": random_images(20, 24),
    "image": random_images(20, 24),
    "ref_image": random_images(16, 32),
    "blurred_ref_image": random_images(16, 32),
  }
  predictions = {
    "image": random_images(20, 24),
    "wrong_reference_image": random_images(20, 24),
    "hard_attention": rng.integers(0, 32, (count, 5, 6)),
    "soft_attention": rng.uniform(size=(count, 5, 6)),
  }
  return batch, predictions


def test_results_figure_has_one_row_per_example():
  batch, predictions = example()
  figure = draw_results(batch, predictions)
  assert len(figure.axes) == 2 * len(COLUMNS) + 1  # and a colour bar
  assert [ax.get_title() for ax in figure.axes[: len(COLUMNS)]] == list(COLUMNS)
  row = dict(zip(COLUMNS, figure.axes, strict=False))
  low_res, ours, reference, truth = (row[name] for name in ("input", "TTSR", "reference", "truth"))
  wrong, positions, matched, similarity = (row[name] for name in COLUMNS[5:])
  np.testing.assert_array_equal(low_res.images[0].get_array(), batch["low_res_image"][0])
  np.testing.assert_array_equal(ours.images[0].get_array(), predictions["image"][0])
  np.testing.assert_array_equal(truth.images[0].get_array(), batch["image"][0])
  np.testing.assert_array_equal(
    wrong.images[0].get_array(), predictions["wrong_reference_image"][0]
  )
  for ax, name in ((ours, "image"), (wrong, "wrong_reference_image")):
    assert ax.get_xlabel() == f"{psnr_y(predictions[name][0], batch['image'][0]):.2f} dB"
  np.testing.assert_array_equal(reference.images[0].get_array(), batch["ref_image"][0])
  assert positions.images[0].get_array().shape == (16, 32, 3)
  assert ours.get_xlim() == reference.get_xlim() == (-0.5, 31.5)  # one scale
  assert ours.get_ylim() == reference.get_ylim() == (19.5, -0.5)
  expected = position_colors(predictions["hard_attention"][0], (4, 8))
  np.testing.assert_array_equal(matched.images[0].get_array(), expected)
  np.testing.assert_array_equal(similarity.images[0].get_array(), predictions["soft_attention"][0])
  assert similarity.images[0].get_clim() == (0, 1)
  assert pyplot.get_fignums() == []


def test_best_decibels_are_bold():
  batch, predictions = example(1)
  predictions["image"] = batch["upsampled_image"] // 2  # worse than bicubic on most
  predictions["wrong_reference_image"] = batch["image"].copy()
  predictions["wrong_reference_image"][0, 0, 0] = 0
  row = dict(zip(COLUMNS, draw_results(batch, predictions).axes, strict=False))
  weights = {name: row[name].xaxis.label.get_fontweight() for name in COLUMNS}
  assert [name for name, weight in weights.items() if weight == "bold"] == ["wrong reference"]


def test_results_figure_omits_missing_columns():
  batch, predictions = example(1)
  del batch["image"], predictions["wrong_reference_image"]
  titles = [ax.get_title() for ax in draw_results(batch, predictions).axes][:-1]
  assert titles == [name for name in COLUMNS if name not in ("truth", "wrong reference")]


def test_batch_figure_shows_all_images():
  batch, _ = example(5)
  figure = draw_batch(batch)
  assert len(figure.axes) == 4 * len(BATCH_COLUMNS)
  for ax, (title, key) in zip(figure.axes, BATCH_COLUMNS.items(), strict=False):
    assert ax.get_title() == title
    np.testing.assert_array_equal(ax.images[0].get_array(), batch[key][0])
  assert figure.axes[0].get_xlabel() == "6 × 5"


def test_results_figure_crops_padding():
  batch, predictions = example()
  figure = draw_results({**batch, "size": np.full((2, 2), (12, 16))}, predictions)
  assert figure.axes[4].images[0].get_array().shape == (12, 16, 3)
  assert figure.axes[0].images[0].get_array().shape == (3, 4, 3)


def test_position_colors_are_distinct():
  colors = position_colors(np.arange(12).reshape(3, 4), (3, 4))
  assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 12


def test_figures_without_image_raise():
  batch, predictions = example()
  with pytest.raises(ValueError, match="no image"):
    draw_results({key: value[:0] for key, value in batch.items()}, predictions)
  with pytest.raises(ValueError, match="no image"):
    draw_batch({key: value[:0] for key, value in batch.items()})
