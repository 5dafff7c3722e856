"""FastAdaLoraLinear: AdaLoRA trains, prunes and resizes as with stock PEFT, step for step."""

import copy

import pytest
import torch
from layer_cases import FLOAT64, RATIO, Net, assert_close, errors, layer_of, rows, run, typical
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastrank
from fastrank.layers import FastAdaLoraLinear

STEPS = 24


def pair(kind="linear", dtype=torch.float64, seed=0, **options):
    """(stock, patched, report) of one layer, with E filled so that the branch counts."""
    torch.manual_seed(seed)
    options = {"init_r": 5, "target_r": 2, "lora_alpha": 6, "total_step": 10} | options
    config = AdaLoraConfig(target_modules=["fc"], fan_in_fan_out=kind == "conv1d", **options)
    stock = get_peft_model(Net(kind).to(dtype), config)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    # see test_ranknum_trap_of_16_bit_bases
    layer_of(stock).ranknum["default"].requires_grad_(False)
    fast = copy.deepcopy(stock)
    return stock, fast, fastrank.patch(fast)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_fused_call_equals_peft(kind):
    stock, fast, report = pair(kind)
    for _ in range(2):
        result = run(fast, rows())
        assert {n.split(".")[-2] for n in result[1] if n != "x"} == {"lora_A", "lora_B", "lora_E"}
        assert_close(result, run(stock, rows()))
    assert type(layer_of(fast)) is FastAdaLoraLinear
    assert report.fused_calls == 2
    assert report.delegated_calls == {}
    assert [row.layer for row in report.rows()] == ["adalora.SVDLinear"]


def test_masked_rank_scores_but_does_not_count():
    stock, fast, report = pair()
    for model in (stock, fast):
        with torch.no_grad():
            layer_of(model).lora_E["default"][[1, 3]] = 0.0
    y, grads = run(fast, rows())
    assert_close((y, grads), run(stock, rows()))
    names = {n.split(".")[-2]: n for n in grads if n != "x"}
    assert (grads[names["lora_E"]] != 0).all()
    assert (grads[names["lora_A"]][[1, 3]] == 0).all()
    assert (grads[names["lora_B"]][:, [1, 3]] == 0).all()
    # gradients that vanish are zeros, never None: PEFT's importance scores multiply by them
    with torch.no_grad():
        layer_of(fast).lora_E["default"].zero_()
    _, grads = run(fast, rows())
    assert (grads[names["lora_A"]] == 0).all()
    assert (grads[names["lora_B"]] == 0).all()
    assert report.fused_calls == 2


@pytest.mark.parametrize("mode", ["autocast", "fp32-adapters", "all-bf16"])
def test_16_bit_is_as_accurate_as_peft(mode):
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    ours, theirs = {}, {}
    for seed in range(12):
        stock, fast, report = pair(dtype=dtype, seed=seed, lora_alpha=5 + seed)
        for model in (stock, fast):
            if mode == "all-bf16":
                model.bfloat16()
        x = torch.randn(200, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact = run(copy.deepcopy(stock).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got, want = run(fast, x), run(stock, x)
        assert report.fused_calls == 1
        assert got[0].dtype == want[0].dtype
        assert {n: g.dtype for n, g in got[1].items()} == {n: g.dtype for n, g in want[1].items()}
        for name, error in errors(got, exact).items():
            ours.setdefault(name, []).append(error)
            theirs.setdefault(name, []).append(errors(want, exact)[name])
    for name in theirs:
        assert typical(ours[name]) <= RATIO * typical(theirs[name]) + 1e-7, name


def test_scale_follows_ranknum_however_it_changes():
    stock, fast, report = pair()
    fast(rows())
    for change in (
        lambda ranknum: ranknum.fill_(7.0),
        lambda ranknum: ranknum.data.fill_(3.0),
        lambda ranknum: setattr(ranknum, "data", torch.full((1,), 9.0, dtype=torch.float64)),
    ):
        for model in (stock, fast):
            with torch.no_grad():
                change(layer_of(model).ranknum["default"])
        assert_close(run(fast, rows()), run(stock, rows()))
    state = stock.state_dict()
    for model in (stock, fast):
        layer_of(model).ranknum["default"] = nn.Parameter(
            torch.full((1,), 4.0, dtype=torch.float64), requires_grad=False
        )
    assert_close(run(fast, rows()), run(stock, rows()))
    for model in (stock, fast):
        model.load_state_dict(state)
    assert_close(run(fast, rows()), run(stock, rows()))
    assert report.fused_calls == 6
    assert report.delegated_calls == {}


def test_ranknum_is_read_once_and_not_at_every_call(monkeypatch):
    from fastrank.layers.memo import Number

    _, fast, report = pair()
    reads = []
    read = Number.read
    monkeypatch.setattr(Number, "read", lambda tensor: reads.append(1) or read(tensor))
    for training in (True, False, True):
        fast.train(training)
        fast(rows())
    assert len(reads) == 1
    assert report.fused_calls == 3


def test_ranknum_trap_of_16_bit_bases():
    """PEFT leaves ranknum trainable where the base isn't float32, so that it drifts in training."""
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["fc"], init_r=5, target_r=2, total_step=10)
    model = get_peft_model(Net("linear").bfloat16(), config)
    ranknum = layer_of(model).ranknum["default"]
    ranknum.requires_grad_(True)  # as PEFT leaves it in its newer versions
    report = fastrank.patch(model)
    assert not ranknum.requires_grad
    (row,) = report.rows()
    assert row.notes == ("ranknum frozen",)
    assert "ranknum frozen" in str(report)
    model(rows(torch.bfloat16)).sum().backward()
    assert ranknum.grad is None
    assert report.fused_calls == 1
    # PEFT makes a new one when it resizes a layer
    pattern = {"fc.lora_E": [True, True, True, False, False]}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert not layer_of(model).ranknum["default"].requires_grad
    layer_of(model).ranknum["default"].requires_grad_(True)
    reason = "ranknum is trainable: call patch again to freeze it"
    assert report.delegated == {"base_model.model.fc": reason}
    fastrank.patch(model)
    assert report.delegated == {}
    fastrank.unpatch(model)
    assert layer_of(model).ranknum["default"].requires_grad
    # a base that doesn't fall into it is left as it was
    _, fast, report = pair(dtype=torch.float32)
    assert report.rows()[0].notes == ()
    fastrank.unpatch(fast)
    assert not layer_of(fast).ranknum["default"].requires_grad


# --- whole runs ------------------------------------------------------------------------------


def bert(dropout):
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "value", "dense"],
        init_r=6,
        target_r=2,
        tinit=3,
        tfinal=8,
        deltaT=2,
        total_step=STEPS,
        lora_alpha=24,
        lora_dropout=dropout,
        orth_reg_weight=0.3,
    )
    return get_peft_model(base, config).train()


def train(model):
    """(losses, masks): the loss and which ranks are left, at every step of an AdaLoRA run."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    generator = torch.Generator().manual_seed(1)
    losses, masks = [], []
    torch.manual_seed(2)
    for step in range(STEPS):
        labels = torch.randint(3, (16,), generator=generator)
        ids = torch.randint(3, 50, (16, 8), generator=generator)
        ids[:, :3] = labels[:, None]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        masks.append({n: (p == 0).flatten().tolist() for n, p in model.named_parameters()
                      if "lora_E" in n})  # fmt: skip
    return torch.tensor(losses), masks


def test_a_whole_run_allocates_the_same_ranks(tmp_path):
    stock = bert(0.0)
    fast = copy.deepcopy(stock)
    report = fastrank.patch(fast)
    assert len(report.fused) == 11
    theirs, their_masks = train(stock)
    ours, our_masks = train(fast)
    assert report.fused_calls == STEPS * 11
    assert report.delegated_calls == {}
    assert our_masks == their_masks
    # the budget fell: 11 layers of 6 ranks became 22 ranks, not all of them in every layer
    left = [mask.count(False) for mask in our_masks[-1].values()]
    assert sum(left) == 22
    assert len(set(left)) > 1
    # the orthogonality loss is part of what is compared
    assert (ours - theirs).abs().max() <= 1e-4
    assert theirs[-3:].mean() < 0.8 * theirs[0]
    config, theirs_config = fast.peft_config["default"], stock.peft_config["default"]
    assert config.rank_pattern == theirs_config.rank_pattern
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(fast.get_parameter(name), parameter, atol=1e-4), name

    # saved by the patched model, loaded with uneven ranks, patched again
    batch = torch.randint(3, 50, (4, 8))
    want = fast.eval()(input_ids=batch).logits
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = bert(0.0).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(loaded(input_ids=batch).logits, want, atol=1e-5)
    again = fastrank.patch(loaded)
    assert torch.allclose(loaded(input_ids=batch).logits, want, atol=1e-5)
    assert again.fused_calls == 11
    # ranks that a layer has none of are allowed, and get gradients of their empty shape
    assert {row.shape.split(" r")[1] for row in again.rows()} == {str(r) for r in left}


def test_a_run_with_dropout_learns():
    model = bert(0.2)
    report = fastrank.patch(model)
    losses, masks = train(model)
    assert report.delegated_calls == {}
    assert sum(mask.count(False) for mask in masks[-1].values()) == 22
    assert losses[-3:].mean() < 0.9 * losses[0]


def test_a_layer_without_ranks_left_runs():
    stock, fast, report = pair()
    for model in (stock, fast):
        model.base_model.resize_modules_by_rank_pattern({"fc.lora_E": [False] * 5}, "default")
    y, grads = run(fast, rows())
    assert torch.equal(y, run(stock, rows())[0])
    assert all(grads[name].numel() == 0 for name in grads if "lora_" in name)
    assert report.fused_calls == 1


# --- life ------------------------------------------------------------------------------------


def test_merge_disable_switch_and_unpatch():
    stock, fast, report = pair()
    want, base = stock(rows()), layer_of(stock).base_layer(rows())
    before = {n: p.clone() for n, p in stock.named_parameters()}
    fast(rows())
    with fast.disable_adapter():
        assert torch.equal(fast(rows()), base)
    for model in (stock, fast):
        model.merge_adapter()
    assert torch.equal(fast(rows()), stock(rows()))
    fast.unmerge_adapter()
    assert torch.allclose(fast(rows()), want, rtol=1e-9)
    assert report.fused_calls == 2
    assert report.delegated_calls == {"adapters disabled": 1, "adapters merged": 1}
    assert fastrank.unpatch(fast) == 1
    stock.unmerge_adapter()
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    assert [set(vars(m)) for m in fast.modules()] == [set(vars(m)) for m in stock.modules()]
    assert fast.state_dict().keys() == stock.state_dict().keys()
    assert torch.allclose(fast(rows()), want, rtol=FLOAT64)
    for name, parameter in fast.named_parameters():
        assert torch.allclose(parameter, before[name], rtol=1e-9), name


def test_compiled_layer_is_one_graph_and_reads_ranknum_from_the_device():
    stock, fast, report = pair()
    compiled = torch.compile(layer_of(fast), backend="aot_eager", fullgraph=True)
    for rank in (5.0, 8.0):
        for model in (stock, fast):
            layer_of(model).ranknum["default"].data.fill_(rank)
        assert_close(run(compiled, rows()), run(layer_of(stock), rows()))
    assert report.rows()[0].traced == 1


def test_extra_arguments_and_mixed_dtypes_delegate():
    stock, fast, report = pair()
    for model in (stock, fast):
        layer_of(model).lora_E["default"] = nn.Parameter(torch.ones(5, 1))
    assert report.delegated == {"base_model.model.fc": "lora_A in float64, E in float32"}
    with pytest.raises(TypeError, match="unexpected keyword"):
        fast(rows(), nonsense=1)
    assert report.delegated_calls == {"extra arguments: nonsense": 1}
