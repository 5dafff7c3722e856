"""Kernels: tensors in, tensors out. Each folder of kernels/ is mapped to fastrank.kernels.<op>.

    from fastrank.kernels.lowrank import lowrank_linear, lowrank_add

Nothing is imported here, so that one op never pays for another's import.
"""
