"""Client optimizers over stacked values: every client clipped, paced and decayed on its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastrank.layers.stacked import StackedTensor


class StackedOptimizer:
    """torch's AdamW (or SGD) for clients that are stacked, fresh for each.

    Args:
        tensors: the trained ones.
        rates: a learning rate for each.
        kind: "adamw" or "sgd".
        weight_decay: AdamW's decoupled decay (SGD: L2).
    """

    def __init__(
        self,
        tensors: Sequence[StackedTensor],
        rates: Sequence[float],
        kind: str,
        weight_decay: float,
    ) -> None:
        self._tensors, self._rates = list(tensors), list(rates)
        self._kind, self._decay = kind, weight_decay
        self._steps = 0
        if kind == "adamw":
            self._moments = [
                (torch.zeros_like(t.values), torch.zeros_like(t.values)) for t in self._tensors
            ]

    @torch.no_grad()
    def clip(self, clients: int, max_norm: float) -> None:
        """Scale each client's gradients to a total norm of at most ``max_norm``, as
        ``torch.nn.utils.clip_grad_norm_`` does for one."""
        grads = [tensor.leaf.grad for tensor in self._tensors]
        squares = torch.stack(
            [
                torch.stack([part.norm() for part in _parts(grad, tensor, clients)])
                if len(set(tensor.parts[:clients])) > 1
                else torch.linalg.vector_norm(grad.view(clients, -1), dim=1)
                for grad, tensor in zip(grads, self._tensors, strict=True)
            ]
        )
        norms = torch.linalg.vector_norm(squares, dim=0)
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for grad, tensor in zip(grads, self._tensors, strict=True):
            parts = tensor.parts[:clients]
            if len(set(parts)) == 1:
                grad.view(clients, -1).mul_(factors[:, None])
            else:
                for part, factor in zip(_parts(grad, tensor, clients), factors, strict=True):
                    part.mul_(factor)

    @torch.no_grad()
    def step(self, clients: int, paces: Sequence[float]) -> None:
        """One step of the first so many clients; each rate times the client's pace.

        A client's tensors are stepped together where paces differ, else all clients' at once.
        """
        self._steps += 1
        if len(set(paces)) == 1:
            pieces = [(slice(0, sum(t.parts[:clients])), i) for i, t in enumerate(self._tensors)]
            self._update(pieces, paces[0])
        else:
            for client, pace in enumerate(paces):
                pieces = []
                for i, tensor in enumerate(self._tensors):
                    start = sum(tensor.parts[:client])
                    pieces.append((slice(start, start + tensor.parts[client]), i))
                self._update(pieces, pace)
        for tensor in self._tensors:
            tensor.leaf.grad = None

    def _update(self, pieces: list[tuple[slice, int]], pace: float) -> None:
        by_rate: dict[float, list[tuple[slice, int]]] = {}
        for piece in pieces:
            by_rate.setdefault(self._rates[piece[1]] * pace, []).append(piece)
        for rate, members in by_rate.items():
            values = [self._tensors[i].values[part] for part, i in members]
            grads = [self._tensors[i].leaf.grad[part] for part, i in members]
            if self._kind == "adamw":
                self._adamw(members, values, grads, rate)
            else:
                if self._decay:
                    torch._foreach_add_(grads, values, alpha=self._decay)
                torch._foreach_add_(values, grads, alpha=-rate)

    def _adamw(
        self,
        members: list[tuple[slice, int]],
        values: list[Tensor],
        grads: list[Tensor],
        rate: float,
    ) -> None:
        # counted from one before: the fused kernel adds one to each
        steps = [torch.tensor(float(self._steps - 1), device=value.device) for value in values]
        adamw(
            values,
            grads,
            [self._moments[i][0][part] for part, i in members],
            [self._moments[i][1][part] for part, i in members],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=self._decay,
            eps=1e-8,
            maximize=False,
        )


def _parts(grad: Tensor, tensor: StackedTensor, clients: int) -> Sequence[Tensor]:
    return grad.split(tensor.parts[:clients])
