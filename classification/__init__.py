"""N:M sparse image classification: any torchvision classifier, trained from scratch or fine-tuned, under torchrun."""

PACKAGES = ("torchvision",)
"""Distributions whose versions a run records, beside core's."""
