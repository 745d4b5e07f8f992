"""Names of Wan parameters in the dialects that checkpoints speak, and back. Pure string rules, no tensors.

Inside this project a parameter has its original Wan name ("blocks.0.self_attn.q.weight"). Trainers and hosts wrap the
network, and each wrapper leaves a prefix or an infix in the name. Seen in the wild: Self Forcing (github.com/guandeh17/
Self-Forcing) saves "model.<name>"; its own EMA keeps FSDP's infixes and cannot be loaded back by its own loader.
diffusers (WanTransformer3DModel) has other names for the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Left behind by torch's FSDP, activation checkpointing and torch.compile, at any depth of a name.
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
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
DIFFUSERS_BLOCK = {
    **{
        f"{wan}.{ours}": f"{theirs}.{name}"
        for wan, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for ours, name in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}  # fmt: skip
# Beside the network, adversarial training keeps a classifier; generation does not need it.
TRAINING_ONLY_PREFIXES = ("_cls_pred_branch.", "_register_tokens", "_gan_ca_blocks.")
# The keys under which trainers put a network into a file, by what they hold.
EMA_CONTAINERS = ("generator_ema",)
RAW_CONTAINERS = ("generator", "model")


def strip_wrappers(key: str) -> str:
    """`key` without the infixes of FSDP, activation checkpointing and compilation, wherever they stand."""
    for infix in WRAPPER_INFIXES:
        key = key.replace(infix, "")
    return key


def dialect_of(key: str) -> str:
    """The dialect that `key` shows: by its prefix, or by diffusers' name of a module; "wan" when it shows none."""
    bare = strip_wrappers(key)
    name = next(name for name, prefix in DIALECT_PREFIXES.items() if bare.startswith(prefix))
    bare = bare.removeprefix(DIALECT_PREFIXES[name])
    return DIFFUSERS if _renamed(bare, *_FROM_DIFFUSERS) != bare else name


def to_wan(key: str) -> str:
    """The original Wan name of a parameter called `key` in any dialect."""
    bare = strip_wrappers(key)
    prefix = next(prefix for prefix in DIALECT_PREFIXES.values() if bare.startswith(prefix))
    return _renamed(bare.removeprefix(prefix), *_FROM_DIFFUSERS)


def from_wan(name: str, dialect: str) -> str:
    """Inverse of `to_wan` for a dialect of DIALECTS. Raises ValueError for any other."""
    if dialect == DIFFUSERS:
        return _renamed(name, DIFFUSERS_TOP, DIFFUSERS_BLOCK)
    if dialect not in DIALECT_PREFIXES:
        raise ValueError(f"dialect {dialect!r} is unknown; use one of {', '.join(DIALECTS)}")
    return DIALECT_PREFIXES[dialect] + name


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """`name` with its module's path replaced as one of the tables says."""
    head, path, table = "", name, top
    if name.startswith("blocks.") and name.count(".") >= 2:
        _, index, path = name.split(".", 2)
        head, table = f"blocks.{index}.", block
    if path in table:  # a parameter that belongs to no deeper module
        return head + table[path]
    module, _, leaf = path.rpartition(".")
    return f"{head}{table[module]}.{leaf}" if module in table else name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


_FROM_DIFFUSERS = _inverse(DIFFUSERS_TOP), _inverse(DIFFUSERS_BLOCK)


def is_training_only(key: str) -> bool:
    """Whether `key` belongs to a training-time companion of the network that no generation needs."""
    return strip_wrappers(key).startswith(TRAINING_ONLY_PREFIXES)


def wan_names(keys: Iterable[str]) -> dict[str, str]:
    """Original Wan name -> the key it has in the file, for every key that is not training-only.

    Raises ValueError when two keys mean the same parameter.
    """
    names: dict[str, str] = {}
    for key in keys:
        if is_training_only(key):
            continue
        name = to_wan(key)
        if name in names:
            raise ValueError(f"{names[name]} and {key} are both {name}; keep one of them")
        names[name] = key
    return names


def describe_dialect(keys: Iterable[str]) -> str:
    """One word or two for people: the dialect, and whether wrapper infixes occur."""
    keys = [key for key in keys if not is_training_only(key)]
    shown = {dialect_of(key) for key in keys}  # diffusers calls some parameters as Wan does
    dialect = DIFFUSERS if DIFFUSERS in shown else next(iter(shown), "wan")
    return f"{dialect} with wrapper infixes" if any(strip_wrappers(key) != key for key in keys) else dialect
