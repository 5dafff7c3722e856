"""Works of `fastrank bench packing` on training: a layer's packed gradient, its backward, a model.

Gradients are judged by a sample of their entries in float64, because all of them would cost more
than every variant together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrank.bench.accuracy import relative_error
from fastrank.bench.cases import Unavailable
from fastrank.bench.harness import WrongResult
from fastrank.bench.memory import Memory
from fastrank.bench.packing_cases import Work, result_and_memory
from fastrank.bench.timing import Step
from fastrank.kernels.packing import SparseMask, masked_weight_grad, sparse_linear

# entries that are computed in float64
_SAMPLED = 2048

Builders = Mapping[str, Callable[[], Step]]


class _Layer(Work):
    """x, dy and the mask of one linear layer."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        case = self.case
        self.x = self.randn(case.M, case.K).to(case.torch_dtype)
        self.dy = self.randn(case.M, case.N).to(case.torch_dtype)
        self.mask = SparseMask((case.N, case.K), case.density, seed=1, tensor_id="layer.weight")
        self.positions = self.mask.positions(self.device)
        step = max(1, self.mask.nnz // _SAMPLED)
        self.sample = torch.arange(0, self.mask.nnz, step, device=self.device)
        at = self.positions[self.sample]
        rows = torch.div(at, case.K, rounding_mode="floor")
        # column by column: [M, sample] in float64 would take more than the case
        parts = [
            (self.dy[:, n].double() * self.x[:, k].double()).sum(0)
            for n, k in zip(rows.split(256), (at % case.K).split(256), strict=True)
        ]
        self.exact = torch.cat(parts)

    def error(self, name: str, result: Tensor) -> float | None:
        if len(result) != self.mask.nnz:
            raise WrongResult(f"{len(result)} values, {self.mask.nnz} expected")
        return relative_error(result[self.sample], self.exact)


class WeightGradWork(_Layer):
    """(dyᵀ x) at the mask. `dense` is the whole product and a gather with positions that are held;
    `sampled_addmm` gets the mask as a sparse matrix, made before the clock starts."""

    graph = ("fastrank", "dense")

    def variants(self) -> Builders:
        dy, x = self.dy, self.x

        def sampled() -> Step:
            if dy.dtype != torch.float32:
                raise Unavailable(f"torch.sparse.sampled_addmm takes no {self.case.dtype}")
            starts = self.mask.row_starts().to(self.device)
            columns = self.positions % self.case.K
            zeros = torch.zeros(self.mask.nnz, device=self.device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                where = torch.sparse_csr_tensor(
                    starts, columns, zeros, self.mask.shape, check_invariants=True
                )
            return lambda: torch.sparse.sampled_addmm(where, dy.t(), x, beta=0.0).values()

        return {
            "fastrank": lambda: lambda: masked_weight_grad(dy, x, self.mask),
            "dense": lambda: lambda: (dy.t() @ x).view(-1).index_select(0, self.positions),
            "sampled_addmm": sampled,
        }


class BackwardWork(_Layer):
    """Forward and backward of a layer whose input needs no gradient. Memory is the backward's.
    `dense` trains the weight itself, and gathers from its gradient."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.weight = self.randn(self.case.N, self.case.K).to(self.case.torch_dtype)
        self.values = torch.zeros(self.mask.nnz, device=self.device, requires_grad=True)
        self.trained = self.weight.clone().requires_grad_()

    def variants(self) -> Builders:
        return {
            "fastrank": lambda: lambda: self.backward("fastrank", self.forward("fastrank")),
            "dense": lambda: lambda: self.backward("dense", self.forward("dense")),
        }

    def forward(self, name: str) -> Tensor:
        if name == "fastrank":
            return sparse_linear(self.x, self.weight, None, self.values, self.mask)
        return F.linear(self.x, self.trained)

    def backward(self, name: str, y: Tensor) -> Tensor:
        y.backward(self.dy)
        if name == "fastrank":
            found, self.values.grad = self.values.grad, None
            return found
        found = self.trained.grad.view(-1).index_select(0, self.positions)
        self.trained.grad = None
        return found

    def measured(self, name: str, step: Step) -> tuple[Tensor, Memory]:
        result, y = step(), self.forward(name)
        return result, result_and_memory(lambda: self.backward(name, y), self.device)[1]


class FinetuneWork(Work):
    """A step of AdamW on a BERT classifier with random weights: 1 % of its linear layers' entries,
    or all parameters. `state_bytes` are gradients and optimizer state, counted on the tensors."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        from transformers import BertConfig

        hidden = self.case.N
        large = hidden == 768
        self.config = BertConfig(
            vocab_size=30522 if large else 512,
            hidden_size=hidden,
            num_hidden_layers=12 if large else 2,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            num_labels=20,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        length = min(64, self.case.M)
        shape = (self.case.M // length, length)
        tokens = torch.randint(1, self.config.vocab_size, shape, generator=self.generator)
        labels = torch.randint(0, 20, shape[:1], generator=self.generator)
        self.batch = {"input_ids": tokens.to(self.device), "labels": labels.to(self.device)}
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.first: dict[str, Tensor] = {}  # gradients of the first step, at the masks

    def variants(self) -> Builders:
        return {"fastrank": lambda: self._built("fastrank"), "dense": lambda: self._built("dense")}

    def _built(self, name: str) -> Step:
        from transformers import BertForSequenceClassification

        import fastrank

        torch.manual_seed(0)
        model = BertForSequenceClassification(self.config).to(self.device)
        if name == "fastrank":
            fastrank.sparsify(model, density=self.case.density, seed=1)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.models[name], self.optimizers[name] = model, optimizer

        def run() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = model(**self.batch).loss
            loss.backward()
            if name not in self.first and "fastrank" in self.models:
                self.first[name] = self._gradients(name)
            optimizer.step()
            return float(loss.detach())

        return run

    def _gradients(self, name: str) -> Tensor:
        """The gradients at the masks, one after another."""
        layers = self._sparse_layers()
        if name == "fastrank":
            return torch.cat([layer.values.grad for layer in layers.values()])
        modules = dict(self.models[name].named_modules())
        parts = []
        for path, layer in layers.items():
            flat = modules[path].weight.grad.view(-1)
            parts.append(flat[layer.mask.positions(self.device)])
        return torch.cat(parts)

    def _sparse_layers(self) -> dict[str, nn.Module]:
        from fastrank import SparseLinear

        model = self.models["fastrank"]
        return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}

    def error(self, name: str, result: float) -> float | None:
        """Of the first step's gradients, against dense training's; known once both have run."""
        if name == "fastrank" or "fastrank" not in self.first:
            return None
        error = relative_error(self.first["fastrank"], self.first["dense"])
        if not error <= 1e-3:
            raise WrongResult(f"gradients differ by {error:.3g}")
        return None

    def extras(self, name: str) -> dict[str, float]:
        tensors = [p.grad for p in self.models[name].parameters() if p.grad is not None]
        for state in self.optimizers[name].state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        trained = sum(p.numel() for p in self.models[name].parameters() if p.requires_grad)
        return {"state_bytes": sum(storages.values()), "trained": trained}
