"""PSNR and SSIM of super-resolution: means, exclusions, padding, merging."""

import copy
import pickle

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from vit_jax_zoo.systems.ttsr.psnr_ssim import SCORES, SuperResolutionEvaluator, psnr_y, score


def batch(count=3, seed=0):
  rng = np.random.default_rng(seed)
  truths = rng.integers(0, 256, (count, 16, 20, 3), dtype=np.uint8)
  return {
    "image": truths,
    "upsampled_image": np.clip(truths + rng.normal(scale=30, size=truths.shape), 0, 255),
  }


def predictions(batch, scale=10):
  noise = np.random.default_rng(9).normal(scale=scale, size=batch["image"].shape)
  return {"image": np.clip(np.round(batch["image"] + noise), 0, 255).astype(np.uint8)}


def evaluated(*batches):
  evaluator = SuperResolutionEvaluator()
  for one in batches:
    evaluator.add(one, predictions(one))
  return evaluator


def test_scores_are_means_over_images():
  data = batch()
  result = evaluated(data).result()
  images = predictions(data)["image"]
  each = [psnr_y(a, b) for a, b in zip(images, data["image"], strict=True)]
  assert result["psnr"] == pytest.approx(np.mean(each))
  theirs = [
    peak_signal_noise_ratio(b, a, data_range=255)
    for a, b in zip(images, data["image"], strict=True)
  ]
  assert result["skimage_psnr"] == pytest.approx(np.mean(theirs))
  assert result["images"] == 3
  assert result["psnr_gain"] == pytest.approx(result["psnr"] - result["bicubic_psnr"])
  assert result["psnr_gain"] > 0
  assert {f"bicubic_{name}" for name in SCORES} | set(SCORES) < set(result)


def test_wrong_reference_score():
  data = batch()
  both = predictions(data) | {"wrong_reference_image": predictions(data, scale=20)["image"]}
  evaluator = SuperResolutionEvaluator()
  evaluator.add(data, both)
  result = evaluator.result()
  other = SuperResolutionEvaluator()
  other.add(data, {"image": both["wrong_reference_image"]})
  assert result["wrong_reference_psnr"] == pytest.approx(other.result()["psnr"])
  assert result["reference_gain"] == pytest.approx(result["psnr"] - other.result()["psnr"])
  assert result["reference_gain"] > 1
  assert "reference_gain" not in other.result()


def test_padding_not_counted():
  data = batch()
  expected = evaluated({key: value[:2] for key, value in data.items()}).result()
  padded = {key: np.pad(value, ((0, 0), (0, 5), (0, 3), (0, 0))) for key, value in data.items()}
  padded |= {"mask": np.array([True, True, False]), "size": np.full((3, 2), (16, 20))}
  evaluator = SuperResolutionEvaluator()
  images = np.pad(predictions(data)["image"], ((0, 0), (0, 5), (0, 3), (0, 0)))
  evaluator.add(padded, {"image": images})
  # The noise of `predictions` depends on the number of images: compares bicubic's scores.
  assert evaluator.result()["bicubic_ssim"] == pytest.approx(expected["bicubic_ssim"])
  assert evaluator.result()["images"] == 2


def test_merged_equals_single_evaluator():
  first, second = batch(2), batch(1, seed=4)
  together = evaluated(first, second).result()
  merged = evaluated(first)
  merged.merge(pickle.loads(pickle.dumps(evaluated(second))))
  assert merged.result() == pytest.approx(together)
  before = copy.deepcopy(merged.result())
  merged.merge(SuperResolutionEvaluator())
  assert merged.result() == before


def test_blank_image_excluded_from_psnr_only():
  data = batch()
  blank = {key: np.full_like(value[:1], 7) for key, value in data.items()}
  evaluator = SuperResolutionEvaluator()
  evaluator.add(data, predictions(data))
  expected = evaluator.result()
  outputs = predictions(blank)
  evaluator.add(blank, outputs)
  result = evaluator.result()
  assert all(np.isfinite(value) for value in result.values())
  assert (result["images"], result["bicubic_psnr_excluded"], result["psnr_gain_excluded"]) == (
    4,
    1,
    1,
  )
  assert "psnr_excluded" not in result  # the model's output is not exact there
  own = psnr_y(outputs["image"][0], blank["image"][0])
  assert result["psnr"] == pytest.approx((3 * expected["psnr"] + own) / 4)
  assert result["psnr_gain"] == pytest.approx(expected["psnr_gain"])
  assert result["bicubic_ssim"] == pytest.approx((3 * expected["bicubic_ssim"] + 1) / 4)


def test_only_blank_images():
  data = {key: np.full_like(value, 7) for key, value in batch(2).items()}
  evaluator = SuperResolutionEvaluator()
  evaluator.add(data, {"image": data["image"]})
  result = evaluator.result()
  assert result["psnr"] == result["bicubic_psnr"] == np.inf
  assert "psnr_gain" not in result
  assert (result["psnr_gain_excluded"], result["ssim"]) == (2, pytest.approx(1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_pixels_give_nan(value):
  data, outputs = batch(2), predictions(batch(2))
  outputs["image"] = np.asarray(outputs["image"], np.float32)
  outputs["image"][0, 3, 4, 1] = value
  evaluator = SuperResolutionEvaluator()
  evaluator.add(data, outputs)
  result = evaluator.result()
  assert all(np.isnan(result[name]) for name in (*SCORES, "psnr_gain"))
  assert np.isfinite(result["bicubic_psnr"])
  assert not [name for name in result if name.endswith("_excluded")]


def test_small_images_excluded_from_ssim_only():
  data = batch()
  small = {key: value[:1, :8, :9] for key, value in batch(seed=3).items()}
  tiny = {key: value[:1, :4, :4] for key, value in batch(seed=4).items()}
  result = evaluated(data, small, tiny).result()
  expected = evaluated(data).result()
  assert result["ssim"] == pytest.approx(expected["ssim"])
  assert (result["ssim_excluded"], result["skimage_ssim_excluded"]) == (2, 1)
  assert "psnr_excluded" not in result
  alone = evaluated(tiny).result()
  assert "ssim" not in alone
  assert np.isfinite(alone["psnr"])


def test_psnr_of_equal_images_infinite():
  image = batch(1)["image"][0]
  assert score(image, image)["psnr"] == score(image, image)["skimage_psnr"] == np.inf


def test_no_images_raise():
  with pytest.raises(ValueError, match="no image was evaluated"):
    SuperResolutionEvaluator().result()
