"""transformers' DETR, from the folder that the package exports for it; it matches on the host."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from implementations import torch_utils
from implementations.base import Setting, Side

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def side(setting: Setting) -> Side:
  """Trains (matching and losses of six layers included) and predicts; attention is fused."""
  batch = setting.inputs()
  images = torch_utils.placed(batch["image"])
  mean, std = (torch.tensor(x, device=images.device) for x in (_MEAN, _STD))
  columns = zip(batch["labels"], batch["boxes_cxcywh"], batch["is_target"], strict=True)
  targets = [
    {"class_labels": torch_utils.placed(ids[real]).long(), "boxes": torch_utils.placed(boxes[real])}
    for ids, boxes, real in columns
  ]

  def outputs(model: Any, labels: Any) -> Any:
    normal = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch_utils.precision(setting):
      return model(normal, labels=labels)

  def make(form: str) -> dict[str, Callable[[int], None]]:
    plain = _load(setting)
    if form.startswith("compiled"):  # the losses match on the host: only the network compiles
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
  # With auxiliary losses transformers' layers hand on what is normalised: as much work, but other
  # numbers, which no published weights were trained for.
  plain.config.auxiliary_loss = False
  with torch.no_grad():
    found = outputs(plain, None)
  answers = {"logits": found.logits, "boxes_cxcywh": found.pred_boxes}
  runs, skipped = torch_utils.tried(setting, make)
  return Side(runs, torch_utils.numpy(answers), torch_utils.described(), skipped)


def _load(setting: Setting) -> Any:
  model = transformers.DetrForObjectDetection.from_pretrained(setting.weights)
  model.config.auxiliary_loss = True
  return model.to(torch_utils.device())
