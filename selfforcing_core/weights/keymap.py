"""Names of Wan's parameters in the dialects of checkpoints, and back. Rules on strings, no tensors.

Inside this project a parameter has its original Wan name ("blocks.0.self_attn.q.weight"). Trainers and ComfyUI wrap the
network, and each wrapper leaves a prefix or an infix in the name. Self Forcing (github.com/guandeh17/Self-Forcing)
saves "model.<name>"; its average keeps FSDP's infixes, which its own loader cannot read back. diffusers
(WanTransformer3DModel) has other names for the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Left behind by torch's FSDP, activation checkpointing, torch.compile and DDP, at any depth of a name.
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
# Prefixes that mean a dialect, longest first: "model." alone must not match what "model.diffusion_model." means. The
# last one is empty and matches every name.
DIALECT_PREFIXES = {
    "comfyui": "model.diffusion_model.",
    "comfyui-diffusion-model": "diffusion_model.",
    "self-forcing": "model.",
    "wan": "",
}
DIFFUSERS = "diffusers"
DIALECTS = (*DIALECT_PREFIXES, DIFFUSERS)
# Modules by their Wan path and by diffusers' path; whatever is not listed is called the same.
DIFFUSERS_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
# Inside a block; diffusers' to_out is a list of a linear layer and a dropout.
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
DIFFUSERS_BLOCK = {
    **{
        f"{attention}.{wan}": f"{_ATTENTIONS[attention]}.{diffusers}"
        for attention in _ATTENTIONS
        for wan, diffusers in _PROJECTIONS.items()
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the only layer norm of a block that has weights: modulation scales and shifts the others
    "ffn.0": "ffn.net.0.proj",  # diffusers keeps the linear layer inside its activation
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
# FastVideo's names of the feed-forward layers, which some exports in diffusers' layout kept; read, never written.
FASTVIDEO_BLOCK = {"ffn.fc_in": "ffn.0", "ffn.fc_out": "ffn.2"}
# Attention and projection whose rows are those of several projections below each other -> the projections.
FUSED = {
    ("self_attn", "qkv"): ("q", "k", "v"),
    ("self_attn", "to_qkv"): ("q", "k", "v"),
    ("cross_attn", "kv"): ("k", "v"),
    ("cross_attn", "to_kv"): ("k", "v"),
    # what diffusers' fuse_qkv_projections makes
    ("attn1", "to_qkv"): ("to_q", "to_k", "to_v"),
    ("attn2", "to_kv"): ("to_k", "to_v"),
    ("attn2", "to_added_kv"): ("add_k_proj", "add_v_proj"),
}
# Beside the network, Self Forcing's adversarial training keeps a classifier of the critic's features.
TRAINING_ONLY_PREFIXES = ("_cls_pred_branch.", "_register_tokens", "_gan_ca_blocks.")
# Tables of the rotary embedding, Wan's and diffusers'. Every network computes them; some trainers save them as well.
STRAY_BUFFERS = ("freqs", "rope.freqs", "rope.freqs_cos", "rope.freqs_sin")
# The keys under which trainers put a network into a file. The first of each is Self Forcing's, and is what is written.
EMA_CONTAINERS = ("generator_ema", "ema", "ema_state_dict", "model_ema", "ema_model")
RAW_CONTAINERS = ("generator", "model", "module", "state_dict", "model_state_dict")
LORA_CONTAINERS = ("generator_lora",)
CONTAINERS = frozenset((*EMA_CONTAINERS, *RAW_CONTAINERS, *LORA_CONTAINERS))
# Those of them that also stand before the names, where a file of one level holds several networks (Lightning).
PREFIX_CONTAINERS = ("generator", *EMA_CONTAINERS, *LORA_CONTAINERS)
# Before a module's name in a LoRA: PEFT's, diffusers' and ComfyUI's. kohya's trainers and their kin write the path
# behind theirs with underscores in place of points.
LORA_PREFIXES = ("base_model.model.", "transformer.", "unet.", *filter(None, DIALECT_PREFIXES.values()))
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")


def strip_wrappers(key: str) -> str:
    """Return a key without the infixes of FSDP, activation checkpointing, compilation and DDP, wherever they stand."""
    if not any(infix in key for infix in WRAPPER_INFIXES):
        return key
    # Part by part: as a substring, "module." would also cut the end of "my_module.".
    return ".".join(part for part in key.split(".") if f"{part}." not in WRAPPER_INFIXES)


def split_container(key: str) -> tuple[str, str]:
    """Return the container of PREFIX_CONTAINERS that stands before a name, or "", and the name without it."""
    head, _, name = strip_wrappers(key).partition(".")
    return (head, name) if head in PREFIX_CONTAINERS else ("", key)


def dialect_of(key: str) -> str:
    """Return the dialect that a key shows, by its prefix or diffusers' name of a module; "wan" when it shows none."""
    bare_key = strip_wrappers(key)
    dialect = next(name for name, prefix in DIALECT_PREFIXES.items() if bare_key.startswith(prefix))
    name = bare_key.removeprefix(DIALECT_PREFIXES[dialect])
    return DIFFUSERS if _renamed(name, *_FROM_DIFFUSERS) != name else dialect


def to_wan(key: str) -> str:
    """Return the original Wan name of a parameter called `key` in any dialect."""
    name = strip_wrappers(key)
    while prefix := next(prefix for prefix in DIALECT_PREFIXES.values() if name.startswith(prefix)):
        name = name.removeprefix(prefix)  # more than one where wrappers are nested: model.model.
    return _renamed(name, *_FROM_DIFFUSERS)


def from_wan(name: str, dialect: str) -> str:
    """Return what one of DIALECTS calls a parameter of this original name. Raises ValueError for another dialect."""
    if dialect == DIFFUSERS:
        return _renamed(name, DIFFUSERS_TOP, DIFFUSERS_BLOCK)
    if dialect not in DIALECT_PREFIXES:
        raise ValueError(f"dialect {dialect!r} is unknown; use one of {', '.join(DIALECTS)}")
    return DIALECT_PREFIXES[dialect] + name


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Return a name with its module's path replaced: by `block` behind "blocks.N.", else by `top`."""
    head, path, table = "", name, top
    if name.startswith("blocks.") and name.count(".") >= 2:
        _, index, path = name.split(".", 2)
        head, table = f"blocks.{index}.", block
    if path in table:  # a parameter of the block itself: modulation
        return head + table[path]
    module, _, leaf = path.rpartition(".")
    return f"{head}{table[module]}.{leaf}" if module in table else name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {diffusers: wan for wan, diffusers in table.items()}


_FROM_DIFFUSERS = _inverse(DIFFUSERS_TOP), _inverse(DIFFUSERS_BLOCK) | FASTVIDEO_BLOCK


def fused_parts(key: str) -> tuple[str, ...]:
    """Return the names of the parameters whose rows the one called `key` holds, from the first; () where it is one."""
    module, _, leaf = strip_wrappers(key).rpartition(".")
    attention, _, projection = module.rpartition(".")
    parts = FUSED.get((attention.rpartition(".")[2], projection), ())
    return tuple(f"{attention}.{part}.{leaf}" for part in parts)


def lora_module(key: str) -> str:
    """Return Wan's path of the module that a LoRA calls `key`; of a name in no known dialect, what is left of it."""
    name = strip_wrappers(key)
    if prefix := next((prefix for prefix in FLAT_PREFIXES if name.startswith(prefix)), None):
        name = _with_points(name.removeprefix(prefix))
    while prefix := next((prefix for prefix in LORA_PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return to_wan(f"{name}.weight").removesuffix(".weight")


def _with_points(flat: str) -> str:
    """Return a module's path that was written with underscores, in either dialect; unknown ones as they are."""
    words, top, block = flat.split("_", 2), DIFFUSERS_TOP, DIFFUSERS_BLOCK
    is_block = len(words) == 3 and words[0] == "blocks" and words[1].isdecimal()
    head, path, table = (f"blocks.{words[1]}.", words[2], block) if is_block else ("", flat, top)
    known = (*table, *table.values(), "patch_embedding", *map(".".join, FUSED))
    return head + next((name for name in known if name.replace(".", "_") == path), path)


def is_training_only(key: str) -> bool:
    """Return whether a key belongs to a training-time companion of the network that no generation needs."""
    return strip_wrappers(key).startswith(TRAINING_ONLY_PREFIXES)


def stray_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys of tables that some trainers save beside the weights and every network computes itself."""
    return sorted(key for key in keys if to_wan(key) in STRAY_BUFFERS)


def bare_names(keys: Iterable[str]) -> list[str]:
    """Return the original Wan name of each key, without the containers that stand before it."""
    names = []
    for key in keys:
        name = strip_wrappers(key)
        while name.partition(".")[0] in CONTAINERS and "." in name:
            name = name.partition(".")[2]
        names.append(to_wan(name))
    return names


def wan_names(keys: Iterable[str]) -> dict[str, str]:
    """Map original Wan names to the file's keys, but for what only training needs and stray tables.

    Raises ValueError when two keys mean the same parameter.
    """
    names: dict[str, str] = {}
    for key in keys:
        name = to_wan(key)
        if is_training_only(key) or name in STRAY_BUFFERS:
            continue
        if name in names:
            raise ValueError(f"{names[name]} and {key} are both {name}; keep one of them")
        names[name] = key
    return names


def prefix_before(keys: Iterable[str], anchors: Iterable[str]) -> str | None:
    """Return what stands before one of the `anchors` in a file's keys, None where none of them is there.

    For text encoder, image encoder and VAE, whose files differ in the prefix alone. Raises ValueError for two prefixes.
    """
    endings = tuple(anchors)
    prefixes = {
        key[: -len(ending)] for key in keys for ending in endings if key == ending or key.endswith(f".{ending}")
    }
    if len(prefixes) > 1:
        names = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        raise ValueError(f"holds more than one such network, below {names}; save the one that you mean alone")
    return next(iter(prefixes), None)


def describe_dialect(keys: Iterable[str]) -> str:
    """Return the dialect in words for people, and whether wrapper infixes occur."""
    keys = [key for key in keys if not is_training_only(key)]
    dialects = {dialect_of(key) for key in keys}
    # One name of diffusers decides: it calls some parameters as Wan does.
    dialect = DIFFUSERS if DIFFUSERS in dialects else next(iter(dialects), "wan")
    return f"{dialect} with wrapper infixes" if any(strip_wrappers(key) != key for key in keys) else dialect
