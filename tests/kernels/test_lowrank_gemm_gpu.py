"""The Triton matrix product, layers of one x and the choices, on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from lowrank_cases import BF16, F32, F64, FP16, Case, assert_as_good_as, errors, peft, run, truth

from fastrank.kernels.common.launch import gpu_of
from fastrank.kernels.lowrank import core, lowrank_linear, shared_input
from fastrank.kernels.lowrank.choices import nearest, override, table_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

EVERYWHERE = {
    "routes": {
        step: {operands: [{"use": "gemm"}] for operands in ("half", "mixed")}
        for step in ("forward", "forward_any", "dx", "dx_any")
    }
}
# (x and weight, adapters, autocast)
MODES = {
    "bf16": (BF16, BF16, None),
    "fp16": (FP16, FP16, None),
    "bf16-fp32-adapters": (BF16, F32, None),
    "autocast-bf16": (BF16, F32, BF16),
}


@pytest.fixture
def everywhere():
    with override(EVERYWHERE):
        yield


def make(mode: str, **changes) -> Case:
    dtype, adapters, autocast = MODES[mode]
    return Case(dtype=dtype, adapters=adapters, autocast=autocast, device="cuda", **changes)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize(("M", "K", "N", "R"), [(1000, 776, 1032, 24), (4096, 2048, 1024, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_pefts(mode, M, K, N, R, p, everywhere, launches):
    """Odd shapes through one kernel, aligned ones through the other."""
    keywords = {"scale": 1.7} | ({"dropout_p": p, "seed": 12} if p else {})
    case = make(mode, M=M, K=K, N=N, R=R, with_e=R == 24, keywords=keywords)
    assert_as_good_as(run(lowrank_linear, case), run(peft, case), truth(case))
    assert launches.count("gemm") == 2


@pytest.mark.parametrize("ranks", [100, 256])
def test_many_ranks_and_device_masks(ranks, everywhere):
    on = (torch.arange(ranks) % 3 != 0).cuda()
    trained = (torch.arange(ranks) % 2 == 0).cuda()
    keywords = {"active": on, "trainable": trained, "dropout_p": 0.2, "seed": 1}
    case = make("bf16", M=512, K=512, N=640, R=ranks, with_e=True, keywords=keywords)
    exact = truth(case)
    for name, value in run(lowrank_linear, case).items():
        assert errors(value, exact[name])[0] < 2e-2, name


def test_a_conv1d_weight(everywhere):
    case = make("bf16", M=512, K=512, N=768, R=16)
    expected, given = run(lowrank_linear, case), case.inputs()
    weight = given["weight"].detach().T.contiguous().T.requires_grad_()
    got = run(lowrank_linear, case, weight=weight)
    for name in ("y", "dx", "dA", "dB"):
        assert errors(got[name], expected[name].to(F64))[0] < 1e-2, name


def test_the_device_has_choices():
    gpu = gpu_of(torch.device("cuda", 0))
    assert gpu.units > 0
    assert gpu.shared >= 48 << 10
    assert nearest(gpu.capability, [gpu.capability]) == gpu.capability
    for kernel in ("shrink", "gram", "expand"):
        table_for(gpu).tile(kernel, "half", 16, 8192, 4096)


def test_a_prefix_compiles_nothing_new_and_syncs_nothing(launches):
    """Compiled kernels counted by Triton itself, over prefixes that live on the device."""
    from fastrank.kernels.lowrank import fused, gemm

    kernels = [getattr(m, n) for m in (fused, gemm) for n in vars(m) if n.endswith("_kernel")]

    def compiled() -> int:
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    case = make("bf16", M=512, K=512, N=512, R=256)
    given = {n: t for n, t in case.inputs().items() if t is not None}
    leaves = list(given.values())

    def step(prefix):
        y = lowrank_linear(*leaves, active=prefix)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    prefixes = [torch.tensor(n, device="cuda") for n in (256, 200, 17, 1, 0)]
    step(prefixes[0])
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for prefix in prefixes:
            step(prefix)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before > 0


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
def test_layers_of_one_x(p, launches):
    """q, k and v of a Llama-3-8B layer: outputs and gradients as one by one."""
    M, K, x = 1024, 4096, None
    layers, dys, alone = [], [], []
    for i, (N, R) in enumerate(((4096, 16), (1024, 16), (1024, 8))):
        given = make("autocast-bf16", M=M, K=K, N=N, R=R, with_bias=False, seed=i).inputs()
        given = {n: t if t is None else t.detach() for n, t in given.items()}
        x = given["x"] if x is None else x
        seed = torch.tensor([i], device="cuda") if p else None
        branch, aux = core.prepare(
            given["A"], None, None, seed, None, 0.5, p, "triton", BF16, "peft"
        )
        layers.append(
            shared_input.Layer(*(given[n] for n in ("weight", "bias", "A", "B", "e")), branch, aux)
        )
        dys.append(torch.randn(M, N, device="cuda").to(BF16))
    ys, Ss = shared_input.linears(x, layers)
    assert launches.count("shrink") == 1
    dx, grads = shared_input.backward(dys, x, layers, Ss, [(True, True, True, False)] * 3, BF16)
    total = torch.zeros(M, K, dtype=F64, device="cuda")
    for layer, dy, y, (dA, dB, _) in zip(layers, dys, ys, grads, strict=True):
        weight, bias, A, B, e, branch, aux = layer
        y_alone, S, keep = core.forward(None, x, weight, bias, A, B, e, branch, aux)
        alone = core.backward(
            dy, x, weight, A, B, e, S, keep, branch, aux,
            (True, False, False, True, True, False), BF16,
        )  # fmt: skip
        total += alone[0].to(F64)
        for got, expected in ((y, y_alone), (dA, alone[3]), (dB, alone[4])):
            assert errors(got, expected.to(F64))[0] < 1e-3
    assert errors(dx, total)[0] < 1e-2
    assert F.cosine_similarity(dx.double().flatten(), total.flatten(), dim=0) > 0.9999
