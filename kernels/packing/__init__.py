"""Sparse updates whose positions a seed tells: masks, packing, aggregation, packed gradients."""

from fastrank.kernels.packing.aggregation import aggregate, aggregate_dense
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.packed import Packed, pack, unpack, unpack_add_
from fastrank.kernels.packing.sparse_linear import sparse_linear
from fastrank.kernels.packing.topk import TopK, topk_pack, topk_unpack
from fastrank.kernels.packing.weight_grad import masked_weight_grad

__all__ = [
    "Packed",
    "SparseMask",
    "TopK",
    "aggregate",
    "aggregate_dense",
    "masked_weight_grad",
    "pack",
    "sparse_linear",
    "topk_pack",
    "topk_unpack",
    "unpack",
    "unpack_add_",
]
