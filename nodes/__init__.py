"""ComfyUI nodes: the only folder that knows the host. host.py talks to it, the others wear its types."""
