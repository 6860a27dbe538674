"""Muon: an optimizer that turns the step of each weight matrix into an orthogonal one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a s + b s^3 + c s^5 that drives singular values s in (0, 1] towards 1 in few iterations."""


def orthogonalized(
    matrix: Float[Tensor, "rows columns"], iterations: int = 5
) -> Float[Tensor, "rows columns"]:
    """Return U S' V^T for a matrix U S V^T, with all of S' near 1 (from 0.7 to 1.2), by Newton-Schulz iterations.

    One iteration is X <- (a + b X X^T + c (X X^T)^2) X. The polynomials are gathered on the smaller side's Gram
    matrix, and the matrix itself is multiplied once, at the end.
    """
    a, b, c = COEFFICIENTS
    X = matrix.float()
    X = X.mT if X.shape[0] > X.shape[1] else X
    X = X / (X.norm() + 1e-7)
    gram = X @ X.mT
    product = torch.eye(len(gram), device=X.device)
    for _ in range(iterations):
        step = b * gram + c * gram @ gram
        step.diagonal().add_(a)
        product = step @ product
        gram = step @ gram @ step
    X = product @ X
    return X.mT if matrix.shape[0] > matrix.shape[1] else X


class Muon(Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of a network, AdamW (1711.05101) for all else.

    A convolution's filters are the rows of a matrix. Matrices with a side of fewer than ``min_side``, such as the
    first and the last layer of a U-Net, are left to AdamW, and so are gains and biases.

        M <- momentum M + (1 - momentum) G
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) orthogonalized((1 - momentum) G + momentum M)

    Args:
        params: parameters. All of a matrix must be on one device, so not sharded.
        lr: of the matrices: how far a singular value moves in one step.
        momentum: of the matrices.
        weight_decay: of all.
        adam_lr, betas: AdamW's.
        min_side: of the matrices.

    Raises:
        ValueError: a number is out of range, or there is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.99),
        min_side: int = 16,
    ) -> None:
        if lr < 0 or adam_lr < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr}, adam_lr={adam_lr}, weight_decay={weight_decay}: none may be negative")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must lie in [0, 1)")
        params = list(params)
        matrices = [p for p in params if p.ndim > 1 and min(len(p), p[0].numel()) >= min_side]
        if not matrices:
            raise ValueError("no parameter is a whole matrix (FSDP cuts them up): use optimizer=adamw")
        ids = set(map(id, matrices))
        rest = [p for p in params if id(p) not in ids]
        self._adamw = AdamW(
            rest or [torch.empty(0)], adam_lr, (betas[0], betas[1]), weight_decay=weight_decay
        )
        of_matrices = {"params": matrices, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([of_matrices, *self._adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, *others = self.param_groups
        for weight in group["params"]:
            if weight.grad is None:
                continue
            momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight.grad))
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            step = orthogonalized(weight.grad.lerp(momentum, group["momentum"]).flatten(1))
            step *= max(1, step.shape[0] / step.shape[1]) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(step.view_as(weight), alpha=-group["lr"])
        # AdamW steps on what is saved and loaded, and scheduled, here.
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()
        return loss
