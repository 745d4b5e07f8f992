"""What an update of a role computes and moves at least, and what share of that limit it reached.

Closed forms on those of `selfforcing_core.roofline.work`, whose groups and words these are. Counted are the operators
that run: attention under a mask computes the whole square. Not counted: the time embedding, the discriminator's heads,
text encoder and VAE, adapters' traffic, what sharding copies and sends, and the average.

Letters: T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from selfforcing_core.config import NETWORK_SIZES, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, chunk_lengths, tokens_per_frame
from selfforcing_core.roofline.device import Card
from selfforcing_core.roofline.work import MOVES, Work, pass_work, prompt_flops
from selfforcing_core.shapes import wan_shapes
from train.args import ClipArgs, DiffusionArgs, DmdArgs, TrainArgs
from train.networks import wide

# As roofline.MOVES, of a block's backward pass: norm and modulation 4 (with the residual's gradient), norms and rotary
# embedding of queries and keys 6, gate 2, norm 4, norm of the cross queries 3, norm and modulation 4, gate 2.
BACKWARD_MOVES = 25
# Reads and writes of each trained number in a step: the gradients' norm 1, AdamW 7 (weight, two moments, gradient).
OPTIMISER_MOVES = 8


def config_of(size: str) -> WanConfig:
    """Return the sizes of a network by their name. Raises ValueError for an unknown one."""
    if size not in NETWORK_SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(NETWORK_SIZES)}")
    return NETWORK_SIZES[size]


def sizes_of(args: TrainArgs) -> dict[str, str]:
    """Return the name of the sizes of each role's network."""
    if not isinstance(args, DmdArgs):
        return {"student": args.size}
    teacher = args.teacher_size or args.size
    sizes = {
        "student": args.size,
        "teacher": teacher,
        "critic": args.critic_size or (args.size if args.critic else teacher),
    }
    if args.score == "gan":
        del sizes["teacher"]
    return sizes


def latent_shape(args: DmdArgs | ClipArgs, config: WanConfig) -> tuple[int, int, int, int]:
    """Return the clips' latent frames, latent channels, height and width."""
    return args.latent_frames, config.out_dim, args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR


def sizes_in_bytes(args: TrainArgs) -> tuple[int, int]:
    """Return the bytes of a number that is trained, and of one that is computed with."""
    return wide(args).itemsize, getattr(torch, args.dtype).itemsize


def parameters(config: WanConfig) -> int:
    """Count the numbers in a network."""
    return sum(math.prod(shape) for shape in wan_shapes(config).values())


def trained_parameters(args: TrainArgs, config: WanConfig) -> int:
    """Count the numbers of a role that an optimiser changes: the network's, or those of its adapters."""
    if not args.lora_rank:
        return parameters(config)
    matrices = (
        shape
        for name, shape in wan_shapes(config).items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    )
    return sum(args.lora_rank * sum(shape) for shape in matrices)  # down [rank, inputs] and up [outputs, rank]


# ------------------------------------------------------------------- passes --
@dataclass(frozen=True)
class Network:
    """Passes of one network over the `micro_batch` clips of a part.

    Both products of a linear layer's backward pass (with its weights and with its inputs) do the arithmetic of the
    forward one and move as much; likewise attention, whose backward pass is twice its forward one in both.
    """

    args: TrainArgs
    config: WanConfig
    is_trained: bool = True  # it has gradients, and adapters if any

    @property
    def rank(self) -> int:
        return self.args.lora_rank if self.is_trained else 0

    def forward(self, num_tokens: int, num_visible: int, *, has_prompt: bool = True) -> Work:
        """Count a pass. has_prompt: with the prompt's embedding, keys and values."""
        return self._own(num_tokens, num_visible) + self._adapters(num_tokens) + self.prompt() * has_prompt

    def backward(self, num_tokens: int, num_visible: int, *, evicts: bool = False) -> Work:
        """Count the way back to the pass's inputs and to what is trained; where activations are not kept, with a pass
        that computes them again.

        evicts: a cache forgot frames that the pass saw, so that what attention needs is kept all the same.
        """
        # The product with the inputs is needed for the weights' gradient alone; frozen ones have none.
        own, all_weights = self._own(num_tokens, num_visible), int(self.is_trained and not self.rank)
        work = self._adapters(num_tokens) * 2 + self.prompt() * (2 * all_weights)
        work += Work(
            (1 + all_weights) * own.linear_flops,
            (1 + all_weights) * own.linear_bytes,
            2 * own.attention_flops,
            2 * own.attention_bytes,
            own.elementwise_bytes * BACKWARD_MOVES / MOVES,
        )
        # Activation checkpointing repeats the pass. Where a cache evicted, attention's inputs were kept.
        recomputed = self.forward(num_tokens, 0 if evicts else num_visible, has_prompt=not evicts)
        return work + recomputed * self.args.activation_checkpointing

    def prompt(self) -> Work:
        """Count the prompt's embedding, and its keys and values in every layer."""
        D, layers, text = self.config.dim, self.config.num_layers, self.config.text_dim
        weights = (text + D) * D + 2 * D * D * layers
        return Work(self.args.micro_batch * prompt_flops(self.config), weights * sizes_in_bytes(self.args)[1])

    def _own(self, num_tokens: int, num_visible: int) -> Work:
        narrow = sizes_in_bytes(self.args)[1]
        return pass_work(
            self.config,
            num_tokens,
            num_visible,
            batch=self.args.micro_batch,
            weight_bytes=narrow,
            cache_bytes=narrow,
            activation_bytes=narrow,
        )

    def _adapters(self, num_tokens: int) -> Work:
        D, rows = self.config.dim, self.args.micro_batch * num_tokens
        # An adapter multiplies by inputs + outputs: 2 D each for self-attention's four and cross-attention's q and o
        # (its k and v have few tokens), D + ffn_dim for either one of the feed-forward layer.
        return Work(2 * rows * self.config.num_layers * self.rank * (14 * D + 2 * self.config.ffn_dim))

    def update(self, part: Work, copies: int) -> Work:
        """Count an update of this network: all parts of a batch, and the optimiser's step on every copy."""
        optimiser_bytes = (
            OPTIMISER_MOVES * copies * trained_parameters(self.args, self.config) * sizes_in_bytes(self.args)[0]
        )
        return part * (self.args.batch_size / self.args.micro_batch) + Work(elementwise_bytes=optimiser_bytes)


def copies_of(args: TrainArgs, processes: int) -> int:
    """Return how many copies of the weights there are, each sharded over processes of its own."""
    return processes // (args.shard_group or processes)


# ------------------------------------------------------------------ updates --
def distillation_work(
    args: DmdArgs,
    role: str,
    configs: Mapping[str, WanConfig],
    evaluations: Sequence[float] | None = None,
    *,
    copies: int = 1,
) -> Work:
    """Count one update of student or critic on a whole batch, by all processes together.

    evaluations: of each chunk of the rollout; None: their mean over what a run draws, lengths included. configs: of
    student, critic and, except for score=gan, teacher.
    """
    if evaluations is None:
        chunk = args.chunk or args.latent_frames
        lengths = chunk_lengths(args.latent_frames, chunk, independent_first_frame=args.independent_first_frame)
        fewest = len(lengths) - (args.first_frame != "generated")
        counts = range(fewest, fewest + max(0, args.max_latent_frames - args.latent_frames) // chunk + 1)
        # Exits are drawn evenly from the first to the last step.
        first, evaluated = (
            len(steps) if args.last_step_only else (len(steps) + 1) / 2
            for steps in (args.first_chunk_steps or args.steps, args.steps)
        )
        rollouts = ([first] + [evaluated] * (count - 1) for count in counts)
        total = sum((distillation_work(args, role, configs, each, copies=copies) for each in rollouts), Work())
        return total * (1 / len(counts))
    student, critic = Network(args, configs["student"]), Network(args, configs["critic"])
    whole = args.latent_frames * _tokens(args.width, args.height)
    critic_forward, critic_backward = critic.forward(whole, whole), critic.backward(whole, whole)
    work = _rollout(student, args, evaluations, with_gradient=role == "student")
    if role == "critic":
        # Real and generated clips, and for each penalty one of them with a little noise.
        compared = 2 + bool(args.gan_r1) + bool(args.gan_r2) if args.score == "gan" else 1
        return critic.update(work + (critic_forward + critic_backward) * compared, copies)
    # The student's loss: how critic and teacher score its clip.
    scored = critic_forward
    if args.score != "dmd":  # the scores carry gradient to the clip, and leave some in the critic
        scored += critic_backward
    work += scored * (1 + (args.guidance_critic != 1 and args.score != "gan"))
    if args.score == "gan":
        work += critic_forward * args.gan_relativistic
    else:
        teacher = Network(args, configs["teacher"], is_trained=False)
        scored = teacher.forward(whole, whole)
        if args.score == "sid":
            scored += teacher.backward(whole, whole)
        work += scored * (1 + (args.guidance != 1))  # guidance takes a second pass, with the negative prompt
    return student.update(work, copies)


def _rollout(student: Network, args: DmdArgs, evaluations: Sequence[float], *, with_gradient: bool) -> Work:
    """Count a rollout chunk by chunk: its evaluations, and a clean pass where another chunk follows.

    The last evaluation carries gradient in the frames that are judged. A given first frame has the clean pass alone.
    Without gradient, a cache knows the prompt after its first pass.
    """
    length, per_frame = args.chunk or args.latent_frames, _tokens(args.width, args.height)
    evaluations = [0] * (args.first_frame != "generated") + list(evaluations)
    lengths = [1 if args.independent_first_frame else length] + [length] * (len(evaluations) - 1)
    past, frames = 0, sum(lengths)
    # A single chunk needs no cache: nothing follows it.
    is_cached, evicts = len(lengths) > 1, -1 < args.window < frames
    work = student.prompt() * is_cached
    for length, count in zip(lengths, evaluations):
        start, past = past, past + length
        size = length * per_frame, (min(past, args.window) if evicts else past) * per_frame
        work += student.forward(*size, has_prompt=not is_cached) * (count + (past < frames))
        if with_gradient and count and start >= frames - args.latent_frames:
            work += student.backward(*size, evicts=evicts) + student.prompt() * is_cached
    return work


def clip_work(args: ClipArgs, config: WanConfig, latent_shape: Sequence[int], *, copies: int = 1) -> Work:
    """Count one update on a whole batch of clips [T, C, H, W], by all processes together.

    Each clip is seen at once, with its clean copy in front of it for teacher forcing.
    """
    frames, _, height, width = latent_shape
    is_doubled = isinstance(args, DiffusionArgs) and args.forcing == "teacher"
    whole = frames * (1 + is_doubled) * tokens_per_frame(height, width)
    network = Network(args, config)
    return network.update(network.forward(whole, whole) + network.backward(whole, whole), copies)


def _tokens(width: int, height: int) -> int:
    return tokens_per_frame(height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)


# -------------------------------------------------------------------- meter --
def reached(work: Work, card: Card, seconds: float) -> dict[str, float]:
    """Return what share of the limit of `card` was reached by work that took `seconds`, and their division by group."""
    shares = {f"time_by_group/{name}": floor / seconds for name, floor in work.seconds(card).items() if floor}
    share = sum(shares.values())
    return {**shares, "time_by_group/above_limit": 1 - share, "share_of_limit": share}
