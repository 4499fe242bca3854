"""Options wherever they come from: a recipe, --set, a flag or a keyword argument."""
