"""timm's Vision Transformer in torch, of the size of one of ours: the peer of `train_step.py`."""

import contextlib
from collections.abc import Mapping

import jax
import numpy as np
import timm.models.vision_transformer
import torch
from flax import linen as nn

from vit_jax_zoo.models.vit import VisionTransformer


class TimmPeer:
  """The same model, batch, optimizer and precision as ours, as a torch user would write them."""

  def __init__(
    self, model: nn.Module, batch: Mapping[str, np.ndarray], *, dtype: str, compiled: bool
  ):
    """Sets model, optimizer and batch up, on the GPU if JAX uses one.

    Args:
      model: ours; its fields give the size.
      batch: `image` uint8 [b h w 3], `label` [b].
      dtype: of the computation, "float32" or "bfloat16".
      compiled: whether the model goes through torch.compile.
    """
    self._device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    if self._device.type == "cuda":
      torch.set_float32_matmul_precision("high")  # TF32, as JAX has it by default
    size = batch["image"].shape[1]
    plain = _create(model, size).to(self._device)
    self._optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    self._plain = plain
    self._model = torch.compile(plain) if compiled else plain
    self._images = torch.from_numpy(batch["image"]).to(self._device)
    self._labels = torch.from_numpy(batch["label"]).long().to(self._device)
    self._mixed = dtype == "bfloat16"

  def train(self, count: int) -> None:
    """Takes so many training steps, and waits for the last."""
    self._model.train()
    for _ in range(count):
      loss = torch.nn.functional.cross_entropy(self._logits().float(), self._labels)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self._plain.parameters(), 1.0)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
    self._wait()

  @torch.no_grad()
  def evaluate(self, count: int) -> None:
    """Predicts the batch so many times, as ours does: five best classes, losses."""
    self._model.eval()
    for _ in range(count):
      logits = self._logits().float()
      torch.topk(torch.softmax(logits, dim=-1), min(5, logits.shape[-1]))
      torch.nn.functional.cross_entropy(logits, self._labels, reduction="none")
    self._wait()

  def _logits(self) -> torch.Tensor:
    images = self._images.permute(0, 3, 1, 2).float() / 127.5 - 1
    mixed = torch.autocast(self._device.type, torch.bfloat16)
    with mixed if self._mixed else contextlib.nullcontext():
      return self._model(images)

  def _wait(self) -> None:
    if self._device.type == "cuda":
      torch.cuda.synchronize()


def _create(model: nn.Module, image_size: int) -> torch.nn.Module:
  if not isinstance(model, VisionTransformer) or model.resnet or model.representation_size:
    raise ValueError("timm is set up as a peer of plain ViTs alone, such as --model=vit_s16")
  return timm.models.vision_transformer.VisionTransformer(
    img_size=image_size,
    patch_size=model.patch_size,
    num_classes=model.num_classes,
    global_pool="token" if model.pool == "cls" else "avg",
    class_token=model.pool == "cls",
    embed_dim=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    mlp_ratio=model.mlp_dim / model.width,
    act_layer="gelu_tanh",
  )
