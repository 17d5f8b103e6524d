"""transformers' DETR, with the weights that this package exports for it; it matches on the host."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from implementations import torch_utils
from implementations.base import Implementation, Setting

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def create(setting: Setting) -> Implementation:
  """Train step, with matching and losses of six layers, and prediction step; fused attention."""
  batch = setting.inputs()
  images = torch_utils.to_device(batch["image"])
  mean, std = (torch.tensor(x, device=images.device) for x in (_MEAN, _STD))
  columns = zip(batch["labels"], batch["boxes_cxcywh"], batch["is_target"], strict=True)
  targets = [
    {
      "class_labels": torch_utils.to_device(ids[real]).long(),
      "boxes": torch_utils.to_device(boxes[real]),
    }
    for ids, boxes, real in columns
  ]

  def outputs(model: Any, labels: Any) -> Any:
    normalized = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch_utils.precision(setting):
      return model(normalized, labels=labels)

  def make(mode: str) -> dict[str, Callable[[int], None]]:
    plain = _load(setting)
    if mode.startswith("compiled"):  # only the network: matching runs on the host
      plain.model = torch.compile(plain.model)

    @torch.inference_mode()
    def predict() -> None:
      plain.eval()
      torch.softmax(outputs(plain, None).logits.float(), dim=-1)[..., :-1].max(dim=-1)

    step = torch_utils.train_step(
      plain, lambda: outputs(plain, targets).loss, weight_decay=1e-4, clip_norm=0.1
    )
    return {"train": step, "predict": torch_utils.repeated(predict)}

  plain = _load(setting).eval()
  # With auxiliary losses, transformers passes normalized features between decoder layers: the same
  # cost, but different outputs, which no published weights were trained for.
  plain.config.auxiliary_loss = False
  with torch.no_grad():
    predicted = outputs(plain, None)
  arrays = torch_utils.numpy({"logits": predicted.logits, "boxes_cxcywh": predicted.pred_boxes})
  runs, skipped = torch_utils.prepare_modes(setting, make)
  return Implementation(runs, arrays, torch_utils.device_name(), skipped)


def _load(setting: Setting) -> Any:
  model = transformers.DetrForObjectDetection.from_pretrained(setting.weights)
  model.config.auxiliary_loss = True
  return model.to(torch_utils.device())
