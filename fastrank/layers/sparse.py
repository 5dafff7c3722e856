"""SparseLinear: a frozen linear layer whose weight is trained at a mask's positions alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.overlay import Places, memory_of, places_of, sums
from fastrank.kernels.packing.sparse_linear import check_operands, is_traced, run, traced
from fastrank.kernels.packing.weight_grad import FLOATS, wide


@dataclass
class _State:
    """What a sparse layer holds besides its parameters."""

    mask: SparseMask
    backend: str
    places: Places | None = None
    # bits of the kept entries of W, where W + S is folded into the weight, and what was folded
    originals: Tensor | None = None
    folded: tuple[int, int] | None = None
    # whether a forward has been differentiated since fold()
    trained: bool = False
    # parameters that required grad before they were frozen
    thawed: list[str] = field(default_factory=list)


class SparseLayer(nn.Module):
    """What SparseLinear and SparseConv1D share; mixed in before the stock layer's class.

    The stock layer's parameters keep their names and are frozen; `values` `[nnz]`, the update at
    the mask's positions in fp32 (fp64 over fp64), is the one that is trained. The mask is of the
    linear map's shape (out_features, in_features), for a Conv1D as well.
    """

    stock: ClassVar[type[nn.Module]]
    _sparse: _State

    @property
    def mask(self) -> SparseMask:
        """Which entries of the weight `[out_features, in_features]` are trained."""
        return self._sparse.mask

    @property
    def folded(self) -> bool:
        """Whether the weight holds W + S at present."""
        return self._sparse.originals is not None

    def become_sparse(self, mask: SparseMask, backend: str = "auto") -> None:
        """Take up a mask: freeze the parameters and start `values` at zero.

        Args:
            mask: of shape (out_features, in_features).
            backend: "auto", "triton" or "reference".
        """
        weight = self.matrix()
        values = torch.zeros(mask.nnz, dtype=wide(weight.dtype), device=weight.device)
        thawed = [n for n, p in self.named_parameters(recurse=False) if p.requires_grad]
        self._sparse = _State(mask, backend, thawed=thawed)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.values = nn.Parameter(values)

    def become_stock(self, fold: bool = False) -> None:
        """Be the stock layer again, its parameters as trainable as they were.

        Args:
            fold: leave W + S in the weight; otherwise it is W, bit for bit.
        """
        if fold:
            self.fold()
        else:
            self.unfold()
        thawed = self._sparse.thawed
        del self.values, self._sparse
        self.__class__ = self.stock
        for name in thawed:
            getattr(self, name).requires_grad_(True)

    def matrix(self) -> Tensor:
        """The weight as `[out_features, in_features]`, a view of the parameter or itself."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]`."""
        state, weight = self._sparse, self.matrix()
        if is_traced():
            # a fold is left alone: a trace can't tell whether it is up to date
            return traced(
                x, weight, self.bias, self.values, state.originals, state.mask, state.backend
            )
        if state.originals is not None:
            # fused optimizers change values without autograd's version counter
            state.trained |= torch.is_grad_enabled() and self.values.requires_grad
            if state.trained or state.folded != self._held():
                # the graph of an earlier call may hold the weight, and the bits may be the same
                self._write(memory_of(weight.data))
        check_operands(x, weight, self.bias, self.values, state.mask)
        return run(x, weight, self.bias, self.values, self._places(), state.backend, self.folded)

    @torch.no_grad()
    def fold(self) -> None:
        """Put W + S into the weight, rounded once to its dtype, until `unfold`.

        For inference, where it makes the layer a plain one until `values` change in place, and for
        training where nobody else reads the weight: from the first differentiated forward on, each
        forward writes W + S anew (values may have been stepped), which is half of an overlay, and
        the backward does without. Worth most on a GPU, where an overlay is five launches. Values
        changed through `.data` after fold() and outside of training need another call of it; while
        it is folded the weight must not be replaced. A state_dict holds W and `values` apart all
        the same.
        """
        state, weight = self._sparse, self.matrix()
        memory = memory_of(weight)
        if state.originals is None:
            state.originals = memory.index_select(0, self._places().offsets(weight.stride()))
        state.trained = False
        self._write(memory)

    @torch.no_grad()
    def _write(self, memory: Tensor) -> None:
        """W + S into the weight's memory, from the originals."""
        state, offsets = self._sparse, self._places().offsets(self.matrix().stride())
        state.folded = None  # so that one interrupted here is folded anew
        memory.index_copy_(0, offsets, sums(state.originals, self.values))
        state.folded = self._held()

    @torch.no_grad()
    def unfold(self) -> None:
        """Put the bits that `fold` replaced back."""
        if self.folded:
            self._sparse.folded = None  # so that one interrupted here is folded anew
            self._restore(self.matrix())
            self._sparse.originals = None

    def _restore(self, weight: Tensor) -> None:
        offsets = self._places().offsets(weight.stride())
        memory_of(weight).index_copy_(0, offsets, self._sparse.originals)

    def _held(self) -> tuple[int, int]:
        return self.values.data_ptr(), self.values._version

    def _places(self) -> Places:
        state = self._sparse
        if state.places is None or state.places.device != self.weight.device:
            state.places = places_of(state.mask, self.weight.device)
        return state.places

    def extra_repr(self) -> str:
        mask = self.mask
        parts = [
            super().extra_repr(),
            f"density={mask.density:g}",
            f"values={self.values.shape[0]}",
            f"seed={mask.seed}",
            f"round={mask.round}",
            f"scheme={mask.scheme!r}",
        ]
        if self.folded:
            parts.append("folded=True")
        return ", ".join(part for part in parts if part)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Moves and casts, with which the weight's own bits go: never of a folded weight.

        The masters stay as wide as they are: a cast of the model to 16 bits is one of the base.
        """
        folded, values = self.folded, self.values.detach()
        grad = None if self.values.grad is None else self.values.grad.detach()
        self.unfold()
        super()._apply(fn, recurse)
        dtype = wide(self.weight.dtype)
        if self.values.dtype != dtype:
            self.values.data = values.to(self.values.device, dtype)
            self.values.grad = None if grad is None else grad.to(self.values.device, dtype)
        if folded:
            self.fold()
        return self

    @torch.no_grad()
    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.folded:
            weight = self.weight.detach().clone()
            self._restore(weight if self.matrix() is self.weight else weight.t())
            destination[prefix + "weight"] = weight

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        folded = self.folded
        self.unfold()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if folded:
            self.fold()


class SparseLinear(SparseLayer, nn.Linear):
    """`y = x (W + S)ᵀ + bias`: W and bias frozen, S trained where a mask is set and zero elsewhere.

    `values` `[nnz]` holds S at the mask's positions, in fp32 and packed order; gradients, optimizer
    state and checkpoints are of that size. The mask follows from the fields below and needs no
    memory in a checkpoint: state_dict has `weight`, `bias` and `values`, so that a checkpoint of
    the base loads with strict=False. W is written to while a product reads W + S and restored bit
    for bit (see fastrank.kernels.packing.sparse_linear); `fold()` leaves W + S in it until
    `unfold()`.

        layer = SparseLinear.from_linear(model.fc, density=0.01, seed=7, tensor_id="fc.weight")
        optimizer = torch.optim.AdamW([layer.values], lr=1e-4)

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: whether there is a bias.
        density: share of the weight's entries that are trained; see SparseMask.
        seed: in [0, 2**64).
        tensor_id: the weight's qualified name; other names have other masks.
        round: other rounds have other masks.
        scheme: "stratified" or "bernoulli".
        backend: "auto", "triton" or "reference".
        device: where parameters live.
        dtype: of W and bias.

    Raises:
        UsageError: a field that no mask can have.
    """

    stock = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float = 0.01,
        seed: int = 0,
        tensor_id: str = "",
        round: int = 0,
        scheme: str = "stratified",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise UsageError(
                f"in_features={in_features}, out_features={out_features}: sizes must be positive"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        shape = (out_features, in_features)
        self.become_sparse(make_mask(shape, density, seed, tensor_id, round, scheme), backend)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """A layer around `linear`, sharing its weight's and bias's memory (frozen here).

        Args:
            linear: the base; itself left as it is.
            **options: density, seed, tensor_id, round, scheme, backend.

        Raises:
            UsageError: `linear` is not a torch.nn.Linear with a floating-point weight.
        """
        if not isinstance(linear, nn.Linear) or linear.weight.dtype not in FLOATS:
            raise UsageError(
                f"from_linear got {type(linear).__name__}; "
                "pass a torch.nn.Linear with a floating-point weight"
            )
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            device="meta",  # a base of its own would be drawn only to be dropped
            dtype=weight.dtype,
            **options,
        )
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.values = nn.Parameter(torch.zeros_like(layer.values, device=weight.device))
        return layer.train(linear.training)


def make_mask(
    shape: tuple[int, int], density: float, seed: int, tensor_id: str, round: int, scheme: str
) -> SparseMask:
    """A mask, or a UsageError that says what is wrong with its fields."""
    try:
        return SparseMask(shape, density, seed, tensor_id, round, scheme)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


@functools.cache
def conv1d_class() -> type[SparseLayer]:
    """SparseConv1D, over transformers' Conv1D, whose weight is `[in_features, out_features]`."""
    from transformers.pytorch_utils import Conv1D

    class SparseConv1D(SparseLayer, Conv1D):
        """SparseLinear for GPT-2's Conv1D: the same map and mask over the transposed weight."""

        stock = Conv1D
        __module__ = __name__
        __qualname__ = "SparseConv1D"
        __repr__ = nn.Module.__repr__

        def matrix(self) -> Tensor:
            return self.weight.t()

        def extra_repr(self) -> str:
            own = f"in_features={self.nx}, out_features={self.nf}, "
            return own + SparseLayer.extra_repr(self)

    return SparseConv1D


def __getattr__(name: str) -> Any:
    # made on first use, because it needs transformers; found here by pickle
    if name == "SparseConv1D":
        return conv1d_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
