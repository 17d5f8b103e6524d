"""The demos train and evaluate under JAX's flags; parameters stay float32."""

import jax
import pytest

from tests import command
from vit_jax_zoo.training.checkpoint import restore_variables

_DETECTOR = (
  "--config.model.width=16",
  "--config.model.num_heads=2",
  "--config.model.mlp_dim=16",
  "--config.model.decoder_depth=1",
  "--config.model.backbone.widths=(4, 4, 4, 4)",
  "--config.model.backbone.stem_width=4",
  "--config.eval_batch_size=8",
  "--config.data.eval.test.split=test[:8]",
)
DEMOS = {
  "vit:demo": ("--config.model.width=16", "--config.model.depth=2", "--config.model.num_heads=2"),
  "igpt:demo": ("--config.model.width=16", "--config.model.depth=2", "--config.model.num_heads=2"),
  "lambda_resnet:demo": (),
  "detr:demo": _DETECTOR,
  "detr:demo_panoptic": (*_DETECTOR, "--config.init_from=None"),
  "ttsr:demo": (),
  "fpt:demo": (),
  "fpt:demo_segmentation": (),
}
FLAGS = {
  "JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DEBUG_NANS": "1",
}  # fmt: skip
RUN_ALWAYS = ("vit:demo", "JAX_ENABLE_X64")


@pytest.mark.parametrize(
  ("demo", "flag"),
  [
    pytest.param(demo, flag, marks=() if (demo, flag) == RUN_ALWAYS else pytest.mark.slow)
    for demo in DEMOS
    for flag in FLAGS
  ],
)
def test_the_first_steps_and_an_evaluation(tmp_path, demo, flag):
  name, _, variant = demo.partition(":")
  config = f"--config=configs/{name}.py:{variant},num_steps=2,batch_size=8"
  command.run(tmp_path, config, "--config.explain=False", *DEMOS[demo], **{flag: FLAGS[flag]})
  assert any(key.startswith("test/") for row in command.rows(tmp_path) for key in row)
  leaves = jax.tree.leaves(restore_variables(tmp_path))
  assert {leaf.dtype.name for leaf in leaves if leaf.dtype.kind != "i"} == {"float32"}
