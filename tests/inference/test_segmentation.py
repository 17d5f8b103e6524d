import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit_jax_zoo.inference import create_predictor
from vit_jax_zoo.inference.base import Options, Trained
from vit_jax_zoo.inference.segmentation import SegmentationPredictor
from vit_jax_zoo.tasks import create_task


class Brightness(nn.Module):
  """Class 1 where a picture is bright, class 0 elsewhere."""

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


def picture():
  image = np.zeros((8, 12, 3), np.uint8)
  image[:, 9:] = 255
  return image


def test_shares_names_and_pictures():
  found = predictor(lambda image: {"image": image})(picture())
  classes = found.record["classes"]
  assert [(entry["label"], entry["name"], entry["share"]) for entry in classes] == [
    (0, "dark", 0.75),
    (1, "bright", 0.25),
  ]
  assert all(entry["confidence"] > 0.99 for entry in classes)
  assert set(found.pictures) == {"", "labels"}
  for drawn in found.pictures.values():
    assert drawn.shape == (8, 12, 3)
    assert drawn.dtype == np.uint8
  labels = found.pictures["labels"]
  assert len({tuple(pixel) for pixel in labels[:, :9].reshape(-1, 3)}) == 1
  assert (labels[0, 0] != labels[0, 10]).any()


def test_padding_is_cut_off_and_the_picture_keeps_its_size():
  def halved(image):
    padded = np.full((6, 8, 3), 255, np.uint8)
    padded[:4, :6] = image[::2, ::2]
    return {"image": padded, "image_size": np.array([4, 6], np.int32)}

  found = predictor(halved)(picture())
  assert found.pictures[""].shape == (8, 12, 3)
  shares = {entry["name"]: entry["share"] for entry in found.record["classes"]}
  assert abs(shares["bright"] - 0.25) < 0.1
