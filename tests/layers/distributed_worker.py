"""One of two processes of test_distributed: train stock and patched models, say what happened.

python distributed_worker.py RANK PORT
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from family_cases import VOCABULARY, fill_b, llama
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastrank

STEPS = 3


def make(patched):
    torch.manual_seed(0)
    model = get_peft_model(
        llama(), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    fill_b(model)
    return model, fastrank.patch(model) if patched else None


def train(model, parameters):
    """The loss at every step, on this process's share of the batches."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(VOCABULARY, (4, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ddp(patched):
    """Data parallel, activations recomputed."""
    model, report = make(patched)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = train(DistributedDataParallel(model), model.parameters())
    return losses, report and seen(report, {})


def fsdp(patched, policy):
    """Parameters sharded; whole only inside the calls."""
    model, report = make(patched)
    for block in model.base_model.model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    before = report and report.delegated
    losses = train(model, model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return losses, report and seen(report, before)


def seen(report, before):
    """The report's view: before the first call, and now."""
    return {
        "fused_calls": report.fused_calls,
        "delegated_calls": report.delegated_calls,
        "before": sorted(set(before.values())),
        "now": sorted(set(report.delegated.values())),
    }


def main(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = {
        "ddp": (ddp(False), ddp(True)),
        "fsdp2": (fsdp(False, MixedPrecisionPolicy()), fsdp(True, MixedPrecisionPolicy())),
        "fsdp2-bf16": (fsdp(False, bf16), fsdp(True, bf16)),
    }
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
