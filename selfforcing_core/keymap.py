"""Names of Wan parameters in the dialects that checkpoints speak, and back. Pure string rules, no tensors.

Inside this project a parameter has its original Wan name ("blocks.0.self_attn.q.weight"). Trainers and hosts wrap the
network, and each wrapper leaves a prefix or an infix in the name. Seen in the wild: Self Forcing (github.com/guandeh17/
Self-Forcing) saves "model.<name>"; its own EMA keeps FSDP's infixes and cannot be loaded back by its own loader.
"""

from __future__ import annotations

from collections.abc import Iterable

# Left behind by torch's FSDP, activation checkpointing and torch.compile, at any depth of a name.
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Longest first: "model." alone must not match what "model.diffusion_model." means.
DIALECT_PREFIXES = {
    "comfyui": "model.diffusion_model.",
    "comfyui-diffusion-model": "diffusion_model.",
    "self-forcing": "model.",
    "wan": "",
}
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
    """The dialect whose prefix `key` carries; "wan" when it carries none."""
    bare = strip_wrappers(key)
    return next(name for name, prefix in DIALECT_PREFIXES.items() if bare.startswith(prefix))


def to_wan(key: str) -> str:
    """The original Wan name of a parameter called `key` in any dialect."""
    return strip_wrappers(key).removeprefix(DIALECT_PREFIXES[dialect_of(key)])


def from_wan(name: str, dialect: str) -> str:
    """Inverse of `to_wan` for a dialect of DIALECT_PREFIXES. Raises ValueError for any other."""
    if dialect not in DIALECT_PREFIXES:
        raise ValueError(f"dialect {dialect!r} is unknown; use one of {', '.join(DIALECT_PREFIXES)}")
    return DIALECT_PREFIXES[dialect] + name


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
    """One word or two for people: the dialect of the first key, and whether wrapper infixes occur."""
    keys = [key for key in keys if not is_training_only(key)]
    dialect = dialect_of(keys[0]) if keys else "wan"
    return f"{dialect} with wrapper infixes" if any(strip_wrappers(key) != key for key in keys) else dialect
