"""What is on disk: atomic, safe to load, and checked."""
