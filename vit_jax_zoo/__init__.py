"""Vision Transformers and their rivals in JAX: six papers, one training loop.

The three names a user of the models needs are imported on first use, so that
`import vit_jax_zoo` itself costs nothing:

* `create_model("vit_b16", num_classes=10)`: a Linen module with fresh weights to come;
* `list_models("vit_*")`: the names that `create_model` knows;
* `load_pretrained("ViT-B_16.npz")`: a published or own checkpoint, ready to use.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
  "create_model": "vit_jax_zoo.registry",
  "list_models": "vit_jax_zoo.registry",
  "load_pretrained": "vit_jax_zoo.inference.load",
}
__all__ = ["__version__", "create_model", "list_models", "load_pretrained"]


def __getattr__(name: str) -> object:
  if name in _LAZY:
    return getattr(import_module(_LAZY[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
