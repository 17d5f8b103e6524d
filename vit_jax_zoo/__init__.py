"""Six vision papers in JAX, one training loop: ViT, iGPT, LambdaResNet, DETR, TTSR, FPT.

* `predictor("runs/detr_demo")("a.jpg")`: the result for an image, with `draw()` and `to_dict()`;
* `create_model("vit_b16", num_classes=10)`: a Linen module;
* `list_models("vit_*")`: the names that `create_model` takes, or published ones;
* `list_configs()`: the shipped configs, such as "vit:s16_imagenet";
* `load_pretrained("ViT-B_16.npz")`: a model with the weights of a published file or a run.

The names are imported at their first use, so that `import vit_jax_zoo` is fast.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from vit_jax_zoo.config import list_configs
  from vit_jax_zoo.inference.base import Predictor, Result
  from vit_jax_zoo.inference.load import load_pretrained, predictor
  from vit_jax_zoo.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = [
  "Predictor", "Result", "__version__", "create_model", "list_configs", "list_models",
  "load_pretrained", "predictor",
]  # fmt: skip
__dir__ = __all__.copy  # no names of this file's own
