"""Recipes: reproducible runs described in YAML (docs/recipes.md)."""
