"""Makes the fixtures of LambdaResNets from timm: `python tests/goldens/make_with_timm.py`.

Needs `pip install -e '.[parity]'`. Writes lambda_resnet50ts_a and lambda_resnet26rpt_a; timm alone
computes the outputs.
"""

import json
import pathlib

import numpy as np
import timm
import torch
from safetensors.numpy import save_file
from timm.models.byobnet import SelfAttnBlock

FOLDER = pathlib.Path(__file__).parent
WIDTH = 0.125
FIXTURES = {
  "lambda_resnet50ts_a": ("lambda_resnet50ts", 96, 1, {"num_classes": 8}),
  "lambda_resnet26rpt_a": ("lambda_resnet26rpt_256", 128, 0, {"num_classes": 10, "img_size": 128}),
}
"""Name: timm's architecture, image size, seed, further arguments.

With some seeds the lambda layers, cubic in their input, amplify rounding; with these, float32 and
float64 differ by 1e-5 in the logits.
"""


def fill(model, rng):
  """Random weights: He-normal kernels; scales in [0.5, 1.5]; biases and tables N(0, 0.2)."""
  for name, value in model.named_parameters():
    shape = tuple(value.shape)
    if name.endswith("pos_emb") or name.endswith("bias"):
      made = rng.normal(0, 0.2, shape)
    elif value.ndim == 1:
      made = rng.uniform(0.5, 1.5, shape)
    else:
      made = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    value.data = torch.from_numpy(made.astype(np.float32))


def set_statistics(model, images, rng):
  """Running statistics near those of a random batch: mean + 0.3 std N(0, 1), var U[0.5, 1.5]."""

  def hook(norm, inputs):
    x = inputs[0].transpose(0, 1).flatten(1)
    mean, var = x.mean(1), x.var(1)
    noise = torch.from_numpy(rng.normal(size=mean.shape).astype(np.float32))
    factor = torch.from_numpy(rng.uniform(0.5, 1.5, mean.shape).astype(np.float32))
    norm.running_mean.copy_(mean + 0.3 * var.sqrt() * noise)
    norm.running_var.copy_(var * factor)

  norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  hooks = [norm.register_forward_pre_hook(hook) for norm in norms]
  model(images)
  for handle in hooks:
    handle.remove()


def run(model, images):
  """Returns the outputs of the stem, the blocks, the lambda layers and the head."""
  outputs = {}

  def keep(name):
    return lambda module, inputs, output: outputs.update({name: output})

  parts = {"stem": model.stem, "features": model.final_conv}
  for s, stage in enumerate(model.stages):
    for b, block in enumerate(stage):
      parts[f"stages.{s}.{b}"] = block
      if isinstance(block, SelfAttnBlock):
        parts[f"stages.{s}.{b}.self_attn"] = block.self_attn
  hooks = [module.register_forward_hook(keep(name)) for name, module in parts.items()]
  logits = model(images)
  for handle in hooks:
    handle.remove()
  pooled = model.forward_head(outputs["features"], pre_logits=True)
  return {**outputs, "pre_logits": pooled, "logits": logits}


def make(name, arch, side, seed, fields):
  rng = np.random.default_rng(seed)
  kwargs = {"width_factor": WIDTH, **fields}
  model = timm.create_model(arch, **kwargs).eval()
  fill(model, rng)
  images = torch.from_numpy(rng.normal(size=(9, 3, side, side)).astype(np.float32))
  set_statistics(model, images[:8], rng)
  images = images[8:]
  outputs = {key: value.numpy().copy() for key, value in run(model, images).items()}
  state = {key: value.numpy().copy() for key, value in model.state_dict().items()}
  exact = model.double()(images.double()).numpy()
  outputs["logits_float64"] = exact.astype(np.float32)
  folder = FOLDER / name
  folder.mkdir(exist_ok=True)
  save_file(state, folder / "weights.safetensors")
  np.savez_compressed(folder / "inputs.npz", x=images.numpy())
  np.savez_compressed(folder / "outputs.npz", **outputs)
  kinds = {True: "self_attn", False: "bottle"}
  config = {
    "arch": arch, "img": side, "batch": 1, "seed": seed, "kwargs": kwargs,
    "block_types": [[kinds[isinstance(b, SelfAttnBlock)] for b in s] for s in model.stages],
    "stage_channels": [s[-1].conv3_1x1.conv.out_channels for s in model.stages],
    "stem_channels": [getattr(model.stem, f"conv{i}").conv.out_channels for i in (1, 2, 3)],
    "act": type(model.stem.conv1.bn.act).__name__.lower(),
    "bn_eps": model.stem.conv1.bn.eps,
    "num_params": sum(p.numel() for p in model.parameters()),
    "fp32_vs_fp64_max_logit_diff": float(np.abs(outputs["logits"] - exact).max()),
    "max_logit": float(np.abs(exact).max()),
    "timm": timm.__version__, "torch": torch.__version__,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
  print(json.dumps(config))


if __name__ == "__main__":
  with torch.no_grad():
    for name, arguments in FIXTURES.items():
      make(name, *arguments)
