"""Names and shapes of every parameter of a network, from its config, and the config back from the shapes.

Arithmetic without torch: a checkpoint is understood, or refused in one line, before any network is built. The
names are those of Wan 2.1 (github.com/Wan-Video/Wan2.1, wan/modules/model.py) and of TAEHV
(github.com/madebyollin/taehv, taehv.py). D is the model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .config import CLIP_DIM, TAEHVConfig, WanConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by the names of the parameters

WAN_HEAD_DIM = 128  # every released Wan 2.1 model; a file that differs says so in its header
MEMORY_BLOCKS = 3  # of each stage of TAEHV, in encoder and decoder


def wan_shapes(config: WanConfig) -> dict[str, Shape]:
    """Return every parameter of a Wan transformer of this config; causal and bidirectional networks have the same."""
    D, reads_clip = config.dim, config.reads_clip
    # What the blocks share: the way in for latents, text and time, and the way out.
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (D, config.in_dim, *config.patch_size),
        "patch_embedding.bias": (D,),
        **_linear("text_embedding.0", D, config.text_dim),  # the missing number is an activation
        **_linear("text_embedding.2", D, D),
        **_linear("time_embedding.0", D, config.freq_dim),
        **_linear("time_embedding.2", D, D),
        **_linear("time_projection.1", 6 * D, D),  # shift, scale and gate of attention and of the feed-forward layer
        "head.modulation": (1, 2, D),  # shift and scale, added to the time embedding's
        **_linear("head.head", config.out_dim * math.prod(config.patch_size), D),
    }
    if reads_clip:  # image features to the model width: norm, linear, GELU, linear, norm
        shapes |= _norm("img_emb.proj.0", CLIP_DIM) | _linear("img_emb.proj.1", CLIP_DIM, CLIP_DIM)
        shapes |= _linear("img_emb.proj.3", D, CLIP_DIM) | _norm("img_emb.proj.4", D)
    block = _wan_block(D, config.ffn_dim, reads_clip=reads_clip)
    for index in range(config.num_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _wan_block(D: int, ffn_dim: int, *, reads_clip: bool) -> dict[str, Shape]:
    # norm3 stands before cross-attention, which nothing modulates; the other two norms have no weights.
    shapes: dict[str, Shape] = {"modulation": (1, 6, D), **_norm("norm3", D)}
    for attention in ("self_attn", "cross_attn"):
        for projection in ("q", "k", "v", "o"):
            shapes |= _linear(f"{attention}.{projection}", D, D)
        # RMS norms over all heads at once, not over each head.
        shapes |= {f"{attention}.norm_q.weight": (D,), f"{attention}.norm_k.weight": (D,)}
    if reads_clip:  # the image's tokens have keys and values of their own beside the text's
        shapes |= _linear("cross_attn.k_img", D, D) | _linear("cross_attn.v_img", D, D)
        shapes |= {"cross_attn.norm_k_img.weight": (D,)}
    return shapes | _linear("ffn.0", ffn_dim, D) | _linear("ffn.2", D, ffn_dim)


def _linear(name: str, out_width: int, in_width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_width, in_width), f"{name}.bias": (out_width,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def wan_config(shapes: Shapes, *, num_heads: int | None = None, text_len: int = 512) -> WanConfig:
    """Return the sizes of the Wan transformer with these parameters (original names).

    Shapes say everything but the number of heads and the text length: give them where a file's header does. Without
    them a head is 128 wide. Raises ValueError when that does not divide the width, or when parameters are missing.
    """
    D, in_dim, *patch_size = _shape(shapes, "patch_embedding.weight", 5)
    # The head gives all latent pixels of a patch at once.
    out_dim = _shape(shapes, "head.head.weight", 2)[0] // math.prod(patch_size)
    has_features = "img_emb.proj.0.weight" in shapes
    if num_heads is None:
        if D % WAN_HEAD_DIM:
            raise ValueError(
                f"width {D} is not a multiple of {WAN_HEAD_DIM}, so the number of heads is unknown; "
                'save it with num_heads in the header ({"transformer": {"num_heads": ...}} under "config")'
            )
        num_heads = D // WAN_HEAD_DIM
    return WanConfig(
        dim=D,
        ffn_dim=_shape(shapes, "blocks.0.ffn.0.weight", 2)[0],
        num_heads=num_heads,
        num_layers=_count_blocks(shapes),
        in_dim=in_dim,
        out_dim=out_dim,
        text_dim=_shape(shapes, "text_embedding.0.weight", 2)[1],
        text_len=text_len,
        freq_dim=_shape(shapes, "time_embedding.0.weight", 2)[1],
        patch_size=(patch_size[0], patch_size[1], patch_size[2]),
        # Channels behind those of the noise are an image's; Wan 2.1 projects its features as well, Wan 2.2 does not.
        model_type="i2v" if has_features or in_dim > out_dim else "t2v",
        image_features=has_features or in_dim <= out_dim,
    )


def _count_blocks(shapes: Shapes) -> int:
    indices = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    missing = [index for index in range(len(indices)) if str(index) not in indices]
    if missing:
        raise ValueError(f"blocks.{missing[0]} is missing among {len(indices)} blocks; the file is incomplete")
    return len(indices)


def _shape(shapes: Shapes, name: str, axes: int) -> Shape:
    """Return the shape of a parameter. Raises ValueError where it is missing or has another number of axes."""
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"parameter {name} is missing; the file is incomplete")
    if len(shape) != axes or 0 in shape:
        raise ValueError(
            f"parameter {name} has shape {list(shape)}, expected {axes} axes of 1 or more; the file is damaged"
        )
    return shape


def taehv_shapes(config: TAEHVConfig) -> dict[str, Shape]:
    """Return every parameter of a TAEHV of this config; numbers in the names are places in its two lists of layers."""
    pixels, width, widths = config.image_channels * config.patch_size**2, config.encoder_width, config.decoder_widths
    shapes = _conv("encoder.0", width, pixels)
    index = 2  # behind the first convolution and its ReLU
    for pool in config.encoder_time:
        # The layer that merges frames stands there where it merges none, too; then the one that halves the sides.
        shapes[f"encoder.{index}.conv.weight"] = (width, width * (2 if pool else 1), 1, 1)
        shapes[f"encoder.{index + 1}.weight"] = (width, width, 3, 3)
        shapes |= _memory_blocks(f"encoder.{index + 2}", width)
        index += 2 + MEMORY_BLOCKS
    shapes |= _conv(f"encoder.{index}", config.latent_channels, width)

    shapes |= _conv("decoder.1", widths[0], config.latent_channels)
    index = 3  # behind the clamp, the first convolution and its ReLU
    for width, next_width, grow in zip(widths, widths[1:], config.decoder_time):  # the encoder's stages, backwards
        shapes |= _memory_blocks(f"decoder.{index}", width)
        index += MEMORY_BLOCKS + 1  # an upsampling layer without parameters follows the blocks
        shapes[f"decoder.{index}.conv.weight"] = (width * (2 if grow else 1), width, 1, 1)
        shapes[f"decoder.{index + 1}.weight"] = (next_width, width, 3, 3)
        index += 2
    return shapes | _conv(f"decoder.{index + 1}", pixels, widths[-1])  # behind a ReLU


def _conv(name: str, out_width: int, in_width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_width, in_width, 3, 3), f"{name}.bias": (out_width,)}


def _memory_blocks(first: str, width: int) -> dict[str, Shape]:
    half, index = first.split(".")
    shapes: dict[str, Shape] = {}
    for block in range(int(index), int(index) + MEMORY_BLOCKS):
        shapes |= _conv(f"{half}.{block}.conv.0", width, 2 * width)  # reads a frame and the one before it
        shapes |= _conv(f"{half}.{block}.conv.2", width, width) | _conv(f"{half}.{block}.conv.4", width, width)
    return shapes


def taehv_config(shapes: Shapes, *, decoder_space: tuple[bool, bool, bool] = (True, True, True)) -> TAEHVConfig:
    """Return the sizes of the TAEHV with these parameters.

    Shapes say everything but which stages enlarge the image (`decoder_space`: all, unless a header says otherwise).
    Raises ValueError where parameters are missing, or change the frame rate by another factor than 1 or 2.
    """
    encoder_width, pixels = _shape(shapes, "encoder.0.weight", 4)[:2]
    patch_size = math.isqrt(pixels // 3)  # of RGB; every released file has 3 colours
    # The places at which `taehv_shapes` puts the layers that merge and split frames, and those that set the widths.
    encoder_time = [_factor(shapes, f"encoder.{index}.conv.weight", axis=1) for index in (2, 7, 12)]
    decoder_time = [_factor(shapes, f"decoder.{index}.conv.weight", axis=0) for index in (7, 13, 19)]
    widths = [_shape(shapes, f"decoder.{index}.weight", 4)[0] for index in (1, 8, 14, 20)]
    return TAEHVConfig(
        latent_channels=_shape(shapes, "decoder.1.weight", 4)[1],
        image_channels=pixels // max(patch_size, 1) ** 2,
        encoder_width=encoder_width,
        decoder_widths=(widths[0], widths[1], widths[2], widths[3]),
        patch_size=max(patch_size, 1),
        encoder_time=(encoder_time[0], encoder_time[1], encoder_time[2]),
        decoder_time=(decoder_time[0], decoder_time[1], decoder_time[2]),
        decoder_space=decoder_space,
    )


def _factor(shapes: Shapes, name: str, *, axis: int) -> bool:
    """Return whether a layer that merges or splits frames does so by 2 (not by 1)."""
    shape = _shape(shapes, name, 4)
    factor = shape[axis] / shape[1 - axis]
    if factor not in (1, 2):
        raise ValueError(f"parameter {name} of shape {list(shape)} changes the frame rate by {factor:g}, not by 1 or 2")
    return factor == 2


def mismatch(expected: Shapes, shapes: Shapes) -> str | None:
    """Return one line that says how shapes differ from the expected ones, None where names and shapes are the same."""
    missing = [name for name in expected if name not in shapes]
    if missing:
        return f"{len(missing)} of {len(expected)} parameters are missing, the first is {missing[0]}"
    unknown = [name for name in shapes if name not in expected]
    if unknown:
        return f"{len(unknown)} parameters are unknown, the first is {unknown[0]}"
    name = next((name for name in expected if expected[name] != shapes[name]), None)
    if name is not None:
        return f"parameter {name} has shape {list(shapes[name])}, expected {list(expected[name])}"
    return None
