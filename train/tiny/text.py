"""The tiny bundle's text encoder: a small UMT5 whose outputs say, in a linearly readable way, what a caption says.

    python -m train.tiny.text --out assets/tiny/text_encoder --seed 0

Captions of the tiny world (`train.tiny.world`) are drawn with random words left out and in several word orders; the
combinations held out from training are never drawn. Two linear readers are trained along with the encoder: every named
attribute, or that it is not named, from the mean of the rows; every word from its own row. The readers are thrown away.

Letters: B batch of captions, P text tokens, E text width.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selfforcing_core.codecs.text import TextEncoder
from selfforcing_core.codecs.umt5 import EPSILON, MAX_DISTANCE, umt5_from_wan_state_dict
from selfforcing_core.codecs.umt5_layout import NUM_BUCKETS, umt5_key_from_wan, wan_umt5_shapes
from selfforcing_core.generate.cli import Parser
from train.tiny.world import ATTRIBUTES, combinations, heldout

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5Config, UMT5EncoderModel

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as Wan's tokenizer has them
SPECIAL = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
FILLERS = ("a", "moving", "on", "background")
UNNAMED = "unnamed"  # what a reader has to say of an attribute that the caption leaves out
Words = tuple[str, ...]


@dataclass(frozen=True)
class TextTraining:
    """Sizes of the encoder and the recipe; probabilities are of a caption."""

    text_len: int = 16  # tokens; the longest caption has 12
    dim: int = 128
    ffn_dim: int = 128
    num_heads: int = 4
    num_layers: int = 2
    steps: int = 1000
    batch: int = 64  # captions
    lr: float = 2e-3
    # how often each attribute is unsaid: speed and background as captions of the videos leave them out
    leave_out: dict[str, float] = field(
        default_factory=lambda: {"colour": 0.1, "shape": 0.1, "direction": 0.1, "speed": 0.3, "background": 0.3}
    )
    empty: float = 0.03  # guidance conditions on the empty caption
    stranger: float = 0.1  # one word that the tokenizer does not know is put somewhere


def vocabulary() -> dict[str, int]:
    """Map words to token ids: the three special tokens, then every word of the world's captions."""
    words = [PAD, EOS, UNKNOWN, *FILLERS, *(word for values in ATTRIBUTES.values() for word in values)]
    return {word: index for index, word in enumerate(words)}


# ---------------------------------------------------------------- tokenizer --
def build_tokenizer() -> Tokenizer:
    """Build what turns whole words into ids: lower case, no punctuation, one id for unknown words, an end token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary()[EOS])]
    )
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    return tokenizer


def write_tokenizer(folder: Path, text_len: int) -> None:
    """Write tokenizer.json and its two companions, by hand because transformers 4 cannot read those of 5."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        **SPECIAL,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text_len,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", SPECIAL)


# ----------------------------------------------------------------- captions --
def phrase_caption(words: Words, mentions: list[bool], order: int) -> str:
    """Write a caption for five attribute words of which `mentions` says which are said, in one of four word orders.

    Order 0 is the world's own; bit 0 puts the speed before the direction, bit 1 the background first.
    """
    colour, shape, direction, speed, background = (word if said else "" for word, said in zip(words, mentions))
    thing = f"a {colour} {shape}" if colour or shape else ""
    manner = f"{speed} {direction}" if order & 1 else f"{direction} {speed}"
    motion = f"moving {manner}" if direction or speed else ""
    place = f"on a {background} background" if background else ""
    parts = (place, thing, motion) if order & 2 else (thing, motion, place)
    return " ".join(" ".join(parts).split())


def draw_caption(rng: random.Random, pool: list[Words], recipe: TextTraining) -> tuple[str, Words]:
    """Draw a random caption and what it says: a word, or `unnamed`, for each attribute."""
    words = rng.choice(pool)
    mentions = [rng.random() >= share for share in recipe.leave_out.values()]
    if rng.random() < recipe.empty:
        mentions = [False] * len(words)
    order = rng.choice((0, 0, 1, 2, 3))  # the world's own order twice as often
    caption = phrase_caption(words, mentions, order).split()
    if rng.random() < recipe.stranger:
        caption.insert(rng.randrange(len(caption) + 1), UNKNOWN)
    return " ".join(caption), tuple(word if said else UNNAMED for word, said in zip(words, mentions))


def classes(attribute: str) -> list[str]:
    """List what a caption can say about an attribute."""
    return [*ATTRIBUTES[attribute], UNNAMED]


def targets(said: list[Words]) -> Tensor:
    """Number what captions say: a class for each caption and attribute."""
    return torch.tensor([[classes(a).index(word) for a, word in zip(ATTRIBUTES, row)] for row in said])


# ----------------------------------------------------------------- training --
class Readers(nn.Module):
    """The linear readers: what each attribute is, from the mean row; which word a row belongs to, from that row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attribute = nn.ModuleList(nn.Linear(dim, len(classes(name))) for name in ATTRIBUTES)
        self.word = nn.Linear(dim, len(vocabulary()))

    def attributes(self, hidden_BPE: Tensor, mask_BP: Tensor) -> list[Tensor]:
        """Return the logits of every attribute's classes, read from the mean over the rows of real tokens."""
        # The mean and one linear layer: what they can read, the cross-attention of a small video model can, too.
        weight = mask_BP.unsqueeze(-1).to(hidden_BPE)
        mean_BE = (hidden_BPE * weight).sum(1) / weight.sum(1)
        return [reader(mean_BE) for reader in self.attribute]


def reading_loss(readers: Readers, hidden_BPE: Tensor, ids_BP: Tensor, mask_BP: Tensor, said: Tensor) -> Tensor:
    """Sum the cross-entropy of the attributes' readers and that of the words over real rows."""
    losses = [
        nn.functional.cross_entropy(logits, said[:, index])
        for index, logits in enumerate(readers.attributes(hidden_BPE, mask_BP))
    ]
    real = mask_BP.bool()
    losses.append(nn.functional.cross_entropy(readers.word(hidden_BPE[real]), ids_BP[real]))
    return torch.stack(losses).sum()


def umt5_config(*, vocab: int, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_layers: int) -> UMT5Config:
    """Return transformers' configuration of an encoder like Wan's, from sizes under Wan's names."""
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=dim_attn // num_heads,
        d_ff=dim_ffn,
        num_layers=num_layers,
        num_heads=num_heads,
        relative_attention_num_buckets=NUM_BUCKETS,
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",  # the tanh approximation, as in Wan's t5.py
        layer_norm_epsilon=EPSILON,
        pad_token_id=0,  # as in google/umt5-xxl's tokenizer
        eos_token_id=1,
    )


def build_encoder(recipe: TextTraining) -> UMT5EncoderModel:
    """Build a UMT5 encoder with random weights, of transformers, whose initial values suit its training.

    Its final norm's gain stays 1, so that every row has a root mean square of 1, whatever training does.
    """
    from transformers import UMT5EncoderModel

    config = umt5_config(
        vocab=len(vocabulary()),
        dim=recipe.dim,
        dim_attn=recipe.dim,
        dim_ffn=recipe.ffn_dim,
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
    )
    config.dropout_rate = 0.0
    model = UMT5EncoderModel(config)
    model.encoder.final_layer_norm.weight.requires_grad_(False)
    return model


def batches(tokenizer: Any, recipe: TextTraining, pool: list[Words], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield ids [B, P], mask [B, P] and classes of random captions, for ever."""
    rng = random.Random(seed)
    while True:
        captions, said = zip(*(draw_caption(rng, pool, recipe) for _ in range(recipe.batch)))
        batch = tokenizer(list(captions), padding="longest", return_tensors="pt")
        yield batch["input_ids"], batch["attention_mask"], targets(list(said))


def train_encoder(
    tokenizer: Any, recipe: TextTraining, pool: list[Words], seed: int
) -> tuple[UMT5EncoderModel, Readers]:
    """Train encoder and readers together, AdamW with a linear decay to zero; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model, readers = build_encoder(recipe), Readers(recipe.dim)
    parameters = [p for p in (*model.parameters(), *readers.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    # Fifty steps of warm-up, since AdamW's first steps are of full size in whatever direction.
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (1 - step / recipe.steps)
    )
    for step, (ids, mask, said) in zip(range(recipe.steps), batches(tokenizer, recipe, pool, seed)):
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        loss = reading_loss(readers, hidden, ids, mask, said)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        decay.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    return model.eval(), readers


# ------------------------------------------------------------------ writing --
def write_folder(model: UMT5EncoderModel, recipe: TextTraining, out: Path) -> None:
    """Write the encoder in float16 with its tokenizer under a temporary name, then move it to `out`."""
    from safetensors.torch import save_file

    folder = out.with_name(out.name + ".writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tokenizer(folder, recipe.text_len)
    model.config.architectures = ["UMT5EncoderModel"]
    model.config.tie_word_embeddings = True  # the one table of words is the encoder's, and stored once
    # transformers 4 reads torch_dtype, 5 reads dtype.
    _write_json(folder / "config.json", {**model.config.to_diff_dict(), "dtype": "float16", "torch_dtype": "float16"})
    tensors = {name: value.detach().half().contiguous() for name, value in model.named_parameters()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    shutil.rmtree(out, ignore_errors=True)
    os.replace(folder, out)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


# --------------------------------------------------------------- evaluation --
@torch.no_grad()
def read_captions(encoder: TextEncoder, readers: Readers, captions: list[str], said: list[Words]) -> dict[str, float]:
    """Return the share of captions whose attribute a reader tells from the saved encoder, and the share of words."""
    rows_BPE = encoder.encode(captions).float()
    batch = encoder.tokenizer(captions, padding="max_length", max_length=encoder.text_len, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    right = [
        (logits.argmax(-1) == targets(said)[:, index]).float().mean().item()
        for index, logits in enumerate(readers.attributes(rows_BPE, mask))
    ]
    real = mask.bool()
    word = (readers.word(rows_BPE[real]).argmax(-1) == ids[real]).float().mean().item()
    return {**{name: round(share, 4) for name, share in zip(ATTRIBUTES, right)}, "word": round(word, 4)}


def evaluation_sets(pool: list[Words]) -> dict[str, tuple[list[str], list[Words]]]:
    """Write captions of held-out combinations: in full, without speed, without background, background first."""
    variants = {
        "in full": ([True] * 5, 0),
        "without speed": ([True, True, True, False, True], 0),
        "without background": ([True, True, True, True, False], 0),
        "background first": ([True] * 5, 2),
    }
    sets = {}
    for name, (mentions, order) in variants.items():
        said = [tuple(word if n else UNNAMED for word, n in zip(words, mentions)) for words in pool]
        sets[name] = ([phrase_caption(words, mentions, order) for words in pool], said)
    sets["empty"] = ([""], [(UNNAMED,) * 5])
    return sets


def rounding_error(model: UMT5EncoderModel, saved: TextEncoder, captions: list[str]) -> float:
    """Return the relative error of the saved encoder's rows against the trained one's."""
    parameters = dict(model.named_parameters())
    sizes = dict.fromkeys(("vocab", "dim", "dim_attn", "dim_ffn", "num_heads"), 1)  # names do not depend on them
    names = wan_umt5_shapes(**sizes, num_layers=model.config.num_layers)
    weights = {name: parameters[umt5_key_from_wan(name)] for name in names}
    trained = TextEncoder(saved.tokenizer, umt5_from_wan_state_dict(weights), text_len=saved.text_len)
    exact = trained.encode(captions)
    return float((saved.encode(captions) - exact).norm() / exact.norm())


def report(model: UMT5EncoderModel, readers: Readers, folder: Path, pool: list[Words]) -> dict[str, Any]:
    """Report what the readers tell from the encoder as it was saved, its size, and what rounding to float16 cost."""
    saved = TextEncoder.from_folder(folder)
    sets = evaluation_sets(pool)
    return {
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "float16_relative_error": rounding_error(model, saved, sets["in full"][0]),
        "held_out_combinations": len(pool),
        "read_correctly": {name: read_captions(saved, readers, *captions) for name, captions in sets.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Train, write, load what was written, and print what the readers can tell from it as JSON."""
    from transformers import PreTrainedTokenizerFast

    parser = Parser(prog="python -m train.tiny.text", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/text_encoder"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TextTraining.steps)
    args = parser.parse_args(argv)
    recipe, left_out, start = TextTraining(steps=args.steps), heldout(), time.perf_counter()
    pool = sorted(set(combinations()) - set(left_out))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), **SPECIAL)
    model, readers = train_encoder(tokenizer, recipe, pool, args.seed)
    write_folder(model, recipe, args.out)
    summary = {"seed": args.seed, "steps": args.steps, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps({**summary, **report(model, readers, args.out, left_out)}, indent=1))


if __name__ == "__main__":
    main()
