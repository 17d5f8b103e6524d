"""Semantic segmentation: dataset layouts, label maps and transforms."""

import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from tests.data.images import encode, photo
from vit_jax_zoo.data.pipeline import eval_batches, train_batches
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.base import CorruptExampleError
from vit_jax_zoo.data.transforms import build_transforms

LOAD = dict(name="load_label_map")
PADDED = [LOAD, dict(name="pad_label_map", height=48, width=64)]


def labels(seed=0, height=40, width=60):
  rng = np.random.default_rng(seed)
  return np.kron(rng.integers(0, 4, (4, 6)), np.ones((10, 10))).astype(np.uint8)[:height, :width]


def write(root, image, label, seed=0):
  for name in (image, label):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
  (root / image).write_bytes(encode(photo(seed=seed), "PNG" if image.endswith("png") else "JPEG"))
  Image.fromarray(labels(seed)).save(root / label)


def plain(root):
  write(root, "images/train/a/1.jpg", "annotations/train/a/1.png")
  write(root, "images/train/2.jpg", "annotations/train/2.png", seed=1)
  write(root, "images/val/3.png", "annotations/val/3.png", seed=2)


def ade20k(root):
  write(root, "images/training/1.jpg", "annotations/training/1.png")
  write(root, "images/training/2.jpg", "annotations/training/2.png")
  write(root, "images/validation/3.jpg", "annotations/validation/3.png")


def cityscapes(root):
  for split, name in (("train", "aa/x_1"), ("train", "bb/y_1"), ("val", "cc/z_1")):
    write(
      root,
      f"leftImg8bit/{split}/{name}_leftImg8bit.png",
      f"gtFine/{split}/{name}_gtFine_labelTrainIds.png",
    )
    (root / f"gtFine/{split}/{name}_gtFine_color.png").write_bytes(b"another file")


def voc(root):
  for name in ("2007_1", "2007_2", "2008_3", "2008_4"):
    write(root, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")
  lists = root / "ImageSets" / "Segmentation"
  lists.mkdir(parents=True)
  (lists / "train.txt").write_text("2007_1\n2007_2\n")
  (lists / "val.txt").write_text("2008_3\n")


class TestLayouts:
  def test_decomposed_accents_found(self, tmp_path):
    write(tmp_path, "JPEGImages/e\u0301.jpg", "SegmentationClass/\u00e9.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, name in (("train", "e\u0301"), ("val", "\u00e9")):
      (lists / f"{split}.txt").write_text(f"{name}\n", encoding="utf-8")
      assert load_source(f"segmentation:{tmp_path}", split)[0]["label_map"]

  @pytest.mark.parametrize("layout", [plain, ade20k, cityscapes, voc])
  def test_layouts(self, tmp_path, layout):
    """Each layout has two training images and one validation image with their label maps."""
    layout(tmp_path)
    train = load_source(f"segments:{tmp_path}", "train")
    assert len(train) == 2
    for name in ("val", "validation"):
      assert len(load_source(f"segments:{tmp_path}", name)) == 1
    batch = next(iter(eval_batches(train, build_transforms(PADDED), batch_size=2)))
    assert batch["image"].shape == (2, 48, 64, 3)
    expected = [labels(1), labels(0)] if layout is plain else [labels(0), labels(0)]
    np.testing.assert_array_equal(batch["label_map"][:, :40, :60], expected)

  def test_split_list_not_utf8_raises(self, tmp_path):
    voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(FileNotFoundError, match=r"val\.txt"):
      load_source(f"segments:{tmp_path}", "val")

  def test_custom_patterns(self, tmp_path):
    write(tmp_path, "rgb/mine/a.jpg", "gt/mine_a.png")
    source = load_source(
      f"segments:{tmp_path}",
      "mine",
      images="rgb/{split}/{name}.*",
      labels="gt/{split}_{name}.png",
      class_names=("sky", "sea"),
    )
    assert source.info.num_classes == 2
    assert "rgb/mine/a.jpg with label map gt/mine_a.png" in source.example_name(0)
    assert source[0]["label_map"].startswith(b"\x89PNG")

  def test_missing_files_raise(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere"):
      load_source(f"segments:{tmp_path}/nowhere", "train")
    with pytest.raises(ValueError, match=str(tmp_path)):
      load_source(f"segments:{tmp_path}", "train")
    with pytest.raises(ValueError, match="give both patterns"):
      load_source(f"segments:{tmp_path}", "train", images="{split}/{name}.*")
    with pytest.raises(ValueError, match=r"'\{name\}\.png'.*\{split\}"):
      load_source(f"segments:{tmp_path}", "train", images="{split}/{name}.*", labels="{name}.png")
    plain(tmp_path)
    (tmp_path / "annotations/train/2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.jpg .*1 of 2"):
      load_source(f"segments:{tmp_path}", "train")


class TestTransforms:
  def run(self, specs, example, seed=0):
    rng = np.random.default_rng(seed)
    for transform in build_transforms(specs):
      example = transform(example, rng)
    return example

  def example(self, seed=0, values=None):
    values = labels(seed) if values is None else values
    return {"image": encode(photo(), "PNG"), "label_map": encode(values, "PNG"), "image_id": 3}

  def test_offset_and_ignore(self):
    """ADE20K numbers its classes from 1; 255 is always ignored."""
    values = labels()
    values[0, 0] = 255
    result = self.run([LOAD | dict(offset=-1, ignore=(0,))], self.example(values=values))
    expected = np.where((values == 0) | (values == 255), 255, values.astype(int) - 1)
    np.testing.assert_array_equal(result["label_map"], expected)
    assert result["original_size"].tolist() == [40, 60]
    with pytest.raises(ValueError, match=r"label -1 .*offset -1"):
      self.run([LOAD | dict(offset=-1)], self.example())

  def test_classes_maps_values(self):
    """Cityscapes' raw files: 34 values, of which some are classes, in another order."""
    values = np.array([[7, 0, 33, 255], [8, 34, 1, 7]], np.uint8)
    example = {"image": encode(photo(2, 4), "PNG"), "label_map": encode(values, "PNG")}
    result = self.run([LOAD | dict(classes=(8, 7, 33))], example)
    assert result["label_map"].tolist() == [[1, 255, 2, 255], [0, 255, 255, 1]]
    for fields in (dict(classes=(7,), offset=-1), dict(classes=(7, 8, 7)), dict(classes=(-1, 7))):
      with pytest.raises(ValueError, match=r"load_label_map:.* classes"):
        build_transforms([LOAD | fields])

  def test_palette_images_give_indices(self):
    """VOC's label PNGs have a palette."""
    palette_image = Image.fromarray(labels()).convert("P")
    palette_image.putdata(labels().ravel().tolist())
    result = self.run([LOAD], self.example() | {"label_map": encode(palette_image, "PNG")})
    np.testing.assert_array_equal(result["label_map"], labels())

  def test_augmentation_keeps_labels_aligned(self):
    """Padding is ignored."""
    values = labels()
    image = np.repeat(values[..., None] * np.uint8(60), 3, axis=2)
    example = {"image": encode(image, "PNG"), "label_map": encode(values, "PNG")}
    specs = [
      LOAD,
      dict(name="random_scale", smallest=0.5, largest=2.0),
      dict(name="random_window", height=48, width=48),
      dict(name="random_flip"),
      dict(name="pad_label_map", height=48, width=48),
    ]
    sizes = set()
    for seed in range(20):
      result = self.run(specs, example, seed)
      height, width = result["image_size"]
      sizes.add((int(height), int(width)))
      assert result["image"].shape == (48, 48, 3)
      assert (result["label_map"][height:] == 255).all()
      assert (result["label_map"][:, width:] == 255).all()
      inner = result["label_map"][:height, :width].astype(int)
      assert inner.max() <= 3
      near = np.abs(result["image"][:height, :width, 0].astype(int) - 60 * inner) < 30
      assert near.mean() > 0.85
    assert len(sizes) > 5

  def test_invalid_label_maps_raise(self):
    with pytest.raises(ValueError, match="label map is"):
      self.run([LOAD], self.example(values=labels(height=30)))
    with pytest.raises(ValueError, match="3 channels"):
      self.run([LOAD], self.example() | {"label_map": encode(photo(), "PNG")})
    with pytest.raises(ValueError, match=r"pad_label_map: .*20x20"):
      self.run([LOAD, dict(name="pad_label_map", height=20, width=20)], self.example())
    with pytest.raises(ValueError, match="random_scale: smallest"):
      build_transforms([dict(name="random_scale", smallest=2.0, largest=1.0)])


def test_label_out_of_range_raises(tmp_path):
  plain(tmp_path)
  source = load_source(f"segments:{tmp_path}", "train")
  with (
    pytest.raises(ValueError, match=r"png .*label 3, .*0\.\.2"),
    train_batches(source, build_transforms(PADDED), batch_size=2, seed=0, num_classes=3) as batches,
  ):
    next(batches)


def test_bucketed_evaluation_pads_with_ignore(tmp_path):
  plain(tmp_path)
  specs = [LOAD, dict(name="resize_shorter", shorter=30, longest=None), dict(name="pad_label_map")]
  source = load_source(f"segments:{tmp_path}", "train")
  batch = next(
    iter(eval_batches(source, build_transforms(specs), batch_size=2, buckets=((32, 64),)))
  )
  assert batch["image_size"].tolist() == [[30, 45], [30, 45]]
  assert (batch["label_map"][:, 30:] == 255).all()
  assert (batch["label_map"][:, :30, :45] < 4).all()


class Streets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Two images with the features of TFDS's `cityscapes/semantic_segmentation`."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image_id": tfds.features.Text(),
      "image_left": tfds.features.Image(shape=(40, 60, 3), encoding_format="png"),
      "segmentation_label": tfds.features.Image(shape=(40, 60, 1), encoding_format="png"),
      "mask": tfds.features.Image(shape=(40, 60, 1), encoding_format="png"),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(2):
      maps = {"image_left": photo(seed=i), "segmentation_label": labels(i), "mask": labels(i + 5)}
      yield i, {"image_id": str(i)} | {key: encode(x, "PNG") for key, x in maps.items()}


def test_tfds_label_maps(tmp_path):
  """Cityscapes in TFDS, and label maps under any feature name."""
  tfds.disable_progress_bar()
  Streets(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  for options, seed in (({}, 0), ({"label_key": "mask", "image_key": "image_left"}, 5)):
    source = load_source("tfds:streets", "train", data_dir=str(tmp_path), **options)
    assert len(source) == 2
    batch = next(iter(eval_batches(source, build_transforms(PADDED), batch_size=2)))
    found = {batch["label_map"][row, :40, :60].tobytes() for row in range(2)}
    assert found == {labels(seed).tobytes(), labels(seed + 1).tobytes()}
    assert batch["image"][:, :40, :60].any()
  with pytest.raises(ValueError, match="no feature 'picture'"):
    load_source("tfds:streets", "train", data_dir=str(tmp_path), image_key="picture")


def write_masks(root, values):
  for kind in ("images", "annotations"):
    (root / kind / "train").mkdir(parents=True)
  for i in range(3):
    (root / "images" / "train" / f"{i}.jpg").write_bytes(encode(photo(8, 12, seed=i)))
    labels = np.resize(np.array(values, np.uint8), (8, 12))
    Image.fromarray(labels).save(root / "annotations" / "train" / f"{i}.png")
  return load_source(f"segmentation:{root}", "train")


def batches_of(source, **fields):
  specs = [dict(name="load_label_map", **fields), dict(name="pad_label_map")]
  return eval_batches(source, build_transforms(specs), batch_size=3)


def test_binary_masks_0_255_require_classes(tmp_path):
  source = write_masks(tmp_path, [0, 255])
  with pytest.raises(ValueError, match=r"0 and 255.*classes=\(0, 255\)"):
    batches_of(source)
  batch = next(iter(batches_of(source, classes=(0, 255))))
  assert np.unique(batch["label_map"]).tolist() == [0, 1]


def test_mostly_ignored_label_map_warns(tmp_path, caplog):
  source = write_masks(tmp_path, [0, 0, 0, 1])
  batches_of(source)
  assert "ignored values" not in caplog.text
  batches_of(source, offset=-1, ignore=(0,))
  assert "ignored values in a sample of label maps: 0 in 75.0% of the pixels" in caplog.text


@pytest.mark.parametrize(
  ("values", "fields", "named", "level"),
  [
    ([0, 1, 1, 2], dict(offset=-1, ignore=(0,)), "0 in 25.0%", "INFO"),
    ([0, 0, 0, 0, 0, 7, 255, 255], {}, "255 in 25.0%", "WARNING"),
    ([0, 1, 1, 255], {}, "255 in 25.0%", "INFO"),
    ([0, 1], dict(offset=-1, ignore=(0,)), "0 in 50.0%", "WARNING"),
    ([0, 1, 2], dict(offset=-1, ignore=(0,)), "0 in 33", "WARNING"),
    ([0, *[1] * 9], dict(offset=-1, ignore=(0,)), "0 in 10", "WARNING"),  # one class is left
    ([0], {}, "only the value 0", "WARNING"),
  ],
)
def test_ignored_values_logged(tmp_path, caplog, values, fields, named, level):
  logging.set_verbosity(logging.INFO)
  with caplog.at_level("INFO", logger="absl"):
    batches_of(write_masks(tmp_path, values), **fields)
  assert [r.levelname for r in caplog.records if named in r.getMessage()] == [level]


@pytest.mark.parametrize(
  ("image", "options", "named"),
  [
    (Image.fromarray(labels(height=8, width=12)), dict(format="JPEG"), "JPEG"),
    (Image.fromarray(labels(height=8, width=12)), dict(format="JPEG2000"), "JPEG"),
    (
      Image.fromarray(labels(height=8, width=12)), dict(format="TIFF", compression="jpeg"), "JPEG",
    ),
    (Image.fromarray(np.full((8, 12), 1.7, np.float32)), dict(format="TIFF"), "fraction"),
    (Image.fromarray(np.full((8, 12), np.nan, np.float32)), dict(format="TIFF"), "fraction"),
  ],
)  # fmt: skip
def test_label_maps_not_of_integers_raise(tmp_path, image, options, named):
  source = write_masks(tmp_path, [0, 1])
  files = sorted((tmp_path / "annotations" / "train").iterdir())
  image.save(files[1], **options)
  with pytest.raises(CorruptExampleError, match=rf"1\.png: label map is .*{named}"):
    next(iter(batches_of(source)))
  for file in files:
    image.save(file, **options)
  with pytest.raises(ValueError, match=rf"0\.png: label map is .*{named}"):  # before training
    batches_of(load_source(f"segmentation:{tmp_path}", "train"))


@pytest.mark.parametrize(("one", "other"), [("train", "training"), ("test", "testing")])
def test_two_folders_of_one_split_raise(tmp_path, one, other):
  write_masks(tmp_path, [0, 1])
  for split in (one, other):
    write(tmp_path, f"images/{split}/a.jpg", f"annotations/{split}/a.png")
  with pytest.raises(ValueError, match=f"{other} and {one} are both"):
    load_source(f"segmentation:{tmp_path}", one)


def test_irregular_files_raise(tmp_path):
  """Opening a FIFO would block."""
  voc(tmp_path)
  lists = tmp_path / "ImageSets" / "Segmentation"
  (lists / "val.txt").unlink()
  os.mkfifo(lists / "val.txt")
  (lists / "train.txt").rename(lists / "test.txt")
  name = (lists / "test.txt").read_text().split()[0]
  (tmp_path / "SegmentationClass" / f"{name}.png").unlink()
  os.mkfifo(tmp_path / "SegmentationClass" / f"{name}.png")
  source = load_source(f"segmentation:{tmp_path}", "test")
  with pytest.raises(CorruptExampleError, match=rf"{name}\.png .*regular file"):
    source[0]
  (lists / "test.txt").unlink()
  with pytest.raises(ValueError, match="ImageSets"):
    load_source(f"segmentation:{tmp_path}", "test")


@pytest.mark.parametrize("split", ["train", ""])
def test_two_images_with_one_label_map_raise(tmp_path, split):
  write_masks(tmp_path, [0, 1])
  if not split:  # names in a list file, like Pascal VOC
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n1\n")
    (tmp_path / "images" / "train").rename(tmp_path / "JPEGImages")
    (tmp_path / "annotations" / "train").rename(tmp_path / "SegmentationClass")
  images = tmp_path / "images" / "train" if split else tmp_path / "JPEGImages"
  (images / "0.png").write_bytes((images / "1.jpg").read_bytes())
  with pytest.raises(ValueError, match=r"0\.jpg and .*0\.png"):
    load_source(f"segmentation:{tmp_path}", "train")
