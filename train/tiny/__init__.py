"""The tiny bundle: a procedural captioned world, and the stages that train a real model on it on a CPU."""
