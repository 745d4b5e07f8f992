"""Weights: dialects of names, any file to a checkpoint, presets of released models, conversion, download."""
