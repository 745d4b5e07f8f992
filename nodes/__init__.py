"""ComfyUI nodes: the only folder that knows the host. host.py talks to it, adapter.py wears its types."""
