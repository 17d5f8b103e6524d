"""`benchmarks/demos.py`: scores, table, resumption."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import demos


def test_last_value_of_each_metric(tmp_path):
  file = tmp_path / "metrics.jsonl"
  file.write_text(
    '{"step": 1, "test/psnr": 1.0, "test/ssim": 0.5}\n{"step": 2, "test/psnr": 2.0}\n'
  )
  assert demos.last_scores(file, ["test/psnr", "test/ssim"]) == {"test/psnr": 2.0, "test/ssim": 0.5}
  with pytest.raises(SystemExit, match=r"metrics\.jsonl: no test/miou"):
    demos.last_scores(file, ["test/miou"])


def test_only_missing_runs_executed_and_saved(tmp_path, monkeypatch, capsys):
  made = []

  def run(demo, seed, folder, options):
    made.append((demo, seed))
    if len(made) == 3:
      raise KeyboardInterrupt
    scores = dict.fromkeys(demos.DEMOS[demo], 0.9 + 0.01 * seed)
    return {"demo": demo, "seed": seed, "minutes": 2.0, "scores": scores}

  monkeypatch.setattr(demos, "run", run)
  flags = ["--demos=vit.py", "--seeds=0,1,2", f"--workdir={tmp_path}", f"--output={tmp_path}"]
  monkeypatch.setattr(sys, "argv", ["demos.py", *flags])
  with pytest.raises(KeyboardInterrupt):
    demos.main()
  assert len(json.loads((tmp_path / "demos.json").read_text())["runs"]) == 2
  demos.main()
  assert made == [("vit.py", 0), ("vit.py", 1), ("vit.py", 2), ("vit.py", 2)]
  row = next(line for line in capsys.readouterr().out.splitlines() if "configs/vit.py" in line)
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[1:5] == ["test/accuracy", "0.91", "0.9 to 0.92", "0.9, 0.91, 0.92"]
