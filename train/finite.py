"""Whether all that a loss is made of is finite: noted on the device where it is computed, read once per update.

Outside the losses, because they put 0 in place of NaN as the reference does: a teacher that predicts NaN would teach
nothing, and neither loss nor gradient would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROWS, PROMPTS, IMAGES = "rows", "prompts", "images"
STUDENT, WINDOW, CRITIC, TEACHER = "student", "window", "critic", "teacher"  # roles, and a long clip's window
GUIDED = "guided"
# What holds NaN or Inf, in the order in which one makes the next hold it too; those of one line do not.
CAUSES = ((ROWS, PROMPTS), (IMAGES,), (STUDENT,), (WINDOW,), (CRITIC, TEACHER), (GUIDED,))
PARTS = tuple(part for cause in CAUSES for part in cause)
SAME = "the same command comes to the same numbers again"
WORDS = {  # what is said of each, and the remedy
    ROWS: (
        "a row of the database cannot be used",
        "python -m train.check_data lists all such rows, skip_bad_rows=true takes others in their place",
    ),
    PROMPTS: (
        "the embeddings of a prompt hold NaN or Inf",
        "check text_encoder=..., remove what is kept in embeddings=..., or leave the prompt out",
    ),
    IMAGES: ("what VAE and CLIP make of an image holds NaN or Inf", "check vae=... and clip=..."),
    STUDENT: (
        "the student's own prediction holds NaN or Inf",
        f"{SAME}: change lr or seed, and name it in resume_changed; in step 1, check the student's file",
    ),
    WINDOW: ("the VAE's first latent of a long clip's end holds NaN or Inf", "check vae=..."),
    CRITIC: (
        "the critic's prediction holds NaN or Inf",
        f"{SAME}: change lr_critic or seed, and name it in resume_changed; in step 1, check the critic's file",
    ),
    GUIDED: ("a guided prediction holds NaN or Inf", "use a smaller guidance or guidance_critic"),
    TEACHER: (
        "the teacher's prediction holds NaN or Inf",
        f"{SAME}: check the teacher's file, or use another dtype and name it in resume_changed",
    ),
}


class FiniteCheck:
    """What was noted since `clear`."""

    def __init__(self) -> None:
        self.flags: dict[str, Tensor] = {}  # of each part, on its device: whether it held NaN or Inf
        self.reasons: dict[str, list[str]] = {}  # what a process knows beyond the part's name, in words

    def clear(self) -> None:
        self.flags, self.reasons = {}, {}

    def see(self, part: str, *tensors: Tensor | None) -> None:
        """Note whether a part's tensors hold NaN or Inf. Waits for no device, and makes no tensor of their size."""
        for tensor in tensors:
            if tensor is not None:
                # A NaN is both the smallest and the largest element, so two numbers tell of all.
                flag = torch.stack(tensor.detach().aminmax()).isfinite().logical_not().any()
                self.flags[part] = flag | self.flags[part] if part in self.flags else flag

    def note(self, part: str, reason: str, *, device: torch.device) -> None:
        """Note that a part is bad, which was found without looking at the device."""
        self.flags[part] = torch.ones((), dtype=torch.bool, device=device)
        self.reasons.setdefault(part, []).append(reason)

    def watch(self, part: str, network: Any) -> Any:
        """Return a network that is called like this one and whose predictions are noted."""

        def call(*args: Any, **options: Any) -> Tensor:
            prediction = network(*args, **options)
            self.see(part, prediction)
            return prediction

        return call

    def counts(self, device: torch.device) -> Tensor:
        """Return one number for each of PARTS: 1 if it is bad in this process."""
        fine = torch.zeros((), dtype=torch.bool, device=device)
        return torch.stack([self.flags.get(part, fine) for part in PARTS]).double()


def causes(counts: Sequence[float]) -> list[str]:
    """Return the bad parts, by `counts` over all processes, that no other one made bad."""
    bad = {part for part, count in zip(PARTS, counts, strict=True) if count}
    return next(([part for part in cause if part in bad] for cause in CAUSES if bad.intersection(cause)), [])
