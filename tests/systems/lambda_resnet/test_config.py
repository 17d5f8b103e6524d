"""LambdaResNet's recipes: values of the paper's appendix, and pseudo-labelled data."""

import pytest

from configs.lambda_resnet import NETWORKS, VARIANTS, get_config
from vit_jax_zoo.registry import list_models


@pytest.mark.parametrize(
  ("variant", "magnitude", "dropout_rate", "drop_path_rate"),
  [
    ("lambda50_128", 10, 0.2, 0.0),
    ("lambda101_160", 10, 0.3, 0.0),
    ("lambda101_192", 15, 0.2, 0.0),
    ("lambda152_224", 15, 0.3, 0.1),
    ("lambda420_320", 15, 0.3, 0.2),
    ("lambda152_288_pseudo", 15, 0.3, 0.1),
  ],
)
def test_scaled_recipes_have_regularization_of_appendix(
  variant, magnitude, dropout_rate, drop_path_rate
):
  config = get_config(variant)
  depth, side = variant.removeprefix("lambda").split("_")[:2]
  assert config.model.name == f"lambda_resnet_{depth}"
  crop, _, randomly = config.data.train.transforms
  assert crop["size"] == config.data.eval.val.transforms[-1]["size"] == int(side)
  assert randomly == {"name": "rand_augment", "num_layers": 2, "magnitude": magnitude}
  assert config.model.dropout_rate == dropout_rate
  assert config.model.drop_path_rate == drop_path_rate
  assert config.optimizer.weight_decay == 4e-5


def test_ablation_recipes_are_not_regularized():
  config = get_config("r50_ccll")
  assert [t["name"] for t in config.data.train.transforms] == ["random_resized_crop", "random_flip"]
  assert "dropout_rate" not in config.model
  assert (config.optimizer.weight_decay, config.num_epochs) == (1e-4, 90)


def test_recipes_cover_networks_of_appendix():
  assert {f"lambda_resnet_{network.depth}" for network in NETWORKS.values()} < set(list_models())
  names = [name for name in VARIANTS if name.startswith("lambda")]
  assert len([name for name in names if name.endswith("_pseudo")]) == 7
  assert len([name for name in names if not name.endswith("_pseudo")]) == 12


def test_pseudo_label_recipe_keeps_number_of_steps():
  argument = "batch_size=4096,pseudo_source=tfds:mine,data_dir=gs://bucket"
  config = get_config(f"lambda152_288_pseudo,{argument}")
  more = {"source": "tfds:mine", "split": "train", "data_dir": "gs://bucket"}
  assert [dict(other) for other in config.data.train.extra_sources] == [more]
  assert config.get("num_epochs") is None
  assert config.num_steps == pytest.approx(350 * 1_281_167 / 4096, abs=0.5)
