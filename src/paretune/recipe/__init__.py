"""Recipes: how a model is changed and run, as plain data, as expressions, and as points of the axes of a search."""

from paretune.recipe.expression import ALIASES, OLD_NAMES, preset, split_list
from paretune.recipe.recipe import CACHE_DTYPES, SCHEMA_VERSION, EngineOptions, Recipe

__all__ = ["ALIASES", "CACHE_DTYPES", "OLD_NAMES", "SCHEMA_VERSION", "EngineOptions", "Recipe", "preset", "split_list"]
