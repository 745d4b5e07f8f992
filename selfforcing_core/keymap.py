"""Names of Wan parameters in the dialects that checkpoints speak, and back. Pure string rules, no tensors.

Inside this project a parameter has its original Wan name ("blocks.0.self_attn.q.weight"). Trainers and hosts wrap the
network, and each wrapper leaves a prefix or an infix in the name. Self Forcing (github.com/guandeh17/
Self-Forcing) saves "model.<name>"; its own EMA keeps FSDP's infixes and cannot be loaded back by its own loader.
diffusers (WanTransformer3DModel) has other names for the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Left behind by torch's FSDP, activation checkpointing, torch.compile and DDP, at any depth of a name.
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
# Longest first: "model." alone must not match what "model.diffusion_model." means.
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
    "norm3": "norm2",  # the only layer norm of a block that has weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
# Beside the network, adversarial training keeps a classifier; generation does not need it.
TRAINING_ONLY_PREFIXES = ("_cls_pred_branch.", "_register_tokens", "_gan_ca_blocks.")
# Tables that a network computes and some trainers save: Wan's turns of the rotary embedding, diffusers' too.
STRAY_BUFFERS = ("freqs", "rope.freqs", "rope.freqs_cos", "rope.freqs_sin")
# The keys under which trainers put a network into a file, by what they hold. The first of each is what is written.
EMA_CONTAINERS = ("generator_ema", "ema", "ema_state_dict", "model_ema", "ema_model")
RAW_CONTAINERS = ("generator", "model", "module", "state_dict", "model_state_dict")
LORA_CONTAINERS = ("generator_lora",)
# Those of them that also stand before the names, where a file of one level holds several networks (Lightning).
PREFIX_CONTAINERS = ("generator", *EMA_CONTAINERS, *LORA_CONTAINERS)


def strip_wrappers(key: str) -> str:
    """Return a key without the infixes of FSDP, activation checkpointing, compilation and DDP, wherever they stand."""
    if not any(infix in key for infix in WRAPPER_INFIXES):
        return key
    return ".".join(part for part in key.split(".") if f"{part}." not in WRAPPER_INFIXES)


def split_container(key: str) -> tuple[str, str]:
    """Return the container of PREFIX_CONTAINERS that stands before a name, or "", and the name without it."""
    head, _, name = strip_wrappers(key).partition(".")
    return (head, name) if head in PREFIX_CONTAINERS else ("", key)


def dialect_of(key: str) -> str:
    """Return the dialect that a key shows, by its prefix or diffusers' name of a module; "wan" when it shows none."""
    bare = strip_wrappers(key)
    name = next(name for name, prefix in DIALECT_PREFIXES.items() if bare.startswith(prefix))
    bare = bare.removeprefix(DIALECT_PREFIXES[name])
    return DIFFUSERS if _renamed(bare, *_FROM_DIFFUSERS) != bare else name


def to_wan(key: str) -> str:
    """Return the original Wan name of a parameter called `key` in any dialect."""
    bare = strip_wrappers(key)
    while prefix := next(prefix for prefix in DIALECT_PREFIXES.values() if bare.startswith(prefix)):
        bare = bare.removeprefix(prefix)  # more than one: a network inside a network, model.model.
    return _renamed(bare, *_FROM_DIFFUSERS)


def from_wan(name: str, dialect: str) -> str:
    """Return what a dialect of DIALECTS calls a parameter of Wan. Raises ValueError for any other dialect."""
    if dialect == DIFFUSERS:
        return _renamed(name, DIFFUSERS_TOP, DIFFUSERS_BLOCK)
    if dialect not in DIALECT_PREFIXES:
        raise ValueError(f"dialect {dialect!r} is unknown; use one of {', '.join(DIALECTS)}")
    return DIALECT_PREFIXES[dialect] + name


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Return a name with its module's path replaced as one of the tables says."""
    head, path, table = "", name, top
    if name.startswith("blocks.") and name.count(".") >= 2:
        _, index, path = name.split(".", 2)
        head, table = f"blocks.{index}.", block
    if path in table:  # a parameter that belongs to no deeper module
        return head + table[path]
    module, _, leaf = path.rpartition(".")
    return f"{head}{table[module]}.{leaf}" if module in table else name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {diffusers: wan for wan, diffusers in table.items()}


_FROM_DIFFUSERS = _inverse(DIFFUSERS_TOP), _inverse(DIFFUSERS_BLOCK)


def is_training_only(key: str) -> bool:
    """Return whether a key belongs to a training-time companion of the network that no generation needs."""
    return strip_wrappers(key).startswith(TRAINING_ONLY_PREFIXES)


def stray_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys of tables that some trainers save beside the weights and every network computes itself."""
    return sorted(key for key in keys if to_wan(key) in STRAY_BUFFERS)


def wan_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the file's keys by their original Wan names, but for those that are training-only or stray.

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
    """Return what stands before one of these names in a file that holds other things too, None where none of them is.

    For the networks beside the transformer, whose files differ in nothing else. Raises ValueError for two of them.
    """
    ends = tuple(anchors)
    prefixes = {key[: -len(end)] for key in keys for end in ends if key == end or key.endswith(f".{end}")}
    if len(prefixes) > 1:
        names = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        raise ValueError(f"holds more than one such network, below {names}; save the one that is meant alone")
    return next(iter(prefixes), None)


def describe_dialect(keys: Iterable[str]) -> str:
    """Return the dialect in a word or two for people, and whether wrapper infixes occur."""
    keys = [key for key in keys if not is_training_only(key)]
    dialects = {dialect_of(key) for key in keys}  # diffusers calls some parameters as Wan does
    dialect = DIFFUSERS if DIFFUSERS in dialects else next(iter(dialects), "wan")
    return f"{dialect} with wrapper infixes" if any(strip_wrappers(key) != key for key in keys) else dialect
