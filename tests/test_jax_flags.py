"""Demos under JAX's x64, strict promotion and NaN flags; parameters stay float32."""

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
  "detr:demo_panoptic": (  # groups of the mask head's norms need such a width
    *_DETECTOR,
    "--config.model.width=64",
    "--config.model.num_heads=8",
    "--config.init_from=None",
  ),
  "ttsr:demo": (),
  "fpt:demo": (),
  "fpt:demo_mask": (),
  "fpt:demo_segmentation": (),
}
FLAGS = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DEBUG_NANS": "1"}


SLOW = [pytest.param(demo, marks=pytest.mark.slow) for demo in DEMOS if demo != "vit:demo"]


@pytest.mark.long
@pytest.mark.parametrize("demo", ["vit:demo", *SLOW])
def test_demo_with_all_flags(tmp_path, demo):
  name, _, variant = demo.partition(":")
  config = f"--config=configs/{name}.py:{variant},num_steps=2,batch_size=8"
  command.run(tmp_path, config, "--config.explain=False", *DEMOS[demo], **FLAGS)
  assert any(key.startswith("test/") for row in command.rows(tmp_path) for key in row)
  leaves = jax.tree.leaves(restore_variables(tmp_path))
  assert {leaf.dtype.name for leaf in leaves if leaf.dtype.kind != "i"} == {"float32"}
