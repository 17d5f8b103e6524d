"""`python -m vit_jax_zoo.predict` on user images, with runs and published files."""

import csv
import dataclasses
import json
import os
import shutil

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from tests.configs.recipes import CASES, resolve
from tests.conftest import golden_folder
from vit_jax_zoo import load_pretrained, predict
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.inference.base import (
  Options,
  Predictor,
  Result,
  create_predictor,
  list_options,
  read_image,
)
from vit_jax_zoo.inference.coco_json import box_annotation
from vit_jax_zoo.inference.load import _Run, load
from vit_jax_zoo.inference.video import annotate, open_video
from vit_jax_zoo.registry import registry_of
from vit_jax_zoo.run_metadata import RunData
from vit_jax_zoo.training.checkpoint import restore_variables


def photo(height=60, width=90, seed=0):
  small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
  return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def predictor_of(path, **options):
  return create_predictor(load(str(path)), Options(**options))


def logits_of(pretrained, images):
  return jax.jit(pretrained.model.apply)(pretrained.variables, images)["logits"]


class TwoImagePredictor(Predictor):
  """A predictor with two output images per input and one of the model."""

  reads = frozenset()

  def __init__(self, trained=None, options=None):
    pass

  def prepare(self, image):
    return {"image": image}

  def predict(self, images, batch):
    return [self.result(image) for image in images]

  def result(self, image):
    pictures = dict.fromkeys(("", "attention", "model_filters"), image)
    return Result({"mean": float(image.mean())}, lambda: pictures)


def images_in(folder, *names):
  for i, name in enumerate(names):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(seed=i)).save(folder / name)
  return [folder / name for name in names]


def records_of(output):
  return json.loads((output / "predictions.json").read_text())


def test_equal_or_prefixed_names_distinct_outputs(tmp_path):
  paths = images_in(tmp_path, "a.jpg", "a_attention.jpg", "x/a.png", "a.webp")
  assert predict.predict_all(TwoImagePredictor(), paths, tmp_path / "out") == 0
  named = [record["pictures"] for record in records_of(tmp_path / "out")]
  assert named[0] == ["a.png", "a_attention.png", "model_filters.png"]
  own = [name for names in named for name in names if not name.startswith("model")]
  assert len(own) == len(set(own)) == 8
  assert {path.name for path in (tmp_path / "out").glob("*.png")} == {*own, "model_filters.png"}


def test_long_names_truncated(tmp_path):
  paths = images_in(tmp_path, f"{'ä' * 124}.png")
  assert predict.predict_all(TwoImagePredictor(), paths, tmp_path / "out") == 0
  assert len(list((tmp_path / "out").glob("ä*.png"))) == 2


def test_input_images_not_overwritten(tmp_path):
  paths = images_in(tmp_path, "a.png", "b.jpg", "b_attention.png", "model_filters.png")
  before = {path: path.read_bytes() for path in paths}
  for _ in range(2):  # the second run overwrites the first one's output
    assert predict.predict_all(TwoImagePredictor(), paths[:2], tmp_path) == 0
    assert {path: path.read_bytes() for path in paths} == before
    assert len(list(tmp_path.glob("*.png"))) == 3 + 5


def test_foreign_files_not_replaced(tmp_path):
  paths, output = images_in(tmp_path, "a.png"), tmp_path / "out"
  for _ in range(2):
    predict.predict_all(TwoImagePredictor(), paths, output)
  (output / "coco.json").write_text("{}")
  with pytest.raises(ValueError, match=r"out/coco\.json"):
    predict.predict_all(TwoImagePredictor(), paths, output)
  assert (output / "coco.json").read_text() == "{}"
  for name in ("predictions.json", "predictions.jsonl"):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
      predict.predict_all(TwoImagePredictor(), paths, tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()


def test_line_and_table_rows_for_each_image(vit_run, tmp_path, capsys):
  paths = images_in(tmp_path, "a.png", "b.png")
  (tmp_path / "text.png").write_text("not an image")
  output, model = tmp_path / "out", predictor_of(vit_run, top_k=2)
  predict.predict_all(model, paths[:1], output, figures=False)  # its JSON is removed
  status = predict.predict_all(
    model, [*paths, tmp_path / "text.png"], output, form="csv", figures=False
  )
  assert status == 1
  assert {path.name for path in output.iterdir()} == {
    "predictions.csv", "predictions.jsonl", predict.MARK,
  }  # fmt: skip
  lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
  rows = list(csv.DictReader((output / "predictions.csv").read_text().splitlines()))
  printed = capsys.readouterr().out.splitlines()[1:]
  for i, (path, line, text) in enumerate(zip(paths, lines, printed, strict=False)):
    for row, one in zip(rows[2 * i : 2 * i + 2], line["top"], strict=True):
      assert (row["image"], row["label"], row["left"]) == (str(path), one["name"], "")
      assert float(row["score"]) == one["probability"]
    summary = [f"{one['name']} {100 * one['probability']:.1f} %" for one in line["top"]]
    assert text == f"{path}  {', '.join(summary)}"
  assert (len(rows), len(printed)) == (5, 2)
  assert "not an image" in rows[4]["error"] == lines[2]["error"]


def test_table_has_row_for_each_object(tmp_path):
  class Boxes(TwoImagePredictor):
    def result(self, image):
      boxes = [[1.0, 2.0, 30.0, 20.0], [0.0, 0.0, 5.0, 5.0]][: int(image[0, 0, 0])]
      found = [
        box_annotation({"category_id": 3, "name": "cat"}, box, score)
        for box, score in zip(boxes, (0.98, 0.5), strict=False)
      ]
      return Result.of_objects(found, record={}, draw_pictures=lambda: {"": image})

  for count, name in ((2, "a.png"), (0, "b.png")):
    Image.fromarray(np.full((8, 8, 3), count, np.uint8)).save(tmp_path / name)
  paths = [tmp_path / "a.png", tmp_path / "b.png"]
  assert predict.predict_all(Boxes(), paths, tmp_path, form="csv") == 0
  rows = [row.split(",") for row in (tmp_path / "predictions.csv").read_text().splitlines()[1:]]
  a, b = map(str, paths)
  assert rows[:2] == [
    [a, "", "cat", "0.98", "1.0", "2.0", "30.0", "20.0", ""],
    [a, "", "cat", "0.5", "0.0", "0.0", "5.0", "5.0", ""],
  ]
  assert rows[2] == [b, *[""] * 8]
  assert [repr(result) for result in Boxes()(paths)] == [
    "Result(2 objects: cat 0.98, cat 0.50)", "Result(0 objects)",
  ]  # fmt: skip


def test_video_gives_annotated_video_and_record_for_each_frame(tmp_path, monkeypatch):
  class Square(TwoImagePredictor):
    def result(self, image):
      rows, columns = np.nonzero(image[..., 0] > 128)
      sides = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      box = [float(side) for side in sides]
      box = box_annotation({"category_id": 0, "name": "square"}, box, 0.9)
      return Result.of_objects([box], record={"detections": [box]}, draw_pictures=dict)

  clip = tmp_path / "clip.mp4"
  writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 10, (160, 120))
  for i in range(6):
    frame = np.zeros((120, 160, 3), np.uint8)
    frame[40:80, 20 * i : 20 * i + 40] = 255
    writer.write(frame)
  writer.release()
  before = clip.read_bytes()
  monkeypatch.setattr(Square, "batch_size", 4)
  assert predict.predict_video(Square(), str(clip), tmp_path) == 0
  assert clip.read_bytes() == before
  records = records_of(tmp_path)
  assert [record["frame"] for record in records] == list(range(6))
  lefts = [record["detections"][0]["bbox"][0] for record in records]
  np.testing.assert_allclose(lefts, [20 * i for i in range(6)], atol=3)
  frames, rate, count = open_video(str(tmp_path / "clip_2.mp4"))
  assert (rate, count) == (10, 6)
  for i, frame in enumerate(frames):
    assert frame.shape == (120, 160, 3)
    assert frame[45:75, 20 * i + 10 : 20 * i + 30].min() > 180  # the square
    assert np.ptp(frame[60, max(20 * i - 3, 0) : 20 * i + 4].astype(int), axis=-1).max() > 60
  with pytest.raises(ValueError, match=r"--images=.*none\.mp4"):
    predict.predict_video(Square(), str(tmp_path / "none.mp4"), tmp_path / "out")


def test_video_frame_has_names_of_classes():
  def draw():
    raise AssertionError("a figure for each frame")

  frame = np.zeros((240, 320, 3), np.uint8)
  one, two = (
    annotate(frame, Result({}, draw, labels=("cat", "dog")[:n], scores=(0.9, 0.1)[:n]))
    for n in (1, 2)
  )
  assert one.shape == two.shape == frame.shape
  assert one[:14, :40].any()
  assert not one[18:].any()
  assert not one[:, 160:].any()
  assert two[18:30, :40].any()
  small = np.zeros((16, 16, 3), np.uint8)
  many = Result({}, draw, labels=("cat",) * 5, scores=(0.2,) * 5)
  assert annotate(small, many).shape == small.shape


def test_video_frame_without_names_is_picture():
  frame, picture = np.zeros((8, 8, 3), np.uint8), np.full((16, 16, 3), 7, np.uint8)
  for fields in ({"image": picture}, {"labels": ["sky"], "mask": np.zeros((8, 8), int)}):
    result = Result(
      {}, lambda: {"": picture}, scores=[1.0] * len(fields.get("labels", [])), **fields
    )
    np.testing.assert_array_equal(annotate(frame, result), picture)


@pytest.mark.parametrize("form", ["json", "csv"])
def test_records_written_at_once(form, tmp_path):
  results = [Result({"mean": 1.0}, dict, labels=["größer"], scores=[0.5]), ValueError("too dark")]
  with predict.Records(tmp_path, form) as records:
    for number, result in enumerate(results):
      records.add({"image": "a", "frame": number}, result)
      lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
      assert json.loads(lines[number])["frame"] == number
      if form == "csv":
        assert len((tmp_path / "predictions.csv").read_text("utf-8").splitlines()) == 2 + number
    assert records.finish() == 1
  if form == "json":
    assert records_of(tmp_path) == [*map(json.loads, lines)]
  else:
    assert not (tmp_path / "predictions.json").exists()
  expected = {f"predictions.{form}", "predictions.jsonl", predict.MARK}
  assert {path.name for path in tmp_path.iterdir()} == expected


def test_no_records(tmp_path):
  with predict.Records(tmp_path, "json") as records:
    assert records.finish() == 0
  assert records_of(tmp_path) == []


def test_non_utf8_names_escaped(tmp_path):
  paths = [*images_in(tmp_path, "b\udce9.png"), tmp_path / "lost\udce9.png"]
  assert predict.predict_all(TwoImagePredictor(), paths, tmp_path / "out") == 1
  first, second = records_of(tmp_path / "out")
  assert first["image"].endswith(r"b\udce9.png")
  assert first["pictures"][0] == r"b\udce9.png"
  assert r"lost\udce9.png" in second["error"]


def test_broken_file_reported_others_predicted(vit_run, tmp_path):
  images, output = tmp_path / "images", tmp_path / "out"
  (images / "more").mkdir(parents=True)
  Image.fromarray(photo()).save(images / "a.jpg")
  Image.fromarray(photo(seed=1)).save(images / "more" / "a.png")
  (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:400])
  (images / "text.png").write_text("not an image")
  (images / "notes.txt").write_text("of no interest")
  status = predict.predict_all(predictor_of(vit_run), predict.find_images([str(images)]), output)
  assert status == 1
  records = json.loads((output / "predictions.json").read_text())
  assert [record["image"].rsplit("/", 1)[1] for record in records] == [
    "a.jpg", "broken.jpg", "a.png", "text.png",
  ]  # fmt: skip
  assert ["error" in record for record in records] == [False, True, False, True]
  assert "text.png cannot be read: not an image" in records[3]["error"]
  assert sorted(path.name for path in output.glob("*.png")) == ["a.png", "a_2.png"]
  assert predict.predict_all(predictor_of(vit_run), [images / "a.jpg"], output) == 0


def test_irregular_files_raise(tmp_path):
  """Opening a FIFO given as --reference would block."""
  os.mkfifo(tmp_path / "a.jpg")
  for path, reason in ((tmp_path / "a.jpg", "not a regular file"), (tmp_path / "b.jpg", "No such")):
    with pytest.raises(ValueError, match=rf"{path} .*\({reason}"):
      read_image(path)


def test_run_prediction_equals_evaluation(vit_run):
  """EMA variables of the best checkpoint, the run's transforms, its class names."""
  trained = load(str(vit_run))
  assert trained.task.class_names == tuple("0123456789")
  source = load_source("demo:digits", "test[:20]")
  pixels = [trained.prepare(predict_pixels(source[i]["image"]))["image"] for i in range(4)]
  batch = {"image": np.stack(pixels)}
  expected = jax.jit(trained.task.predict)(restore_variables(vit_run), batch)
  predictor = create_predictor(trained, Options(top_k=3))
  for i in range(4):
    top = predictor(predict_pixels(source[i]["image"])).record["top"]
    assert [entry["label"] for entry in top] == list(expected["labels"][i])
    assert top[0]["name"] == str(top[0]["label"])
    np.testing.assert_allclose(
      [entry["probability"] for entry in top], expected["probabilities"][i], atol=1e-5
    )


def test_evaluation_transforms_of_single_image():
  """For all variants of all configs: transforms of targets are dropped."""
  task_names = set()
  for system, variant in CASES:
    name = f"{system}:{variant}"
    config = json.loads(json.dumps(resolve(system, variant).to_dict()))
    if not config["data"]["eval"] or "pair" in str(config["data"]["eval"]):
      continue  # image pairs are handled by the system's predictor
    transforms = _Run(name, config, RunData(), {}, None, None, None).transforms()
    rng = np.random.default_rng(0)
    example = {"image": photo()}
    for transform in transforms:
      example = transform(example, rng)
    assert example["image"].shape[2] == 3, name
    task_names.add(config["task"]["name"])
  assert {
    "classification",
    "detection",
    "instance_detection",
    "semantic_segmentation",
  } <= task_names


def predict_pixels(image):
  return cv2.cvtColor(
    cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
  )


def test_published_file_uses_own_preprocessing():
  path = str(golden_folder("vit_a") / "weights.npz")
  published, image = load_pretrained(path), photo()
  logits = logits_of(published, published.preprocess([image]))[0]
  top = predictor_of(path).__call__(image).record["top"]
  order = np.argsort(-np.asarray(logits))[:5]
  assert [entry["label"] for entry in top] == list(order)
  unnormalised = np.exp(logits - logits.max())
  np.testing.assert_allclose(
    top[0]["probability"], unnormalised.max() / unnormalised.sum(), rtol=1e-4
  )


def test_transformer_explanations(vit_run):
  for path, viewer in ((golden_folder("vit_a") / "weights.npz", "class token"), (vit_run, "mean")):
    prediction = predictor_of(path, explain=True)(photo())
    of_model = {"model_positions", "model_filters"}
    assert set(prediction.pictures) == {"", "attention", "heads", "distances"} | of_model
    titles = [text.get_text() for text in prediction.pictures["attention"].texts]
    assert titles[0] == "Attention"
    assert viewer in titles[1]


def test_run_writes_explanation_figures(vit_run):
  names = {path.name.removesuffix("_00000003.png") for path in (vit_run / "figures").iterdir()}
  assert names == {
    "train_batch", "test_predictions", "explain_attention", "explain_heads", "explain_distances",
    "explain_model_positions", "explain_model_filters",
  } - {"train_batch"} | {"train_batch_00000000.png"}  # fmt: skip


def test_model_figures_written_once(vit_run, tmp_path):
  for name in ("a", "b"):
    Image.fromarray(photo()).save(tmp_path / f"{name}.png")
  output = tmp_path / "out"
  paths = predict.find_images([str(tmp_path)])
  assert predict.predict_all(predictor_of(vit_run, explain=True), paths, output) == 0
  written = {path.name for path in output.glob("*.png")}
  each = {
    f"{name}{kind}.png" for name in "ab" for kind in ("", "_attention", "_heads", "_distances")
  }
  assert written == each | {"model_positions.png", "model_filters.png"}


def test_lambda_maps_drawn(tmp_path):
  source = golden_folder("lambda_resnet26t_a") / "weights.safetensors"
  trained = load(str(source), image_size=64)
  prediction = create_predictor(trained, Options(explain=True))(photo())
  axes = prediction.pictures["lambdas"].axes
  labels = [ax.get_xlabel().partition("\n")[0] for ax in axes]
  assert labels == ["", "c4 block1, 4 × 4", "c5 block0, 4 × 4", "c5 block1, 2 × 2", ""]
  assert set(prediction.pictures) == {"", "lambdas", "model_filters"}


def test_completion_of_half_image(igpt_run, tmp_path):
  predictor = predictor_of(igpt_run, samples=2, prefix_fraction=0.5)
  prediction = predictor(photo())
  assert prediction.record["given"] == 32
  assert 0 < prediction.record["nats"] < 3 * np.log(4)
  strip = prediction.pictures["samples"]
  cells = [strip[:, i * 120 : i * 120 + 96] for i in range(4)]
  given, first, second, original = cells
  np.testing.assert_array_equal(given[:48], original[:48])
  np.testing.assert_array_equal(first[:48], original[:48])
  assert (first[48:] != second[48:]).any()
  again = predictor_of(igpt_run, samples=2, prefix_fraction=0.5)(photo())
  np.testing.assert_array_equal(again.pictures["samples"], strip)


def test_top_k_one_deterministic(igpt_run):
  strip = predictor_of(igpt_run, samples=2, top_k=1)(photo()).pictures["samples"]
  np.testing.assert_array_equal(strip[:, 120:216], strip[:, 240:336])


def test_options_of_all_predictors():
  names = [option.name for option in list_options()]
  assert len(set(names)) == len(names)
  for predictor in registry_of("predictor", "predictors").values():
    assert predictor.reads <= {*names}
  assert Options(top_k=3).given == {"top_k"}
  with pytest.raises(ValueError, match="option 'topk'; did you mean 'top_k'"):
    Options(topk=3)


@pytest.mark.parametrize(("name", "value"), [("top_k", "2"), ("top_k", 2.5), ("explain", "yes")])
def test_option_of_another_type_raises(name, value):
  with pytest.raises(ValueError, match=f"--{name}: {value!r}; expected"):
    Options(**{name: value})
  assert Options(threshold=1, top_k=np.int64(2)).top_k == 2


def test_unsupported_options_raise(vit_run, igpt_run, tmp_path):
  with pytest.raises(ValueError, match=r"--samples: .*--explain"):
    predictor_of(vit_run, samples=3)
  with pytest.raises(ValueError, match="--top_k: 0"):
    predictor_of(vit_run, top_k=0)
  with pytest.raises(ValueError, match="--prefix_fraction"):
    predictor_of(igpt_run, prefix_fraction=2.0)
  with pytest.raises(ValueError, match="has no classifier"):
    create_predictor(load(str(golden_folder("vit_hf_base_a"))), Options())
  with pytest.raises(FileNotFoundError, match=r"--images=.*none\*\.jpg"):
    predict.find_images([str(tmp_path / "none*.jpg")])
  with pytest.raises(ValueError, match="--images: missing"):
    predict.find_images([])
  names = tmp_path / "names.txt"
  names.write_text("a\nb\n")
  with pytest.raises(ValueError, match="class_names: 2 names"):
    load(str(vit_run), class_names=str(names))


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"prefix_fraction": 1.5}, r"1\.5.*--prefix_fraction"),
    ({"prefix_fraction": -0.1}, "--prefix_fraction"),
    ({"samples": 0}, "--samples"),
    ({"temperature": -1.0}, "--temperature"),
    ({"top_k": 0}, "--top_k: 0"),
    ({"palette": None}, "no palette"),
    ({"causal": False}, "causal=False"),
  ],
)
def test_invalid_completion_options_raise(igpt_run, wrong, message):
  trained = load(str(igpt_run))
  if "palette" in wrong:
    kept = {name: tree for name, tree in trained.variables.items() if name != "palette"}
    trained = dataclasses.replace(trained, variables=kept)
  if "causal" in wrong:
    task = dataclasses.replace(trained.task, model=trained.model.clone(causal=False))
    trained = dataclasses.replace(trained, task=task)
  options = {name: value for name, value in wrong.items() if name not in ("palette", "causal")}
  with pytest.raises(ValueError, match=message) as error:
    create_predictor(trained, Options(**options))
  assert "\n" not in str(error.value)


def test_run_without_data_json_loads(vit_run, tmp_path):
  shutil.copytree(vit_run, tmp_path / "run")
  (tmp_path / "run" / "data.json").unlink()
  trained = load(str(tmp_path / "run"))
  assert trained.task.num_classes == 10
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    load(str(tmp_path / "run"))


@pytest.mark.parametrize(
  ("task", "transforms", "expected"),
  [
    ("semantic_segmentation", (), (64, 96)),
    ("semantic_segmentation", ("load_label_map", "pad_label_map"), (40, 60)),
    ("instance_detection", (), (64, 96)),
    ("detection", (), (64, 80)),
  ],
)
def test_aspect_ratio_kept_if_model_allows(task, transforms, expected):
  split = {"transforms": [{"name": name} for name in transforms]}
  config = {"task": {"name": task}, "data": {"eval": {"test": split}}, "checkpoint": {}}
  run = _Run("run", config, RunData(2, (), {"image": (64, 80, 3)}), {}, None, (64, 80), None)
  example = run.prepare()(photo(40, 60))
  assert example["image"].shape == (*expected, 3)


SMALL = {"name": "resize_small", "size": 11}


@pytest.mark.parametrize(
  ("task", "specs", "size"),
  [
    ("classification", [], (8, 12)),
    ("classification", [{"name": "resize", "size": [8, 12]}], (8, 12)),
    (
      "classification",
      [{"name": "resize", "size": 8, "method": "area", "dtype": "float32"}],
      (8, 8),
    ),
    ("classification", [SMALL, {"name": "central_crop", "size": 8}], (8, 8)),
    ("classification", [SMALL, {"name": "central_crop", "size": [8, 10]}], (8, 10)),
    ("classification", [SMALL | {"name": "resize"}, {"name": "central_crop", "size": 8}], (8, 8)),
    ("detection", [], (16, 24)),
    ("detection", [{"name": "resize_shorter", "shorter": 16, "longest": 24}], (16, 24)),
  ],
)
def test_run_preprocess_equals_evaluation(task, specs, size):
  split = {"transforms": specs}
  config = {"task": {"name": task}, "data": {"eval": {"test": split}}, "checkpoint": {}}
  run = _Run("run", config, RunData(2, (), {}), {}, None, size, None)
  prepare, preprocess, rng = run.prepare(), run.preprocess(), np.random.default_rng(0)
  for height, width in rng.integers(5, 70, (20, 2)).tolist():
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(preprocess.resize(image), prepare(image)["image"])


def test_run_preprocess_resize_after_crop():
  specs = [SMALL, {"name": "central_crop", "size": 11}, {"name": "resize", "size": 4}]  # iGPT's
  split = {"transforms": specs}
  config = {"task": {"name": "classification"}, "data": {"eval": {"test": split}}}
  run = _Run("run", config | {"checkpoint": {}}, RunData(2), {}, None, (4, 4), None)
  preprocess = run.preprocess()
  assert (preprocess.resized_size(20, 30), preprocess.image_size) == ((4, 6), (4, 4))


def test_load_pretrained_run_new_size_or_classes(vit_run, igpt_run):
  run = load_pretrained(str(vit_run))
  small = {key: run.variables["params"][key] for key in ("encoder", "embedding")}
  for options in ({"num_classes": 3}, {"image_size": (8, 16)}):
    loaded = load_pretrained(str(vit_run), **options)
    pictures = [photo(20, 30), photo(9, 9, seed=1)]
    logits = logits_of(loaded, loaded.preprocess(pictures))
    assert logits.shape == (2, options.get("num_classes", 10))
    assert loaded.preprocess.image_size == loaded.config["image_size"]
    assert loaded.class_names == (() if "num_classes" in options else run.class_names)
    assert np.any(logits[0] != logits[1]) == ("num_classes" not in options)  # a new head is zero
    same = {key: loaded.variables["params"][key] for key in small}
    jax.tree.map(np.testing.assert_array_equal, same, small)
  with pytest.raises(ValueError, match="image_size and num_classes"):
    load_pretrained(str(igpt_run), image_size=16)


def test_run_at_other_image_size(vit_run, igpt_run):
  trained, same = load(str(vit_run), image_size=16), load_pretrained(str(vit_run), image_size=16)
  jax.tree.map(np.testing.assert_array_equal, trained.variables["params"], same.variables["params"])
  image = trained.prepare(photo(20, 30))["image"]
  assert image.shape == (16, 16, 3)
  assert trained.image_size == (16, 16)
  batch = {"image": image[None]}
  assert jax.eval_shape(trained.task.predict, trained.variables, batch)["labels"].shape == (1, 3)
  with pytest.raises(ValueError, match="image_size and num_classes"):
    load(str(igpt_run), image_size=16)


@pytest.mark.parametrize(
  "specs",
  [
    [{"name": "resize", "size": 8}],
    [{"name": "resize_small", "size": 10}, {"name": "central_crop", "size": 8}],
  ],
)
def test_image_size_keeps_crop_ratio(vit_run, tmp_path, specs):
  shutil.copytree(vit_run, tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["data"]["eval"]["test"]["transforms"] = specs
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  doubled = build_transforms(spec | {"size": 2 * spec["size"]} for spec in specs)
  expected, rng = {"image": photo(40, 60)}, np.random.default_rng(0)
  for transform in doubled:
    expected = transform(expected, rng)
  found = load(str(tmp_path / "run"), image_size=16).prepare(photo(40, 60))
  np.testing.assert_array_equal(found["image"], expected["image"])


def test_checkpoint_of_another_model_raises(vit_run, tmp_path):
  shutil.copytree(vit_run, tmp_path / "run")
  file = tmp_path / "run" / "config.json"
  config = json.loads(file.read_text())
  config["model"]["mlp_dim"] *= 2
  file.write_text(json.dumps(config))
  for read in (load, load_pretrained):
    with pytest.raises(ValueError, match=r"run: does not fit .* config\.json \(.*shape"):
      read(str(tmp_path / "run"))


def test_load_pretrained_run(vit_run, igpt_run):
  loaded = load_pretrained(str(vit_run))
  assert loaded.class_names == tuple("0123456789")
  assert loaded.config["image_size"] == (8, 8)
  logits = logits_of(loaded, np.zeros((1, 8, 8, 3), np.float32))
  unrolled = load_pretrained(str(vit_run), scan_layers=False)
  assert "block_1" in unrolled.variables["params"]["encoder"]
  same = logits_of(unrolled, np.zeros((1, 8, 8, 3), np.float32))
  np.testing.assert_allclose(same, logits, atol=1e-6)
  assert "palette" in load_pretrained(str(igpt_run)).variables
