"""Adds configs/ to the wheel, as vit_jax_zoo/shipped/configs; setup.cfg has everything else."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["vit_jax_zoo*"]), "vit_jax_zoo.shipped.configs"],
  package_dir={"vit_jax_zoo.shipped.configs": "configs"},
)
