"""Which latent space a TAEHV file decodes: what its shapes leave open, the bytes of the released files decide.

HunyuanVideo, Wan 2.1, CogVideoX and Open-Sora have tiny autoencoders of the same shapes; a wrong one decodes without an
error into wrong colours. github.com/madebyollin/taehv keeps its weights in git, which names every version of a file by
the SHA-1 of its length and bytes: those names are the fingerprints below (read from the repository's history, last on
2026-08-05).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..config import TAEHVConfig

WAN = "wan2.1"
# Distilled from Wan's own VAE without the scaling of its latents by mean and deviation (github.com/ModelTC/LightX2V,
# which tells it by the file's name, as ComfyUI does); its shapes are those of taew2_1.
WAN_UNSCALED = "wan2.1 unscaled"
# Of each channel of Wan 2.1's latents (github.com/Wan-Video/Wan2.1 wan/modules/vae.py): what scales them, and how.
WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_DEVIATION = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
BY_NAME = {"lighttaew2_1": WAN_UNSCALED}  # by the beginning of the file's name, in small letters
# (latent channels, patch size) -> the latent spaces of released files with these shapes
BY_SHAPE = {
    (16, 1): (WAN, "hunyuanvideo", "cogvideox", "opensora1.3"),
    (48, 2): ("wan2.2",),
    (32, 2): ("hunyuanvideo1.5",),
    (24, 2): ("minimax-h3",),
    (128, 4): ("ltx2", "ltx2.3"),
}
BY_GIT_NAME = {
    "d6ffa27358914606153bbb790bd1da1c5cf822fd": WAN,  # taew2_1.pth, 2025-11-03
    "4ffc6a6ebab83b6de42678327b73cbe9c1cfd86c": WAN,  # taew2_1.pth, 2025-03-16
    "4858ee7393b51943dd920ac98c8130ccd1fd2ede": WAN,  # taew2_1.pth, 2025-03-09
    "ec1a2be453a250aa406e912bb630c34463ba0b2f": WAN,  # safetensors/taew2_1.safetensors, 2025-11-30
    "e1409542548a72fe9259cc6dc92f0504555616c4": "hunyuanvideo",  # taehv.pth, 2025-03-02
    "373253e5f877b3f6474a7ec874e5559f40381246": "hunyuanvideo",  # safetensors/taehv.safetensors, 2025-11-30
    "faf18249d011f1188d28ac3dbcca7d91316baef2": "cogvideox",  # taecvx.pth, 2025-04-02
    "5c5cc87aefbc6a3140ecfb69cd108104ab9e800d": "cogvideox",  # taecvx.pth, 2025-04-02, the first
    "64e2fd755c9356db4c5c1e24d4a67135640a1085": "cogvideox",  # safetensors/taecvx.safetensors, 2025-11-30
    "932cae63cf7c1f0cbfb37a35cce233e154dd044b": "opensora1.3",  # taeos1_3.pth, 2025-05-27
    "599c53e7f43c8e439cca31c68eed1c68855d12a4": "opensora1.3",  # safetensors/taeos1_3.safetensors, 2025-11-30
    "415c1d34395097beed07efe5b3b9432771b02d70": "ltx2",  # taeltx_2.pth, 2026-01-16
    "a3b56beaa4c3d5478cdcb78d984e65b2ad44bffa": "ltx2",  # safetensors/taeltx_2.safetensors, 2026-01-16
    "d1b7ab9b7e106aed3b1ca907dc3ec02ef8e61005": "ltx2.3",  # taeltx2_3.pth, 2026-03-06
    "9553c906cd3d2a1deb85574d5236d256d795aa50": "ltx2.3",  # safetensors/taeltx2_3.safetensors, 2026-03-06
}
LATENT_SPACES = (*dict.fromkeys(name for names in BY_SHAPE.values() for name in names), WAN_UNSCALED)


def identify_latent_space(config: TAEHVConfig, path: Path) -> str | None:
    """Return the latent space of the TAEHV at `path`, None where neither shapes nor fingerprint nor name decide."""
    candidates = BY_SHAPE.get((config.latent_channels, config.patch_size), ())
    if len(candidates) == 1:
        return candidates[0]
    # By name last, and only of Wan's shapes: a name is changed more easily than bytes.
    named = next((space for name, space in BY_NAME.items() if path.name.lower().startswith(name)), None)
    return BY_GIT_NAME.get(git_name(path)) or (named if WAN in candidates else None)


def git_name(path: Path) -> str:
    """Return the SHA-1 under which git keeps the file's bytes (git hash-object)."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):  # bytes
            digest.update(piece)
    return digest.hexdigest()


def expect_latent_space(
    decoded: str | None, config: TAEHVConfig, needed: str, path: str | Path, setting: str | None = None
) -> None:
    """Raise ValueError unless a TAEHV of the latent space `decoded` decodes latents of `needed`.

    decoded: None where the file does not say; then the sentence asks the user. setting: the name of the option or
    widget with which they answer.
    """
    if decoded == needed:
        return
    if decoded is not None:
        raise ValueError(
            f"{path} decodes latents of {decoded}, but the model makes those of {needed}; use its own TAEHV"
        )
    names = " or ".join(BY_SHAPE.get((config.latent_channels, config.patch_size), ())) or "an unknown model"
    raise ValueError(
        f"{path} does not say which latents it decodes ({names}: all have these shapes); "
        f"if you know that they are {needed}'s, say so ("
        f"{f'{setting}={needed}' if setting else f'latent space {needed!r}'})"
    )
