"""How a model becomes sparse, and dense again."""
