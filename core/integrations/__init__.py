"""Plug-ins for training engines, one file each, imported only by who uses the engine."""
