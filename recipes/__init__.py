"""Recipes: one YAML file per experiment, checked before anything runs."""

from recipes.schema import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
