"""Models, training and comparisons that the tests of sparse layers share."""

import torch
from torch import Tensor, nn

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if not n.endswith("values")}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = bits_of(model)
    return after.keys() == before.keys() and all(bits_equal(t, before[n]) for n, t in after.items())


class Twice(nn.Module):
    """A model whose middle layer is called twice, as ALBERT's are."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.middle = nn.Linear(40, 40, bias=False, dtype=dtype)
        self.classifier = nn.Linear(40, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).tanh()).tanh()
        return self.classifier(self.middle(x).tanh())


def twice(dtype: torch.dtype = F64) -> Twice:
    torch.manual_seed(1)
    return Twice(dtype)


def rows(dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(32, 24, generator=g, dtype=F64).to(dtype)


def train(model: nn.Module, steps: int = 6, decay: float = 0.1, **options) -> list[float]:
    """AdamW on what requires grad; the loss of every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=decay, **options)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        loss = model(rows(dtype, step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
