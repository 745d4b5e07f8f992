"""Codecs: what turns text, images, latents, sound and video into each other."""
