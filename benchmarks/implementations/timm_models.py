"""timm's ViT and LambdaResNet, with the weights that this package exports for timm."""

from collections.abc import Callable

import timm
import torch

from implementations import torch_utils
from implementations.base import Implementation, Setting


def create(setting: Setting) -> Implementation:
  """Train and prediction steps; convolutional networks also in channels-last layout."""
  batch = setting.inputs()
  images, labels = (torch_utils.to_device(batch[name]) for name in ("image", "label"))
  labels = labels.long()

  def normalized() -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1

  def make(mode: str) -> dict[str, Callable[[int], None]]:
    plain = _load(setting, mode)
    model = torch_utils.maybe_compiled(plain, mode)

    def loss() -> torch.Tensor:
      with torch_utils.precision(setting):
        logits = model(normalized())
      return torch.nn.functional.cross_entropy(logits.float(), labels)

    @torch.inference_mode()
    def predict() -> None:
      plain.eval()
      with torch_utils.precision(setting):
        logits = model(normalized())
      scores = torch.softmax(logits.float(), dim=-1)
      torch.topk(scores, 5)
      torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    return {
      "train": torch_utils.train_step(plain, loss),
      "predict": torch_utils.repeated(predict),
    }

  modes = setting.modes
  if not setting.model.startswith("vit"):
    modes = tuple(m + last for m in modes for last in ("", torch_utils.CHANNELS_LAST))
  outputs = _outputs(_load(setting, "eager"), normalized(), labels)
  runs, skipped = torch_utils.prepare_modes(setting, make, modes)
  return Implementation(runs, torch_utils.numpy(outputs), torch_utils.device_name(), skipped)


def _load(setting: Setting, mode: str) -> torch.nn.Module:
  model = timm.create_model(f"local-dir:{setting.weights}", pretrained=True)
  model = model.to(torch_utils.device())
  for module in model.modules() if mode.endswith(torch_utils.CHANNELS_LAST) else ():
    if isinstance(module, torch.nn.Conv2d):  # lambda layers have 3d convolutions
      module.to(memory_format=torch.channels_last)
  return model


@torch.no_grad()
def _outputs(
  model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
  logits = model.eval()(images)
  loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
  return {"logits": logits, "training loss": loss}
