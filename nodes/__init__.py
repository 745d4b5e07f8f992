"""ComfyUI nodes: the only folder that knows ComfyUI. adapter/host.py talks to it, the others wear its types."""
