"""From a finalized model to something faster."""
