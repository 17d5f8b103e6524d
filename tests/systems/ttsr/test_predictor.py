"""Super-resolution of images of any size, and tiled prediction without seams."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax_zoo.inference.base import Options, Trained, create_predictor
from vit_jax_zoo.systems.ttsr.model import TTSR
from vit_jax_zoo.systems.ttsr.predictor import SuperResolutionPredictor, cut
from vit_jax_zoo.systems.ttsr.task import SuperResolution

MODEL = TTSR(width=4, depths=(1, 1, 1, 1), texture_widths=(4, 6, 8), scan_layers=False)


def smooth_image(height, width, seed):
  """Returns a smooth random image."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def trained():
  pictures = [np.zeros((1, s, s, 3), np.float32) for s in (4, 16, 16, 16)]
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *pictures)["params"]
  rng = np.random.default_rng(0)
  # Large weights, so that each output pixel depends on its whole receptive field.
  params = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 1.2 / np.prod(x.shape[:-1]) ** 0.5).astype(np.float32),
    shapes,
  )
  return Trained(
    source="here",
    task=SuperResolution(MODEL),
    variables={"params": {"generator": params, "discriminator": {}}},
    prepare=lambda image: {"image": image},
    image_size=None,
    model_name="ttsr_tiny",
  )


def expected(trained, image, reference):
  """Returns the task's prediction for the same images."""
  height, width = image.shape[:2]
  reference = reference[: len(reference) // 4 * 4, : reference.shape[1] // 4 * 4]

  def resized(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))

  rows, columns = reference.shape[:2]
  batch = {
    "low_res_image": image,
    "upsampled_image": resized(image, 4 * height, 4 * width),
    "ref_image": reference,
    "blurred_ref_image": resized(resized(reference, rows // 4, columns // 4), rows, columns),
    "image": np.zeros((4 * height, 4 * width, 3), np.uint8),
  }
  found = jax.jit(trained.task.predict)(trained.variables, {k: x[None] for k, x in batch.items()})
  return np.asarray(found["image"][0]).astype(int)


def test_predictor_accepts_any_size_and_aspect_ratio(trained):
  image, reference = smooth_image(1, 9, seed=0), smooth_image(30, 43, seed=1)
  predictor = create_predictor(trained, Options(reference=reference))
  prediction = predictor(image)
  result = prediction.pictures[""]
  assert np.abs(result - expected(trained, image, reference)).max() <= 1
  assert result.dtype == np.uint8
  assert prediction.record["size"] == list(result.shape[:2]) == [4, 36]
  assert prediction.record["reference_size"] == [28, 40]
  assert json.loads(json.dumps(prediction.record)) == prediction.record
  assert len(prediction.pictures["search"].axes) == 8  # and a colour bar


@pytest.mark.long
def test_tiled_prediction_equals_untiled(trained):
  image, reference = smooth_image(67, 91, seed=2), smooth_image(64, 80, seed=3)
  options = Options(reference=reference)
  whole = SuperResolutionPredictor(trained, options)(image)
  tile = Options(reference=reference, tile=2 * MODEL.reach + 4)
  tiled = SuperResolutionPredictor(trained, tile)(image)
  assert whole.record["windows"] == 1
  assert tiled.record["windows"] > 6
  assert tiled.record["reference_cells_used"] == whole.record["reference_cells_used"]
  a, b = (p.pictures[""].astype(int) for p in (whole, tiled))
  assert np.std(a) > 10
  assert np.abs(a - b).max() <= 1
  assert np.mean(a != b) < 1e-3


def test_reach_bounds_receptive_field(trained):
  """A changed row affects outputs at a distance, but none beyond `reach`."""
  size = 2 * MODEL.reach + 3
  image = smooth_image(size, 5, seed=4).astype(np.float32) / 127.5 - 1
  params = {"params": trained.variables["params"]["generator"]}
  textures = [np.zeros((1, s * size, s * 5, c), np.float32) for s, c in ((1, 8), (2, 6), (4, 4))]
  confidence = np.ones((1, size, 5), np.float32)
  confidence, textures = jax.tree.map(jnp.asarray, (confidence, textures))
  restore = jax.jit(lambda x: MODEL.apply(params, x, confidence, textures, method="restore"))
  other = image.copy()
  middle = size // 2
  other[middle] = -other[middle]
  changed = np.abs(np.asarray(restore(image[None]) - restore(other[None])))[0].max(axis=(1, 2)) > 0
  rows = np.flatnonzero(changed) // 4
  assert middle - MODEL.reach <= rows.min() <= middle - 10
  assert middle + 10 <= rows.max() <= middle + MODEL.reach


@pytest.mark.parametrize(("size", "window", "reach"), [((70, 33), 20, 4), ((9, 200), 21, 10)])
def test_tile_centers_cover_image_once(size, window, reach):
  covered, inside = np.zeros(size, int), np.ones(size, bool)
  shapes = set()
  for part in cut(size, window, reach):
    covered[part.core] += 1
    crop = inside[part.outer]
    shapes.add(crop.shape)
    for kept, whole, side in zip(part.core, part.outer, size, strict=True):
      assert kept.start - whole.start >= reach or whole.start == 0
      assert whole.stop - kept.stop >= reach or whole.stop == side
    assert crop[part.middle].shape == covered[part.core].shape
  assert (covered == 1).all()
  assert len(shapes) == 1  # one compiled program
  assert len(list(cut((10, 10), 10, 4))) == 1


def test_reference_option_is_checked(trained):
  with pytest.raises(ValueError, match="--threshold"):
    create_predictor(trained, Options(reference=smooth_image(8, 8, 0), threshold=0.25))


def test_invalid_reference_or_tile_raises(trained):
  with pytest.raises(ValueError, match="--reference: missing"):
    create_predictor(trained, Options())
  with pytest.raises(ValueError, match="the reference: 3x9 pixels"):
    create_predictor(trained, Options(reference=smooth_image(3, 9, 0)))
  with pytest.raises(ValueError, match=r"--tile: 40 .* 59"):
    create_predictor(trained, Options(reference=smooth_image(8, 8, 0), tile=40))


@pytest.mark.parametrize(
  ("size", "tile", "advice"),
  [((80, 200), None, "a smaller tile (slower), --tile=94, or a smaller reference"),
   ((80, 200), 80, "--tile=66"), ((80, 200), 60, "use a smaller reference"),
   ((5, 9), None, "use a smaller reference")],
)  # fmt: skip
def test_out_of_memory_error_suggests_tile(trained, monkeypatch, size, tile, advice):
  predictor = create_predictor(trained, Options(reference=smooth_image(12, 8, 0), tile=tile))

  class OutOfMemoryError(jax.errors.JaxRuntimeError):
    error_code_string = "RESOURCE_EXHAUSTED"  # only XLA can set it

  def raise_out_of_memory(*_):
    raise OutOfMemoryError

  monkeypatch.setattr(predictor, "_match", raise_out_of_memory)
  with pytest.raises(ValueError, match="out of memory") as error:
    predictor(smooth_image(*size, 1))
  assert f"{size[1]}x{size[0]} and 8x12 pixels" in str(error.value)
  assert advice in str(error.value)

  def raise_other_error(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")

  monkeypatch.setattr(predictor, "_match", raise_other_error)
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    predictor(smooth_image(*size, 1))
