"""Detection on single images, with published files and with runs."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from etils import epath
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from pycocotools.coco import COCO

from tests.systems.detr.files import official_file
from vit_jax_zoo import config as config_lib
from vit_jax_zoo import predict, trainer
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms.detection import decode_segments
from vit_jax_zoo.inference.base import Options, create_predictor
from vit_jax_zoo.inference.load import load


def random_image(height=90, width=120, seed=0):
  return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def detr_run(tmp_path_factory):
  config = config_lib.load("configs/detr.py:demo,num_steps=2,batch_size=8")
  backbone = {**config.model.backbone.to_dict(), "widths": (4, 4, 4, 4), "stem_width": 4}
  config.model.update(width=16, mlp_dim=16, num_heads=2, backbone=backbone)
  config.data.eval.test.split = "test[:16]"
  config.update(eval_batch_size=8, eval_every=2, log_every=2)
  config.checkpoint.every = 2
  workdir = tmp_path_factory.mktemp("detr_run")
  trainer.run(config, epath.Path(workdir))
  return workdir


@pytest.mark.slow
def test_run_writes_detection_and_attention_figures(detr_run):
  names = {path.name for path in (detr_run / "figures").rglob("*.png")}
  for figure in ("train_batch", "test_predictions", "test_attention"):
    assert any(figure in name for name in names), names


@pytest.mark.slow
def test_run_predicts_image_of_any_size(detr_run):
  trained = load(str(detr_run))
  assert trained.task.class_names == tuple("0123456789")
  predictor = create_predictor(trained, Options(threshold=0.0, explain=True))
  prediction = predictor(random_image(100, 300))
  assert len(prediction.record["detections"]) == 12
  scores = [one["score"] for one in prediction.record["detections"]]
  assert scores == sorted(scores, reverse=True)
  for one in prediction.record["detections"]:
    left, top, width, height = one["bbox"]
    assert min(left, top, width, height) >= 0
    assert left + width <= 300 + 1e-3
    assert top + height <= 100 + 1e-3
    assert one["name"] == str(one["category_id"])
  assert max(one["bbox"][0] + one["bbox"][2] for one in prediction.record["detections"]) > 100
  assert set(prediction.pictures) == {"", "attention"}
  assert json.loads(json.dumps(prediction.record)) == prediction.record
  nothing = create_predictor(trained, Options(threshold=1.0))(random_image())
  assert nothing.record["detections"] == []
  assert set(nothing.pictures) == {""}


@pytest.mark.long
def test_images_of_many_sizes_share_programs():
  trained = load(official_file("detr_a"))
  trained = dataclasses.replace(trained, prepare=lambda image: {"image": image.astype(np.float32)})
  predict_batch, compiled = trained.task.padding_invariant().predict, []

  def count(variables, batch):
    compiled.append(batch["image"].shape)  # while tracing
    return predict_batch(variables, batch)

  predictor = create_predictor(trained, Options(threshold=0.0))
  predictor._predict_padded = jax.jit(count)
  unpadded = create_predictor(trained, Options(threshold=0.0))
  unpadded._padded_side = lambda side: side
  for height, width in ((97, 120), (100, 128), (128, 97)):
    image = random_image(height, width)
    padded = predictor(image).record["detections"]
    if (height, width) == (97, 120):
      alone = unpadded(image).record["detections"]
      for field in ("bbox", "score"):
        np.testing.assert_allclose(
          [one[field] for one in padded], [one[field] for one in alone], rtol=1e-4, atol=1e-3
        )
  assert compiled == [(1, 128, 128, 3)]


def test_published_panoptic_model_predicts_segments(tmp_path):
  trained = load(official_file("detr_panoptic_a"))
  assert trained.prepare(random_image(96, 128))["image"].shape == (800, 1066, 3)
  small = {"image": random_image(96, 128).astype(np.float32)}
  trained = dataclasses.replace(trained, prepare=lambda image: small)
  predictor = create_predictor(trained, Options(threshold=0.01))
  prediction = predictor(random_image(48, 64))
  info = prediction.record["segments_info"]
  assert info
  panoptic = prediction.pictures["panoptic"].astype(int)
  assert panoptic.shape == (48, 64, 3)
  ids = panoptic[..., 0] + 256 * panoptic[..., 1] + 65536 * panoptic[..., 2]
  assert sorted(entry["id"] for entry in info) == sorted(set(np.unique(ids)) - {0})
  for entry in info:
    rows, columns = np.nonzero(ids == entry["id"])
    assert entry["area"] == len(rows)
    left, top, width, height = entry["bbox"]
    assert (left, top) == (columns.min(), rows.min())
    assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
  assert prediction.pictures["segments"].shape == (48, 64, 3)
  for entry in prediction.record["detections"]:
    mask = run_lengths.decode(entry["segmentation"])
    assert mask.shape == (48, 64)
    assert entry["area"] == mask.sum()
  check_coco_files(predictor, tmp_path)


def check_coco_files(predictor, folder):
  """Compares the COCO files of two images, read by pycocotools and by our COCO source."""
  segments = folder / "annotations" / "panoptic_val"
  segments.mkdir(parents=True)
  paths = [folder / "val" / f"{name}.png" for name in ("a", "b")]
  paths[0].parent.mkdir()
  for seed, path in enumerate(paths):
    Image.fromarray(random_image(48, 64, seed)).save(path)
  assert predict.predict_all(predictor, paths, folder / "out") == 0
  records = json.loads((folder / "out" / "predictions.json").read_text())
  with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(str(folder / "out" / "coco.json"))
    again = truth.loadRes(truth.dataset["annotations"])
  for number, (path, record) in enumerate(zip(paths, records, strict=True), start=1):
    image = truth.imgs[number]
    assert (image["file_name"], image["height"], image["width"]) == (str(path), 48, 64)
    annotations = [again.anns[i] for i in again.getAnnIds(number)]
    assert [a["score"] for a in annotations] == [d["score"] for d in record["detections"]]
    assert [truth.cats[a["category_id"]]["name"] for a in annotations] == [
      d.get("name", str(d["category_id"])) for d in record["detections"]
    ]
  for path in (folder / "out").glob("*_panoptic.png"):
    path.rename(segments / path.name)
  (folder / "out" / "coco_panoptic.json").rename(folder / "annotations" / "panoptic_val.json")
  source = load_source(f"coco:{folder}", "val", panoptic=True)
  example = source[1]
  ids = decode_segments(example["segment_image"], example)
  areas = [int(np.sum(ids == i)) for i in range(len(example["labels"]))]
  assert areas == [segment["area"] for segment in records[1]["segments_info"]]


@pytest.mark.long
def test_detections_of_several_sizes_equal_single_images():
  trained = load(official_file("detr_a"))
  trained = dataclasses.replace(trained, prepare=lambda x: {"image": x.astype(np.float32)})
  predict = create_predictor(trained, Options(threshold=0.0))
  sizes = (64, 96), (90, 64), (60, 91), (64, 96)
  images = [random_image(*size, seed) for seed, size in enumerate(sizes)]
  single = [predict(image) for image in images]
  predict.batch_size = 4
  for image, found, expected in zip(images, predict(images), single, strict=True):
    assert found.labels == expected.labels
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    assert (found.boxes[:, 2:] <= [image.shape[1], image.shape[0]]).all()
    assert repr(found).startswith(f"Result({len(found.labels)} objects: {found.labels[0]} ")
