"""What files of LoRA and their kin do to one weight, in the arithmetic of ComfyUI's loaders, float32.

LoRA (arXiv 2106.09685) adds a product of two thin matrices; LoHa (2108.06098) the elementwise product of two of these,
LoKr (2309.14859) a Kronecker product; GLoRA (2306.07967) adds one that depends on the weight itself; DoRA (2402.09353)
gives the sum of weight and any of them a length of its own for every row or column. All are scaled by alpha over rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Patch(Protocol):
    """What is done to one parameter."""

    @property
    def kind(self) -> str:
        """Return its name for people."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape that it is for; the axes of a kernel may count as one."""
        ...

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether it can be applied to a parameter of this shape."""
        ...

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return the float32 weight with it, which may be the same tensor, changed."""
        ...

    def part(self, index: int, count: int) -> Patch:
        """Return what is done to one of `count` equal parts of the rows. Raises ValueError where that is not known."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file that ComfyUI reads holds of it, by what stands behind the module's name."""
        ...


def _matrix_fits(own: tuple[int, ...], shape: Sequence[int]) -> bool:
    return len(shape) > 1 and own == (shape[0], math.prod(shape[1:]))


def _rows(tensor: Tensor, index: int, count: int) -> Tensor:
    if tensor.shape[0] % count:
        raise ValueError(f"its {tensor.shape[0]} rows are not {count} equal parts of a fused projection")
    return tensor.chunk(count)[index]


class Product:
    """A change that alpha over rank scales, and that is added to the weight unless a DoRA asks for it."""

    kind: str
    alpha: float

    @property
    def rank(self) -> int | None:
        """Return the rank by which alpha is divided; None where neither counts."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the rows and columns of the change."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """Return alpha over rank."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    def change(self, weight: Tensor) -> Tensor:
        """Return what is added to a weight of this shape at strength 1, before it is scaled; a new tensor."""
        raise NotImplementedError

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the change can be added to a weight of this shape."""
        return _matrix_fits(self.shape, shape)

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return the float32 weight with the change."""
        # In ComfyUI's order of products, so that its patched weights and these are bit-exact.
        return weight.add_(self.change(weight).mul_(strength * self.scale))

    def part(self, index: int, count: int) -> Patch:
        """Raise ValueError: rows of such a change are no change of the same kind."""
        raise ValueError(f"holds {self.kind} for a fused projection, whose parts cannot be told; merge it elsewhere")

    def tensors(self) -> dict[str, Tensor]:
        """Return its matrices by ComfyUI's names, with alpha."""
        alpha = {} if self.rank is None else {".alpha": torch.tensor(self.alpha, dtype=torch.float64)}
        return {**self.matrices(), **alpha}

    def matrices(self) -> dict[str, Tensor]:
        """Return its matrices by ComfyUI's names."""
        raise NotImplementedError


@dataclass(frozen=True)
class LowRank(Product):
    """LoRA: B A."""

    up: Tensor  # B, a row for each of the weight's rows
    down: Tensor  # A, a row for each rank
    alpha: float
    kind = "LoRA"

    @property
    def rank(self) -> int:
        """Return how many rows A has."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the product; the axes of a kernel count as one."""
        return self.up.shape[0], self.down[0].numel()

    def change(self, weight: Tensor) -> Tensor:
        """Return the product in the weight's shape."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(weight.shape)

    def part(self, index: int, count: int) -> LowRank:
        """Return the LoRA of one of `count` equal parts of the rows."""
        return replace(self, up=_rows(self.up, index, count))

    def matrices(self) -> dict[str, Tensor]:
        """Return B and A by ComfyUI's names."""
        return {".lora_up.weight": self.up, ".lora_down.weight": self.down}


@dataclass(frozen=True)
class Hadamard(Product):
    """LoHa: (A1 B1) times (A2 B2), element by element."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    alpha: float
    kind = "LoHa"

    @property
    def rank(self) -> int:
        """Return how many columns A1 has."""
        return self.first[1].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the product."""
        return self.first[0].shape[0], self.first[1].shape[1]

    def change(self, weight: Tensor) -> Tensor:
        """Return the product in the weight's shape."""
        one, other = (a.float() @ b.float() for a, b in (self.first, self.second))
        return one.mul_(other).reshape(weight.shape)

    def part(self, index: int, count: int) -> Hadamard:
        """Return the LoHa of one of `count` equal parts of the rows."""
        first, second = ((_rows(a, index, count), b) for a, b in (self.first, self.second))
        return replace(self, first=first, second=second)

    def matrices(self) -> dict[str, Tensor]:
        """Return the four matrices by ComfyUI's names."""
        names = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
        return dict(zip(names, (*self.first, *self.second)))


@dataclass(frozen=True)
class Kronecker(Product):
    """LoKr: the Kronecker product of two matrices, each whole or as a product of two."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    alpha: float
    kind = "LoKr"

    @property
    def rank(self) -> int | None:
        """Return the rank of the second matrix, or of the first where only that is a product; None for two whole ones.

        With two whole ones alpha counts for nothing, as in LyCORIS.
        """
        ranks = [factors[1].shape[0] for factors in (self.first, self.second) if len(factors) > 1]
        return ranks[-1] if ranks else None

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the product."""
        rows, columns = (self.first[0].shape[0] * self.second[0].shape[0], 1)
        for factors in (self.first, self.second):
            columns *= factors[-1].shape[1]
        return rows, columns

    def change(self, weight: Tensor) -> Tensor:
        """Return the product in the weight's shape."""
        one, other = (
            factors[0].float() if len(factors) == 1 else factors[0].float() @ factors[1].float()
            for factors in (self.first, self.second)
        )
        return torch.kron(one, other).reshape(weight.shape)

    def matrices(self) -> dict[str, Tensor]:
        """Return the matrices by ComfyUI's names."""
        named: dict[str, Tensor] = {}
        for name, factors in ((".lokr_w1", self.first), (".lokr_w2", self.second)):
            named |= {name: factors[0]} if len(factors) == 1 else {f"{name}_a": factors[0], f"{name}_b": factors[1]}
        return named


@dataclass(frozen=True)
class Generalised(Product):
    """GLoRA: W A1 A2 + B1 B2; or, in the order of older files, W A2 A1 + B2 B1."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float
    kind = "GLoRA"

    @property
    def is_older(self) -> bool:
        """Return whether the matrices are in the order of older files, which their shapes tell."""
        older = self.b2.shape[1] == self.b1.shape[0] == self.a1.shape[0] == self.a2.shape[1]
        newer = self.b2.shape[0] == self.b1.shape[1] == self.a1.shape[1] == self.a2.shape[0]
        # Both fit a square weight; then the shorter length is the rank.
        return older and (not newer or self.a2.shape[0] >= self.a2.shape[1])

    @property
    def rank(self) -> int:
        """Return the shared length of the matrices."""
        return self.a1.shape[0] if self.is_older else self.a2.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the weight."""
        left, right = (self.b2, self.b1) if self.is_older else (self.b1, self.b2)
        return left.shape[0], right.shape[1]

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the weight is a matrix of these sizes."""
        return self.shape == tuple(shape)

    def change(self, weight: Tensor) -> Tensor:
        """Return what is added to this weight."""
        a1, a2, b1, b2 = (tensor.float() for tensor in (self.a1, self.a2, self.b1, self.b2))
        return b2 @ b1 + weight @ a2 @ a1 if self.is_older else (weight @ a1 @ a2).add_(b1 @ b2)

    def matrices(self) -> dict[str, Tensor]:
        """Return the four matrices by ComfyUI's names."""
        return {".a1.weight": self.a1, ".a2.weight": self.a2, ".b1.weight": self.b1, ".b2.weight": self.b2}


@dataclass(frozen=True)
class Decomposed:
    """DoRA: weight and change together get the length that `magnitude` says, for each row or each column."""

    inner: Product
    magnitude: Tensor  # [rows, 1] or [1, columns]

    @property
    def kind(self) -> str:
        """Return its name, with that of the change where it is no plain LoRA."""
        return "DoRA" if isinstance(self.inner, LowRank) else f"DoRA of {self.inner.kind}"

    @property
    def rank(self) -> int | None:
        """Return the rank of the change."""
        return self.inner.rank

    @property
    def alpha(self) -> float:
        """Return alpha of the change."""
        return self.inner.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the change."""
        return self.inner.shape

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the weight is a matrix that both change and magnitude are for."""
        lengths = ((shape[0], 1), (1, shape[1])) if len(shape) == 2 else ()
        return self.inner.fits(shape) and tuple(self.magnitude.shape) in lengths

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return the float32 weight, as far towards its new lengths as the strength says."""
        total = weight + self.inner.change(weight).mul_(self.inner.scale)
        # Rows are measured before the change and columns behind it, as ComfyUI does it; the former is not the paper's.
        is_by_row = self.magnitude.shape[0] == weight.shape[0]
        lengths = weight.norm(dim=1, keepdim=True) if is_by_row else total.T.norm(dim=1, keepdim=True).T
        total *= self.magnitude.float() / (lengths + torch.finfo(torch.float32).eps)
        return total if strength == 1 else weight + strength * (total - weight)

    def part(self, index: int, count: int) -> Patch:
        """Return the DoRA of one of `count` equal parts of the rows, whose lengths are those of rows."""
        if self.magnitude.shape[0] == 1:
            raise ValueError("holds DoRA by columns for a fused projection, whose parts cannot be told")
        inner = self.inner.part(index, count)
        assert isinstance(inner, Product)
        return Decomposed(inner, _rows(self.magnitude, index, count))

    def tensors(self) -> dict[str, Tensor]:
        """Return the change's tensors and the magnitude by ComfyUI's name."""
        return {**self.inner.tensors(), ".dora_scale": self.magnitude}


@dataclass(frozen=True)
class Difference:
    """What is added to one parameter as it stands."""

    tensor: Tensor
    kind = "difference"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the parameter that it fits."""
        return tuple(self.tensor.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether it can be added to a parameter of this shape."""
        return self.shape == tuple(shape)

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return the float32 parameter with the difference."""
        return weight.add_(strength * self.tensor.float())

    def part(self, index: int, count: int) -> Difference:
        """Return the difference of one of `count` equal parts of the rows."""
        return Difference(_rows(self.tensor, index, count))

    def tensors(self) -> dict[str, Tensor]:
        """Return the difference by ComfyUI's name for that of a weight."""
        return {".diff": self.tensor}


@dataclass(frozen=True)
class Replacement:
    """What one weight becomes, whatever it was and at any strength but 0."""

    tensor: Tensor
    kind = "replacement"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return tuple(self.tensor.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the weight has this shape."""
        return self.shape == tuple(shape)

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return the weight that takes its place."""
        return weight.copy_(self.tensor)

    def part(self, index: int, count: int) -> Replacement:
        """Return what one of `count` equal parts of the rows becomes."""
        return Replacement(_rows(self.tensor, index, count))

    def tensors(self) -> dict[str, Tensor]:
        """Return the weight by ComfyUI's name."""
        return {".set_weight": self.tensor}
