"""The tiny bundle: a procedural captioned world, and the stages that train a real model on it in about two hours of CPU."""
