"""transformers' DETR in torch, of the size of one of ours: the peer of `detr_step.py`."""

from collections.abc import Mapping

import jax
import numpy as np
import torch
from transformers import DetrConfig, DetrForObjectDetection

from vit_jax_zoo.models.detr import Detr
from vit_jax_zoo.weights.detr_hf import config_of

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TransformersPeer:
  """The same model, batch, losses and optimizer as ours, as a torch user would write them."""

  def __init__(self, model: Detr, batch: Mapping[str, np.ndarray], *, mixed: bool):
    """Sets model, optimizer and batch up, on the GPU if JAX uses one.

    Args:
      model: ours; its fields give the size.
      batch: as `tasks.detection.Detection` has it, without padding around the images.
      mixed: bfloat16 by autocast.
    """
    self._device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    config = {**config_of(fields), "auxiliary_loss": True}
    self._model = DetrForObjectDetection(DetrConfig(**config)).to(self._device)
    trained = [p for p in self._model.parameters() if p.requires_grad]
    self._trained = trained
    self._optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
    self._images = torch.from_numpy(batch["image"]).to(self._device)
    self._labels = [
      {
        "class_labels": torch.from_numpy(labels[real]).long().to(self._device),
        "boxes": torch.from_numpy(boxes[real]).to(self._device),
      }
      for labels, boxes, real in zip(
        batch["labels"], batch["boxes_cxcywh"], batch["is_target"], strict=True
      )
    ]
    self._mixed = mixed

  def train(self, count: int) -> None:
    """Takes so many training steps, and waits for the last."""
    self._model.train()
    for _ in range(count):
      self._outputs(self._labels).loss.backward()
      torch.nn.utils.clip_grad_norm_(self._trained, 0.1)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
    self._wait()

  @torch.no_grad()
  def evaluate(self, count: int) -> None:
    """Predicts the batch so many times: scores, classes and boxes."""
    self._model.eval()
    for _ in range(count):
      outputs = self._outputs(None)
      torch.softmax(outputs.logits.float(), dim=-1)[..., :-1].max(dim=-1)
    self._wait()

  def _outputs(self, labels: list[dict[str, torch.Tensor]] | None):
    mean = torch.tensor(_MEAN, device=self._device)
    std = torch.tensor(_STD, device=self._device)
    images = ((self._images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
      return self._model(images, labels=labels)

  def _wait(self) -> None:
    if self._device.type == "cuda":
      torch.cuda.synchronize()
