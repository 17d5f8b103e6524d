"""ViT's recipes: numbers of the paper's tables, and what fields change."""

import pytest

from configs.vit import get_config


def test_image_size_reaches_training_and_evaluation():
  config = get_config("b16_imagenet21k,image_size=384")
  assert config.data.train.transforms[0]["size"] == 384
  assert [t["size"] for t in config.data.eval.val.transforms] == [438, 384]


def test_pre_training_on_imagenet21k_is_table_3():
  config = get_config("b16_imagenet21k")
  assert config.task.objective == "sigmoid"
  assert (config.model.head_bias_init, config.model.dropout_rate) == (-10.0, 0.1)
  assert (config.batch_size, config.num_epochs) == (4096, 90)
  assert config.optimizer.weight_decay == 0.03


def test_multi_label_sets_get_multi_hot_targets():
  config = get_config("l16_imagenet21k,source=tfds:/jft,num_classes=18291,multi_label=true")
  expected = {"name": "multi_hot", "num_classes": 18291}
  assert config.data.train.transforms[-1] == config.data.eval.val.transforms[-1] == expected
  assert config.model.num_classes == config.task.num_classes == 18291
  assert config.data.eval.val.source == "tfds:/jft"


def test_fine_tuning_starts_from_the_papers_weights():
  config = get_config("l32_finetune,dataset=oxford_flowers102,learning_rate=0.003")
  assert config.init_from == "ViT-L_32.npz"
  assert config.num_steps == 500
  assert config.optimizer.schedule.warmup_steps == 100
  assert config.data.train.split == "train+validation[:80%]"
  assert get_config("b16_finetune,init_from=runs/mine").init_from == "runs/mine"


def test_image_sides_are_multiples_of_the_patch():
  assert get_config("h14_finetune").data.train.transforms[0]["size"] % 14 == 0
  assert get_config("b16_finetune").data.train.transforms[0]["size"] == 384


def test_an_unknown_dataset_names_the_nearest():
  with pytest.raises(ValueError, match="unknown dataset 'cifar_10'; did you mean 'cifar10'"):
    get_config("b16_finetune,dataset=cifar_10")
