"""Trains timm's and transformers' models on given batches, as `learning_parity.py` does here."""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

Batches = Mapping[str, np.ndarray]  # of step i "image_<i>", "label_<i>", ...
Loss = Callable[[int], torch.Tensor]  # of a step's batch

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def train(
  task: str, folder: pathlib.Path, fields: Any, optimizer: Mapping[str, Any]
) -> list[float]:
  """Trains the weights in `folder/start` and writes them to `folder/end`; returns the losses.

  `fields` is the task of this package, `optimizer` the config's section.
  """
  batches = np.load(folder / "batches.npz")
  model, loss = {
    "classification": _classification,
    "pixel_modelling": _pixel_modelling,
    "detection": _detection,
  }[task](folder / "start", batches, fields)
  update = _optimizer(model, optimizer)
  model.train()
  losses = []
  for step, rate in enumerate(np.load(folder / "learning_rates.npy")):
    for group in update.param_groups:
      group["lr"] = float(rate)
    value = loss(step)
    value.backward()
    if optimizer.get("clip_norm"):
      torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"])
    update.step()
    update.zero_grad(set_to_none=True)
    losses.append(value.item())
  _save(model, folder)
  return losses


def _classification(start: pathlib.Path, batches: Batches, task: Any) -> tuple[Any, Loss]:
  model = timm.create_model(f"local-dir:{start}", pretrained=True)

  def loss(step: int) -> torch.Tensor:
    logits = model(_images(batches[f"image_{step}"], task))
    labels = torch.from_numpy(batches[f"label_{step}"]).long()
    return cross_entropy(logits, labels, label_smoothing=task.label_smoothing)

  return model, loss


def _pixel_modelling(start: pathlib.Path, batches: Batches, _: Any) -> tuple[Any, Loss]:
  model = transformers.ImageGPTForCausalImageModeling.from_pretrained(start, **NO_DROPOUT)
  for name, parameter in model.named_parameters():
    parameter.requires_grad_(not name.endswith(".bias"))  # OpenAI's iGPT has none: these stay 0

  def loss(step: int) -> torch.Tensor:
    tokens = torch.from_numpy(batches[f"tokens_{step}"]).long()
    first = torch.full_like(tokens[:, :1], model.config.vocab_size - 1)  # the start token
    logits = model(torch.cat([first, tokens[:, :-1]], dim=1)).logits
    return cross_entropy(logits.flatten(0, 1), tokens.flatten())

  return model, loss


def _detection(start: pathlib.Path, batches: Batches, task: Any) -> tuple[Any, Loss]:
  model = transformers.DetrForObjectDetection.from_pretrained(start)
  model.config.dropout = model.config.attention_dropout = model.config.activation_dropout = 0.0
  # With them, transformers passes normalised features from layer to layer, unlike the paper's code.
  model.config.auxiliary_loss = False

  def loss(step: int) -> torch.Tensor:
    names = ("labels", "boxes_cxcywh", "is_target")
    rows = zip(*(torch.from_numpy(batches[f"{name}_{step}"]) for name in names), strict=True)
    targets = [
      {"class_labels": ids[real].long(), "boxes": boxes[real]} for ids, boxes, real in rows
    ]
    return model(_images(batches[f"image_{step}"], task), labels=targets).loss

  return model, loss


def _images(pixels: np.ndarray, task: Any) -> torch.Tensor:
  """Returns normalised images, [b 3 h w]."""
  mean, std = (torch.as_tensor(x, dtype=torch.float32) for x in (task.image_mean, task.image_std))
  return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _optimizer(model: Any, fields: Mapping[str, Any]) -> torch.optim.Optimizer:
  """Returns torch's optimizer; all parameters decay with rules, else those of two axes or more."""
  decay = fields.get("weight_decay", 0.0)
  trained = [p for p in model.parameters() if p.requires_grad]
  everywhere = bool(fields.get("rules"))
  groups = [
    {"params": [p for p in trained if everywhere or p.ndim > 1], "weight_decay": decay},
    {"params": [p for p in trained if not everywhere and p.ndim < 2], "weight_decay": 0.0},
  ]
  groups = [group for group in groups if group["params"]]
  if fields["name"] == "sgd":
    momentum, nesterov = fields["momentum"], fields["nesterov"]
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=nesterov)
  kind = torch.optim.AdamW if fields["name"] == "adamw" else torch.optim.Adam
  return kind(groups, lr=1.0, betas=(0.9, fields.get("b2", 0.999)))


def _save(model: Any, folder: pathlib.Path) -> None:
  """Writes the weights in the format of the initial ones."""
  if hasattr(model, "save_pretrained"):
    model.save_pretrained(folder / "end")
    for file in (folder / "start").glob("preprocessor_config.json"):
      shutil.copy(file, folder / "end")
    return
  shutil.copytree(folder / "start", folder / "end", dirs_exist_ok=True)
  tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
  save_file(tensors, folder / "end" / "model.safetensors")
