"""`benchmarks/predict_speed.py` at a small size: its table, and the images that it predicts."""

import functools
import pathlib
import sys

import cv2

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import predict_speed


def test_table_has_both_speeds_and_their_ratio(monkeypatch, capsys):
  flags = ["--model=vit_ti16", "--images=4", "--image_size=16", "--batch_size=2", "--rounds=1"]
  small = functools.partial(predict_speed.create_model, depth=1, width=16, mlp_dim=16, num_heads=2)
  monkeypatch.setattr(predict_speed, "create_model", small)
  monkeypatch.setattr(sys, "argv", ["predict_speed.py", *flags])
  predict_speed.main()
  printed = capsys.readouterr().out
  rows = [line.strip("|").split("|") for line in printed.splitlines() if " time " in line]
  assert [row[0].strip() for row in rows] == ["wall time", "CPU time"]
  for bare, whole, ratio in ([float(cell.split()[0]) for cell in row[1:]] for row in rows):
    assert abs(ratio - bare / whole) < 0.02 * ratio
  assert "vit_ti16, 4 images;" in printed
  assert ".jpg" not in printed  # lines of images


def test_images_are_crops(tmp_path):
  paths = predict_speed.write_images(tmp_path, 4, 24)
  assert [path.name for path in paths] == ["0000.jpg", "0001.jpg", "0002.jpg", "0003.jpg"]
  assert len({path.read_bytes() for path in paths}) == 4
  assert {cv2.imread(str(path)).shape for path in paths} == {(24, 24, 3)}
