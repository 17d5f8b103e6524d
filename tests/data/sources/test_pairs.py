"""Images with references: layouts, pairing by name, reference selection."""

import io
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms


def write(path, value=0, size=(8, 8)):
  """Writes a uniform image, identified by its level."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.full((*size, 3), value, np.uint8)
  Image.fromarray(pixels).save(path, "png")
  return path


def level(data):
  return int(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0])


def levels(source):
  return [(level(e["image"]), e["reference"] and level(e["reference"])) for e in source]


def cufed(root):
  for i in range(3):
    write(root / f"train/input/{i}.png", 10 + i)
    write(root / f"train/ref/{i}.png", 20 + i)
  for i in range(2):
    for j in range(6):
      write(root / f"test/CUFED5/00{i}_{j}.png", 100 + 10 * i + j)
  return f"pairs:{root}"


def test_cufed_references(tmp_path):
  name = cufed(tmp_path)
  assert levels(load_source(name, "train")) == [(10, 20), (11, 21), (12, 22)]
  assert levels(load_source(name, "test")) == [(100, 101), (110, 111)]
  assert levels(load_source(name, "test", reference="4")) == [(100, 104), (110, 114)]
  assert levels(load_source(name, "test", reference=2)) == [(100, 102), (110, 112)]
  example = load_source(name, "test", reference="all")[1]
  assert [level(data) for data in example["reference"]] == [111, 112, 113, 114, 115]


def test_cufed5_missing_reference_raises(tmp_path):
  cufed(tmp_path)
  folder = tmp_path / "test/CUFED5"
  assert len(load_source(f"pairs:{folder}", "test")) == 2
  (folder / "001_3.png").unlink()
  with pytest.raises(FileNotFoundError, match=r"001_0\.png: .*001_3\.png"):
    load_source(f"pairs:{folder}", "test")


def test_sun80_random_reference(tmp_path):
  for i in range(3):
    write(tmp_path / f"Sun_Hays_SR_groundtruth/{i}.jpg", i)
    for j in range(20):
      write(tmp_path / f"Sun_Hays_SR_scenematches/{i}.jpg/{j}.jpg", 20 * i + j + 20)
  name = f"pairs:{tmp_path}"
  chosen = levels(load_source(name, "test", reference="random"))
  assert chosen == levels(load_source(name, "test", reference="random"))
  assert [(r - 20) // 20 for _, r in chosen] == [0, 1, 2]
  assert len({(r - 20) % 20 for _, r in chosen}) > 1
  assert levels(load_source(name, "test", reference="3")) == [
    (0, 22),
    (1, 42),
    (2, 62),
  ]  # by number


def test_urban100_manga109_self_reference(tmp_path):
  for i in (1, 2):
    write(tmp_path / f"urban/image_SRF_4/img_00{i}_SRF_4_HR.png", i)
    write(tmp_path / f"urban/image_SRF_4/img_00{i}_SRF_4_LR.png", 99)
  for title in ("ARMS", "Belmondo"):
    write(tmp_path / f"manga/{title}.png")
  urban = load_source(f"pairs:{tmp_path / 'urban'}", "test", reference="self")
  assert levels(urban) == [(1, None), (2, None)]
  assert len(load_source(f"pairs:{tmp_path / 'manga'}", "test", reference="self")) == 2
  with pytest.raises(FileNotFoundError, match="no reference of its name"):
    load_source(f"pairs:{tmp_path / 'manga'}", "test")


def custom_pairs(root):
  for i in range(40):
    write(root / f"input/{i}.png", i)
    write(root / f"ref/{i}.jpg", 100 + i)
  return f"pairs:{root}"


def test_hash_split_by_name(tmp_path):
  name = custom_pairs(tmp_path)
  parts = [dict(levels(load_source(name, split))) for split in ("train", "test", "all")]
  assert parts[0] | parts[1] == parts[2] == {i: 100 + i for i in range(40)}
  assert not set(parts[0]) & set(parts[1])
  assert 0 < len(parts[1]) < 12
  for path in tmp_path.glob("input/1*.png"):
    path.unlink()
  assert set(dict(levels(load_source(name, "test")))) <= set(parts[1])


def test_multiple_references(tmp_path):
  for j in (1, 2, 10):
    write(tmp_path / f"train/ref/a/{j}.png", j)
  write(tmp_path / "train/input/a.jpg")
  write(tmp_path / "val/input/b.jpg")
  name = f"pairs:{tmp_path}"
  example = load_source(name, "train", reference="all")[0]
  assert [level(data) for data in example["reference"]] == [1, 2, 10]
  with pytest.raises(FileNotFoundError, match=r"a\.jpg: no reference number 4"):
    load_source(name, "train", reference="4")
  with pytest.raises(FileNotFoundError, match=r"b\.jpg: no reference"):
    load_source(name, "validation")


def test_equal_stems_paired_by_full_name(tmp_path):
  for i, suffix in enumerate(("jpg", "png", "webp")):
    write(tmp_path / f"train/input/a.{suffix}", i)
    write(tmp_path / f"train/ref/a.{suffix}", 100 + i)
  name = f"pairs:{tmp_path}"
  assert sorted(levels(load_source(name, "train"))) == [(0, 100), (1, 101), (2, 102)]
  (tmp_path / "train/ref/a.png").unlink()  # the others are not a.png's
  with pytest.raises(FileNotFoundError, match=r"input/a\.png: no reference"):
    load_source(name, "train")


@pytest.mark.parametrize("reference", ["a.bmp", "a/1.png"])
def test_one_reference_of_two_images_raises(reference, tmp_path):
  for path in ("input/a.jpg", "input/a.png", f"ref/{reference}"):
    write(tmp_path / "train" / path)
  with pytest.raises(ValueError, match=r"input/a\.jpg, .*input/a\.png: one reference.*ref/a"):
    load_source(f"pairs:{tmp_path}", "train")


@pytest.mark.parametrize("names", ["ab", "cd", "wxyz"])
def test_hash_split_has_both_parts(names, tmp_path):
  for i, name in enumerate(names):
    write(tmp_path / f"input/{name}.png", i)
    write(tmp_path / f"ref/{name}.png", 100 + i)
  train, test = (levels(load_source(f"pairs:{tmp_path}", split)) for split in ("train", "test"))
  assert sorted(train + test) == [(i, 100 + i) for i in range(len(names))]


def test_two_references_of_one_stem_raise(tmp_path):
  write(tmp_path / "train/input/a.jpg")
  write(tmp_path / "train/ref/a.png", 1)
  write(tmp_path / "train/ref/a.webp", 2)
  with pytest.raises(ValueError, match=r"input/a\.jpg: .*a\.png.*a\.webp"):
    load_source(f"pairs:{tmp_path}", "train")


def test_reference_without_image_logged(tmp_path, caplog):
  write(tmp_path / "train/input/a.png", 1)
  write(tmp_path / "train/ref/a/1.png", 2)
  write(tmp_path / "train/ref/b.png", 3)
  assert levels(load_source(f"pairs:{tmp_path}", "train")) == [(1, 2)]
  assert "1 references without an image of their name, not used: b.png" in caplog.text


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_reference_file_and_folder_raise(suffix, tmp_path):
  write(tmp_path / "train/input/a.jpg")
  write(tmp_path / f"train/ref/a.{suffix}", 1)
  write(tmp_path / "train/ref/a/1.png", 2)
  with pytest.raises(ValueError, match=rf"ref/a, .*ref/a\.{suffix}"):
    load_source(f"pairs:{tmp_path}", "train")


def test_names_unicode_normalised(tmp_path):
  for form, kind, value in (("NFC", "input", 1), ("NFD", "ref", 2)):
    write(tmp_path / f"train/{kind}/{unicodedata.normalize(form, 'café.png')}", value)
  assert levels(load_source(f"pairs:{tmp_path}", "train")) == [(1, 2)]


def test_non_decimal_digits_sort_as_letters(tmp_path):
  for value, stem in enumerate(("m²", "m2", "m10", "٣")):
    write(tmp_path / f"train/input/{stem}.png", value)
    write(tmp_path / f"train/ref/{stem}.png", 100 + value)
  pairs = levels(load_source(f"pairs:{tmp_path}", "train"))
  assert sorted(pairs) == [(i, 100 + i) for i in range(4)]
  assert pairs.index((1, 101)) < pairs.index((2, 102))


def test_hidden_files_ignored(tmp_path):
  write(tmp_path / "train/input/a.png", 1)
  write(tmp_path / "train/ref/a.jpg", 2)
  (tmp_path / "train/ref/._a.jpg").write_bytes(b"resource fork")
  (tmp_path / "train/input/._a.png").write_bytes(b"resource fork")
  assert levels(load_source(f"pairs:{tmp_path}", "train")) == [(1, 2)]


@pytest.mark.parametrize(
  ("location", "options", "error", "message"),
  [
    ("nowhere", {}, FileNotFoundError, "pairs:nowhere"),
    ("gs://bucket/x", {}, FileNotFoundError, "pairs:gs://bucket/x"),
    (".", {"reference": "al"}, ValueError, "unknown reference 'al'"),
    (".", {"level": 1}, ValueError, "unknown option of pairs:"),
  ],
)
def test_invalid_options_raise(location, options, error, message):
  with pytest.raises(error, match=message):
    load_source(f"pairs:{location}", "test", **options)


def test_unknown_layout_raises(tmp_path):
  with pytest.raises(ValueError, match="unknown layout"):
    load_source(f"pairs:{tmp_path}", "test")
  (tmp_path / "train/input").mkdir(parents=True)
  with pytest.raises(ValueError, match="no images of"):
    load_source(f"pairs:{tmp_path}", "train")


def test_evaluation_batches(tmp_path):
  name = cufed(tmp_path)
  source = pickle.loads(pickle.dumps(load_source(name, "test", reference="all")))
  transforms = build_transforms([{"name": "super_resolution_pair", "stitch_side": 12}])
  batches = list(pipeline.eval_batches(source, transforms, batch_size=2))
  assert {key: x.shape[1:] for key, x in batches[0].items() if key != "mask"} == {
    "image": (8, 8, 3),
    "low_res_image": (2, 2, 3),
    "upsampled_image": (8, 8, 3),
    "ref_image": (60, 12, 3),
    "blurred_ref_image": (60, 12, 3),
  }
  assert batches[0]["ref_image"][1, 13, 0, 0] == 112
  (tmp_path / "test/CUFED5/000_2.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"000_0\.png: .*reference"):
    next(iter(pipeline.eval_batches(source, transforms, batch_size=1)))
