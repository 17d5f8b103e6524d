"""Makes two DETR fixtures from transformers: `python tests/goldens/make_with_transformers.py`.

Needs `pip install -e '.[parity]'`. Writes detr_hf_a (transformers' own ResNet) and detr_hf_timm_a
(timm's ResNet); transformers alone computes the outputs and names the weights.
"""

import json
import pathlib
from unittest import mock

import numpy as np
import timm
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

FOLDER = pathlib.Path(__file__).parent
WIDTHS = (16, 32, 64, 128)
SIZES = {
  "d_model": 64, "num_queries": 9, "num_labels": 11, "encoder_layers": 2, "decoder_layers": 3,
  "encoder_ffn_dim": 96, "decoder_ffn_dim": 128, "encoder_attention_heads": 8,
  "decoder_attention_heads": 8,
}  # fmt: skip


def with_own_backbone(depths):
  """DETR with transformers' ResNet, as the hub's `no_timm` revisions have it."""
  stages = [f"stage{i}" for i in range(1, 5)]
  backbone = ResNetConfig(
    embedding_size=8, hidden_sizes=WIDTHS, depths=depths, layer_type="bottleneck",
    out_features=stages,
  )  # fmt: skip
  return DetrForObjectDetection(
    DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **SIZES)
  )


def with_timms_backbone(depths):
  """DETR with timm's ResNet-50, its stages narrower and of other depths."""
  planes = tuple(width // 4 for width in WIDTHS)
  create = timm.create_model

  def narrow(name, **kwargs):
    return create(name, **{**kwargs, "layers": depths, "channels": planes, "pretrained": False})

  with mock.patch("timm.create_model", narrow):
    return DetrForObjectDetection(
      DetrConfig(
        use_timm_backbone=True, backbone="resnet50", use_pretrained_backbone=False, **SIZES
      )
    )


FIXTURES = {
  "detr_hf_a": (with_own_backbone, (2, 1, 2, 1), 121, ((96, 128), (60, 95))),
  "detr_hf_timm_a": (with_timms_backbone, (1, 2, 1, 2), 123, ((64, 128), (96, 75))),
}
"""Name: constructor, depths of the stages, seed, sizes of the two images."""


def fill(model, rng):
  """Random weights: kernels; scales, biases and statistics that differ from 1 and 0."""
  for name, value in model.state_dict().items():
    if not value.is_floating_point():
      continue
    shape = tuple(value.shape)
    if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
      made = rng.uniform(0.5, 1.5, shape)
    elif value.ndim == 1:
      made = rng.normal(0, 0.2, shape)
    elif name.startswith("model.query"):
      made = rng.normal(0, 2, shape)
    else:
      sharp = ".q_proj" in name or ".k_proj" in name  # attention far from uniform
      gain = 3 if sharp else 1.5 if value.ndim == 2 else np.sqrt(2)
      made = rng.normal(0, gain / np.sqrt(np.prod(shape[1:])), shape)
    value.copy_(torch.from_numpy(made.astype(np.float32)))


def make(name, constructor, depths, seed, sizes):
  rng = np.random.default_rng(seed)
  model = constructor(depths).eval()
  fill(model, rng)
  height, width = np.max(sizes, axis=0)
  mask = np.zeros((2, height, width), np.int64)
  for row, (h, w) in zip(mask, sizes, strict=True):
    row[:h, :w] = 1
  images = (rng.normal(size=(2, 3, height, width)) * mask[:, None]).astype(np.float32)
  pixels = torch.from_numpy(images)
  outputs = {}
  for prefix, pixel_mask in (("", torch.from_numpy(mask)), ("nomask/", None)):
    found = model(pixels, pixel_mask=pixel_mask)
    outputs |= {f"{prefix}{key}": found[key].numpy() for key in ("logits", "pred_boxes")}
  folder = FOLDER / name
  model.save_pretrained(folder / "saved")
  weights = load_file(folder / "saved" / "model.safetensors")
  for key in [key for key in weights if key.endswith("downsample.1.running_mean")]:
    counter = key.replace("running_mean", "num_batches_tracked")  # as the files on the hub have
    weights[counter] = np.zeros((), np.int64)
  for file in (folder / "saved").iterdir():
    file.unlink()
  (folder / "saved").rmdir()
  save_file(weights, folder / "weights.safetensors")
  np.savez_compressed(folder / "inputs.npz", pixel_values=images, pixel_mask=mask)
  np.savez_compressed(folder / "outputs.npz", **outputs)
  config = {
    **SIZES, "dilation": False, "depths": depths, "hidden_sizes": WIDTHS, "sizes": sizes,
    "seed": seed, "num_params": sum(p.numel() for p in model.parameters()),
    "transformers": transformers.__version__, "timm": timm.__version__, "torch": torch.__version__,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
  print(name, config, {k: float(np.abs(v).max()) for k, v in outputs.items()}, len(weights))


if __name__ == "__main__":
  with torch.no_grad():
    for name, arguments in FIXTURES.items():
      (FOLDER / name).mkdir(exist_ok=True)
      make(name, *arguments)
