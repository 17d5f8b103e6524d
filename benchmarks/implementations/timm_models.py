"""timm's ViT and LambdaResNet, from the folder that the package exports for timm."""

from collections.abc import Callable

import timm
import torch

from implementations import torch_utils
from implementations.base import Setting, Side


def side(setting: Setting) -> Side:
  """Trains and predicts as a torch user would; convolutional networks also with channels last."""
  batch = setting.inputs()
  images, labels = torch_utils.placed(batch["image"]), torch_utils.placed(batch["label"]).long()

  def normal() -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1

  def make(form: str) -> dict[str, Callable[[int], None]]:
    plain = _load(setting, form)
    model = torch_utils.maybe_compiled(plain, form)

    def loss() -> torch.Tensor:
      with torch_utils.precision(setting):
        logits = model(normal())
      return torch.nn.functional.cross_entropy(logits.float(), labels)

    @torch.inference_mode()
    def predict() -> None:
      plain.eval()
      with torch_utils.precision(setting):
        logits = model(normal())
      scores = torch.softmax(logits.float(), dim=-1)
      torch.topk(scores, 5)
      torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    return {
      "train": torch_utils.train_step(plain, loss),
      "predict": torch_utils.repeated(predict),
    }

  forms = setting.forms
  if not setting.model.startswith("vit"):  # convolutions may like the other order better
    forms = tuple(f + last for f in forms for last in ("", torch_utils.CHANNELS_LAST))
  answers = _answers(_load(setting, "eager"), normal(), labels)
  runs, skipped = torch_utils.tried(setting, make, forms)
  return Side(runs, torch_utils.numpy(answers), torch_utils.described(), skipped)


def _load(setting: Setting, form: str) -> torch.nn.Module:
  model = timm.create_model(f"local-dir:{setting.weights}", pretrained=True).to(
    torch_utils.device()
  )
  for module in model.modules() if form.endswith(torch_utils.CHANNELS_LAST) else ():
    if isinstance(module, torch.nn.Conv2d):  # others, of lambda layers, have no such order
      module.to(memory_format=torch.channels_last)
  return model


@torch.no_grad()
def _answers(
  model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
  logits = model.eval()(images)
  loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
  return {"logits": logits, "training loss": loss}
