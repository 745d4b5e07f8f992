"""Adapter: the machinery between ComfyUI and the core. It imports no node."""
