"""Prediction for images: the protocol (`base`), and a predictor per task."""

import dataclasses
from typing import TYPE_CHECKING

import jax

from vit_jax_zoo.registry import registry_of

if TYPE_CHECKING:
  from vit_jax_zoo.inference.base import Options, Predictor, Trained


def predictor_class(trained: "Trained") -> "type[Predictor]":
  """Returns the class of the predictor of a model's task; ValueError without one."""
  return registry_of("task to predict with", "predictors")[trained.task.name]


def create_predictor(trained: "Trained", options: "Options") -> "Predictor":
  """Returns the predictor of a model's task; ValueError without one, or for an invalid option."""
  kind = predictor_class(trained)
  if unread := sorted(options.given - kind.reads):
    supported = ", ".join(f"--{option}" for option in sorted(kind.reads))
    raise ValueError(f"--{unread[0]}: not supported by this model's task; expected {supported}")
  trained = dataclasses.replace(trained, variables=jax.device_put(trained.variables))
  return kind(trained, options)
