"""`zoo.predictor`: kinds of images, batches, typed results."""

import dataclasses
import inspect
import json
import pydoc
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vit_jax_zoo as zoo
from tests.configs.recipes import CASES
from vit_jax_zoo.inference.base import Options, create_predictor
from vit_jax_zoo.inference.load import load


def photo(seed, height=20, width=30):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_image_kinds_give_one_result(vit_run, tmp_path):
  pixels = photo(0)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  predict = zoo.predictor(str(vit_run), top_k=2)
  result = predict(str(tmp_path / "a.png"))
  for image in (tmp_path / "a.png", pixels, Image.open(tmp_path / "a.png")):
    assert predict(image).to_dict() == result.to_dict()
  assert isinstance(result, zoo.Result)
  assert result.labels == [entry["name"] for entry in result.to_dict()["top"]]
  assert 1 >= result.scores[0] >= result.scores[1] >= 0
  assert f"{result.labels[0]} {100 * result.scores[0]:.1f} %" in repr(result)
  assert result.boxes is result.mask is result.masks is result.image is None
  assert json.loads(json.dumps(result.to_dict())) == result.record
  assert result._repr_png_().startswith(b"\x89PNG")
  assert result.draw().mode == "RGB"
  with pytest.raises(ValueError, match=r"draw: 'heads'; expected one of .''., '' is the main"):
    result.draw("heads")
  gray = predict(pixels[..., 0])
  assert gray.record == predict(np.stack([pixels[..., 0]] * 3, axis=-1)).record


def test_batches_equal_single_images(vit_run, monkeypatch):
  images = [photo(seed) for seed in range(5)]
  predict = zoo.predictor(str(vit_run), batch_size=4)
  single, sizes, logits = [predict(image) for image in images], [], predict._logits
  monkeypatch.setattr(
    predict, "_logits", lambda variables, x: sizes.append(len(x)) or logits(variables, x)
  )
  for found, expected in zip(predict(iter(images)), single, strict=True):
    assert found.labels == expected.labels
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
  assert len(predict(np.stack(images[:3]))) == 3
  assert sizes == [4, 1, 4]  # a batch of 3 is padded
  assert predict([]) == []


def test_what_cannot_be_predicted_raises(vit_run, tmp_path):
  predict = zoo.predictor(str(vit_run))
  for image, message in (
    (np.zeros((4, 4, 3), np.float32), r"image: float32 .*expected uint8"),
    (np.zeros((4, 4, 4), np.uint8), r"image: uint8 \(4, 4, 4\)"),
    (np.zeros((0, 4, 3), np.uint8), "image: "),
    (tmp_path / "none.png", r"none\.png cannot be read"),
    (tmp_path, r"cannot be read \(a folder; expected an image file"),
  ):
    with pytest.raises(ValueError, match=message):
      predict([photo(0), image])
  for wrong in (0, "2"):
    with pytest.raises(ValueError, match=f"batch_size: {wrong!r}"):
      inspect.unwrap(zoo.predictor)(str(vit_run), batch_size=wrong)
  with pytest.raises(ValueError, match=r"^model: None; expected a run"):
    inspect.unwrap(zoo.predictor)(None)  # without the tests' check of types
  with pytest.raises(ValueError, match=r"^model: ''; expected a run"):
    zoo.predictor("")
  with pytest.raises(ValueError, match="option 'topk'; did you mean 'top_k'"):
    zoo.predictor(str(vit_run), topk=3)


def test_names_of_pretrained_models():
  names = zoo.list_models(pretrained=True)
  assert {"vit_b16_imagenet21k", "detr_r101_coco_hub"} <= {*names}
  assert zoo.list_models("detr*", pretrained=True) == [n for n in names if n.startswith("detr")]


def test_names_of_shipped_configs():
  assert zoo.list_configs() == [f"{system}:{variant}" for system, variant in CASES]


@pytest.mark.filterwarnings("ignore")  # of attributes that pydoc reads
def test_package_shows_its_names_without_importing_jax():
  """Names for `dir`, `help` and tab completion."""
  code = "import sys, vit_jax_zoo as zoo; print(*dir(zoo)); assert 'jax' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)
  assert {*zoo.__all__} == {*done.stdout.decode().split()}
  text = pydoc.plain(pydoc.render_doc(zoo))
  assert [n for n in zoo.__all__ if n[:2] != "__" and n not in text] == []


@pytest.mark.parametrize(
  ("rows", "columns"), [((0, 100), (0, 150)), ((10, 90), (40, 120)), ((3, 43), (0, 150))]
)
def test_attention_is_drawn_over_the_part_seen_at_its_own_size(vit_run, rows, columns):
  trained = load(str(vit_run))

  def crop(image):
    return trained.prepare(image[slice(*rows), slice(*columns)])

  predictor = create_predictor(dataclasses.replace(trained, prepare=crop), Options(explain=True))
  y, x = np.indices((100, 150), np.uint8)
  photo = np.stack([y, x, x], axis=-1)  # a pixel tells where it is
  shown = np.asarray(predictor(photo).pictures["attention"].axes[0].images[0].get_array())
  corners = shown[0, 0, :2], shown[-1, -1, :2]
  np.testing.assert_allclose(
    corners, [(rows[0], columns[0]), (rows[1] - 1, columns[1] - 1)], atol=3
  )
