"""What tests that look at every operator are made of."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class EveryOperator(TorchDispatchMode):
    """Sees every operator, by a `__torch_dispatch__` of its own."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled meanwhile, and torch's guard against it takes longer than most tests' look.
        return False
