"""Run by ComfyUI's Python as inside.py is: the attention that ComfyUI was started with, in its own pass and in ours.

python inside_attention.py PACK FOLDER [OPTION]      OPTION: of ComfyUI's command line

Packages that need a GPU are played by modules that compute with torch's attention and count how often they are asked.
"""

from __future__ import annotations

import json
import logging
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

CALLS: Counter[str] = Counter()
torch_attention = F.scaled_dot_product_attention


def counted(*args: Any, **options: Any) -> Any:
    CALLS["torch"] += 1
    return torch_attention(*args, **options)


def sageattn(q: Any, k: Any, v: Any, tensor_layout: str = "HND", is_causal: bool = False, **options: Any) -> Any:
    """Attend as the package does, in its layouts NHD [B, L, N, K] and HND [B, N, L, K]."""
    assert not is_causal
    assert options.get("sm_scale") is None
    CALLS["sage"] += 1
    if tensor_layout == "HND":
        return torch_attention(q, k, v)
    return torch_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False
) -> Any:
    """Attend as the package does, in its layout [B, L, N, K]."""
    assert not causal
    assert softmax_scale is None
    CALLS["flash"] += 1
    return torch_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()


def plant(package: str, **functions: Any) -> None:
    module = types.ModuleType(package)
    vars(module).update(functions)
    # ComfyUI and torch ask for a package's spec to learn whether it is installed.
    module.__spec__ = types.SimpleNamespace(name=package, origin=package, loader=None, submodule_search_locations=None)  # type: ignore[assignment]
    sys.modules[package] = module


OPTION = sys.argv[3] if len(sys.argv) > 3 else ""
if OPTION == "--use-sage-attention":
    plant("sageattention", sageattn=sageattn)
if OPTION == "--use-flash-attention":
    plant("flash_attn", flash_attn_func=flash_attn_func)
# Before ComfyUI is imported, whose modules take the function by name.
F.scaled_dot_product_attention = counted  # type: ignore[assignment]

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path.cwd()))  # ComfyUI's own `nodes` comes first
import inside  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402


def calls_of(sample: Any) -> tuple[Any, dict[str, int]]:
    CALLS.clear()
    video = sample()
    return video, dict(CALLS)


class Lines(logging.Handler):
    """What the pack says of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("attention: "):
            self.lines.append(record.getMessage())


def main() -> None:
    lines = Lines()
    logger = logging.getLogger(inside.causal_pass.__name__)
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    at_once = inside.chunk_sampler.ChunkSampler(
        inside.chunk_sampler.Run(causal=inside.CausalConfig(chunk=inside.FRAMES))
    )
    generator = torch.Generator().manual_seed(3)
    clip = torch.randn(1, 257, 1280, generator=generator)
    latents = torch.randn(1, inside.CHANNELS, inside.FRAMES, inside.HEIGHT, inside.WIDTH, generator=generator)
    values = {
        "concat_latent_image": latents,
        "concat_mask": torch.zeros_like(latents[:, :1]),
        "clip_vision_output": types.SimpleNamespace(penultimate_hidden_states=clip),
    }
    report: dict[str, Any] = {"function": sys.modules["comfy.ldm.wan.model"].optimized_attention.__name__}
    for kind, net, inputs in (
        ("t2v", inside.network(), {}),
        ("i2v", inside.network(in_dim=36, model_type="i2v"), values),
    ):
        whole = inside.loaded(inside.saved(f"{kind} whole", net, causal=None), kind="base")
        causal = inside.loaded(inside.saved(kind, net))
        native, host_calls = calls_of(lambda whole=whole, inputs=inputs: inside.once(whole, values=inputs))
        own, our_calls = calls_of(lambda causal=causal, inputs=inputs: inside.once(causal, at_once, values=inputs))
        report[kind] = {"difference": inside.apart(own, native), "hosts": host_calls, "ours": our_calls}
    plain_net = inside.network()
    patcher = inside.loaded(inside.saved("plain", plain_net))
    video, report["in_chunks_calls"] = calls_of(lambda: inside.sampled(patcher))
    F.scaled_dot_product_attention = torch_attention
    exact = inside.core_rollout(plain_net)
    report["in_chunks"] = inside.apart(video, exact)
    settings = inside.model_settings.Settings("causal", inside.CHUNKS, inside.STEPS, cache_dtype=torch.int8)
    narrow, report["from_int8_calls"] = calls_of(
        lambda: inside.sampled(inside.causal_model.with_settings(patcher, settings))
    )
    report["from_int8"] = float((narrow - exact).abs().mean() / exact.std())
    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    video, report["compiled_calls"] = calls_of(lambda: inside.sampled(compiled))
    report["compiled"] = inside.apart(video, exact)
    report["lines"] = lines.lines
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
