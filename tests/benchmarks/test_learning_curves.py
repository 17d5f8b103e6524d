"""`benchmarks/learning_curves.py`: common budget, table and figure."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import learning_curves


@pytest.fixture(scope="module")
def found():
  runs = []
  for seed, last in enumerate((0.8, 0.9, 0.7)):
    curve = [[64, 0.1], [128, 0.2], [192, 0.5], [256, last]]
    sizes = {"parameters": 12_345, "flops": 2.5e6, "cpu": 10.0 + seed, "wall": 1.0}
    runs.append({"system": "ViT", "seed": seed, "curve": curve, **sizes})
  return runs


@pytest.mark.parametrize("system", learning_curves.SYSTEMS)
def test_all_systems_same_examples_and_batches(system):
  make, score = learning_curves.SYSTEMS[system]
  config = learning_curves.prepare(make(), examples=6400, evaluations=4, seed=3)
  assert (config.num_steps, config.batch_size, config.seed) == (100, 64, 3)
  assert config.eval_every == 25
  assert config.data.train.source == "demo:digits"
  assert [t["name"] for t in config.data.train.transforms] == ["random_translate"]
  assert score.partition("/")[0] in config.data.eval
  assert [spec.split for spec in config.data.eval.values()] == ["test"]
  # None: accuracy, the default of classification.
  assert config.checkpoint.get("best") in (None, score)


def test_resnet_differs_only_by_lambda_layers():
  plain, lambdas = (learning_curves.SYSTEMS[name][0]() for name in ("ResNet", "LambdaResNet"))
  assert set(plain.model.lambda_blocks) == {"none"}
  with plain.ignore_type():
    plain.model.lambda_blocks = lambdas.model.lambda_blocks
  assert plain.to_dict() == lambdas.to_dict()


def test_table_median_and_range(found):
  (row,) = learning_curves.summarize(found)
  assert row == {
    "system": "ViT", "parameters": "12,345", "MFLOP per example": "2.5",
    "after 64": "10.0% (10.0%-10.0%)", "at the end": "80.0% (70.0%-90.0%)",
    "CPU s per run": "11",
  }  # fmt: skip


def test_figure_labels_curves(found):
  figure = learning_curves.draw(found, seeds=3)
  ax = figure.axes[0]
  assert list(ax.lines[0].get_xdata()) == [64, 128, 192, 256]
  assert list(ax.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.5, 0.8])
  assert [text.get_text() for text in ax.texts] == ["ViT  80.0%", "12k, 2.5 MFLOP"]
  figure.canvas.draw()
