import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.figure import Figure

from vit_jax_zoo.inference.base import Options, Trained, create_predictor
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.fpt.predictor import SegmentationPredictor
from vit_jax_zoo.tasks import create_task


class Brightness(nn.Module):
  """Predicts class 1 where the image is bright, class 0 elsewhere."""

  @nn.compact
  def __call__(self, images, *, train=False):
    weight = self.param("weight", nn.initializers.ones, ())
    bright = weight * images.mean(-1, keepdims=True)
    return {"logits": jnp.concatenate([-bright, bright], axis=-1)}


def predictor(prepare):
  task = create_task(
    "semantic_segmentation", Brightness(), num_classes=2, class_names=("dark", "bright"),
    image_mean=0.5, image_std=0.1,
  )  # fmt: skip
  trained = Trained(
    "test", task, {"params": {"weight": np.float32(1)}}, prepare, None, "brightness"
  )
  found = create_predictor(trained, Options())
  assert isinstance(found, SegmentationPredictor)
  return found


def bright_image():
  image = np.zeros((8, 12, 3), np.uint8)
  image[:, 9:] = 255
  return image


def test_prediction_has_class_fractions_and_figures():
  prediction = predictor(lambda image: {"image": image})(bright_image())
  classes = prediction.record["classes"]
  assert [(entry["label"], entry["name"], entry["fraction"]) for entry in classes] == [
    (0, "dark", 0.75),
    (1, "bright", 0.25),
  ]
  assert all(entry["confidence"] > 0.99 for entry in classes)
  assert set(prediction.pictures) == {"", "labels", "ids"}
  ids = prediction.pictures["ids"]
  assert (ids.dtype, ids.tolist()) == (np.uint8, [[0] * 9 + [1] * 3] * 8)
  for overlay in (prediction.pictures[""], prediction.pictures["labels"]):
    assert overlay.shape == (8, 12, 3)
    assert overlay.dtype == np.uint8
  labels = prediction.pictures["labels"]
  assert len({tuple(pixel) for pixel in labels[:, :9].reshape(-1, 3)}) == 1
  assert (labels[0, 0] != labels[0, 10]).any()


def test_batch_of_two_sizes():
  predict, image = predictor(lambda image: {"image": image}), bright_image()
  predict.batch_size = 4
  pictures = [image, image[:, ::-1].copy(), image[:6]]
  for found, picture in zip(predict(pictures), pictures, strict=True):
    np.testing.assert_array_equal(found.mask, picture[..., 0] > 0)
    assert repr(found) == "Result(dark 75.0 %, bright 25.0 %)"
    np.testing.assert_array_equal(np.asarray(found.draw()), found.pictures[""])


def test_prediction_crops_padding():
  def halved(image):
    padded = np.full((6, 8, 3), 255, np.uint8)
    padded[:4, :6] = image[::2, ::2]
    return {"image": padded, "image_size": np.array([4, 6], np.int32)}

  prediction = predictor(halved)(bright_image())
  assert prediction.pictures[""].shape == (8, 12, 3)
  fractions = {entry["name"]: entry["fraction"] for entry in prediction.record["classes"]}
  assert abs(fractions["bright"] - 0.25) < 0.1


def test_explain_draws_pyramid_levels():
  backbone = {"blocks": (1, 1, 1, 1), "widths": (2, 2, 2, 2), "stem_width": 4}
  fields = {"num_classes": 2, "width": 8, "kernel_sizes": (1, 3), "window": 3, "backbone": backbone}
  explained = Options(explain=True)

  def trained(name):
    model = create_model(name, **fields)
    task = create_task("semantic_segmentation", model, num_classes=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 40, 3)))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return Trained("test", task, variables, lambda image: {"image": image}, None, name)

  prediction = create_predictor(trained("fpt_segmentation_r50"), explained)(
    np.zeros((32, 40, 3), np.uint8)
  )
  assert isinstance(prediction.pictures["levels"], Figure)
  titles = [ax.get_title() for ax in prediction.pictures["levels"].axes]
  assert titles == ["query: ring", "kernel 1: 4x5", "kernel 3: 4x5", ""]  # and a colour bar
  with pytest.raises(ValueError, match="--explain"):
    create_predictor(trained("fpt_segmentation_r50_ufp"), explained)
