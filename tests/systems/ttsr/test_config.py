"""TTSR's published test sets: images and references of each protocol, in the published layout."""

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax_zoo import trainer
from vit_jax_zoo.config import load
from vit_jax_zoo.run_metadata import RunData

FILES = {
  "cufed5": [f"test/CUFED5/000_{i}.png" for i in range(6)],
  "sun80": ["Sun_Hays_SR_groundtruth/a.jpg"]
  + [f"Sun_Hays_SR_scenematches/a.jpg/{i}.jpg" for i in range(1, 4)],
  "urban100": ["image_SRF_4/img_001_SRF_4_HR.png", "image_SRF_4/img_001_SRF_4_LR.png"],
  "manga109": ["ARMS.png"],
}


def write_images(root, test_set):
  """Writes tiny images, each 4 pixels taller than the previous one; returns them."""
  rng = np.random.default_rng(0)
  written = []
  for i, name in enumerate(FILES[test_set]):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (20 + 4 * i, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    with Image.open(path) as opened:
      written.append(np.asarray(opened.convert("RGB")))
  return written


def resized(pixels, height, width):
  return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("test_set", list(FILES))
def test_test_set_has_references_of_its_protocol(test_set, tmp_path):
  truth, *others = write_images(tmp_path, test_set)
  config = load(f"configs/ttsr.py:{test_set},source=pairs:{tmp_path},init_from=TTSR-rec.pt")
  config.data.loader.num_workers = 0
  experiment = trainer.build(config, jax.devices()[:1], run_data=RunData())
  batches = {name: next(iter(experiment.eval_batches(name))) for name in experiment.eval_sources}
  low_res = resized(truth, 5, 6)
  for batch in batches.values():
    np.testing.assert_array_equal(batch["image"][0], truth)
    np.testing.assert_array_equal(batch["low_res_image"][0], low_res)
  references = {name: batch["ref_image"][0] for name, batch in batches.items()}
  if test_set == "cufed5":
    assert set(references) == {"cufed5_level1", "cufed5_stitched"}
    np.testing.assert_array_equal(references["cufed5_level1"], others[0])
    assert references["cufed5_stitched"].shape == (2500, 500, 3)
    np.testing.assert_array_equal(references["cufed5_stitched"][2000:2040, :24], others[4])
  elif test_set == "sun80":
    assert set(references) == {"sun80_random"}
    assert any(np.array_equal(references["sun80_random"], other) for other in others)
  else:  # the low-resolution image, cropped to multiples of 4
    (reference,) = references.values()
    assert set(references) == {f"{test_set}_self"}
    np.testing.assert_array_equal(reference, low_res[:4, :4])
    blurred = resized(resized(reference, 1, 1), 4, 4)
    np.testing.assert_array_equal(batches[f"{test_set}_self"]["blurred_ref_image"][0], blurred)


def test_recipes_evaluate_cufed5_by_same_protocols():
  for variant in ("cufed", "cufed_rec"):
    assert load(f"configs/ttsr.py:{variant}").data.eval == load("configs/ttsr.py:cufed5").data.eval
