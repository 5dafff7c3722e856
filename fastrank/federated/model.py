"""The one model a process holds: loaded once, trained in place client after client.

Methods speak to it in verbs (add_lora, read, load), executors run it, and the run directory is
exported from it. Tensors that leave it are fp32 copies on the CPU, named as the model names its
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.federated.cohort import derive_seed
from fastrank.federated.loading import (
    auto_class,
    check_shapes,
    head_modules,
    load_parts,
    name_labels,
    purpose,
)
from fastrank.federated.passes import tokens_of
from fastrank.federated.quiet import quiet
from fastrank.federated.ranks import RankMask, is_factor, mask_of
from fastrank.federated.targets import target_modules
from fastrank.layers.fused import FusedLayer

if TYPE_CHECKING:
    import numpy as np

    from fastrank.data import Encoded, EncodedImages, Split, TextData


class ResidentModel:
    """A transformers model, its tokenizer and its task, with LoRA attached at most once.

    Attributes:
        model: the transformers model, or the PeftModel around it after ``add_lora``.
        tokenizer: the tokenizer, or image processor, its inputs are made with.
        task: "seq-cls", "causal-lm" or "image-cls".
        head_modules: top-level modules that are the (newly initialised) task head.
        device: where it lives.
        report: the ``PatchReport`` of ``add_lora``, None before.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: str,
        head_modules: tuple[str, ...],
        device: torch.device,
        base_changed: bool = False,
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.task = task
        self.head_modules = head_modules
        self.device = device
        self.dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self.base_changed = base_changed
        self.report = None
        self._loaded: dict[str, Tensor] = {}  # weights as they were before `change_base`
        self._head = self._heads(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    # -- shape -----------------------------------------------------------------------------------

    def add_lora(
        self,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        target_modules: str | Iterable[str] = "all-linear",
        seed: int = 0,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> None:
        """Attach PEFT LoRA adapters and put fastrank's fused layers under them.

        A ~ kaiming_uniform(sqrt 5) drawn from (seed, module index) and B = 0, so that every client
        and every run with this seed starts from the same adapters.
        """
        from peft import LoraConfig

        config = LoraConfig(
            task_type=self.peft_task(),
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=self.target_modules(target_modules),
            modules_to_save=list(self.head_modules) or None,
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
        )
        self.attach(config)
        factors = [(name, p) for name, p in self.model.named_parameters() if ".lora_A." in name]
        for index, (_, parameter) in enumerate(sorted(factors)):
            generator = torch.Generator().manual_seed(derive_seed("init", seed, index))
            bound = (1.0 / parameter.shape[1]) ** 0.5  # kaiming_uniform with a = sqrt(5)
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(drawn)

    def attach(self, config: Any) -> None:
        """Put PEFT adapters of this configuration on the model, fused, nothing trainable yet."""
        from peft import get_peft_model

        from fastrank.patching import patch

        head = set(self._head)
        # PEFT draws its own A; ours replaces it below
        with torch.random.fork_rng(devices=[]), quiet():
            self.model = get_peft_model(self.model, config).eval()
        # a resumed run has to give the same bits, whatever its process has seen before
        self.report = patch(self.model, share_inputs=False)
        # the head is now PEFT's trainable copy; the original stays behind as original_module
        self._head = [
            name
            for name, _ in self.model.named_parameters()
            if ".modules_to_save." in name
            and name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            in head
        ]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def reset(self, model: nn.Module) -> None:
        """Hold this model instead, a plain one whose head is trained in place."""
        self.model, self.report = model.to(self.device).eval(), None
        self._loaded = {}
        self._head = self._heads(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def _heads(self, model: nn.Module) -> list[str]:
        return [n for n, _ in model.named_parameters() if n.split(".")[0] in self.head_modules]

    def peft_task(self) -> Any:
        """What PEFT calls the task; None for images, which it has no name for."""
        from peft import TaskType

        if self.task == "image-cls":
            return None
        return TaskType.SEQ_CLS if self.task == "seq-cls" else TaskType.CAUSAL_LM

    def target_modules(self, wanted: str | Iterable[str]) -> list[str]:
        """Names PEFT matches by their ending: the shortest that select exactly the wanted set."""
        return target_modules(self.model, wanted, self.head_modules)

    # -- values ----------------------------------------------------------------------------------

    def lora_names(self) -> list[str]:
        """Names of all adapters' factors, in the model's order."""
        return [name for name, _ in self.model.named_parameters() if is_factor(name)]

    def adapted_modules(self) -> list[str]:
        """Names of the modules that carry adapters."""
        return [n.split(".lora_A.")[0] for n in self.lora_names() if ".lora_A." in n]

    def head_names(self) -> list[str]:
        """Names of the task head's parameters."""
        return list(self._head)

    def base_names(self) -> list[str]:
        """Names of every parameter outside the task head."""
        head = set(self._head)
        return [n for n, _ in self.model.named_parameters() if n not in head]

    def parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The live parameters of these names."""
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in names}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """fp32 copies on the CPU (fp64 of fp64 parameters)."""
        return {name: server_copy(parameter) for name, parameter in self.parameters(names).items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write values into the live parameters, cast to their dtype.

        Factors of another rank than the layer's present one change its rank.
        """
        for name, parameter in self.parameters(tensors).items():
            value = tensors[name]
            if value.shape != parameter.shape:
                if ".lora_" not in name:
                    raise UsageError(
                        f"{name} is {list(parameter.shape)} in the model, but the value to load "
                        f"is {list(value.shape)}; only LoRA factors may change their rank"
                    )
                parameter.data = parameter.new_empty(value.shape)
            parameter.copy_(value)

    def base_weights(self) -> dict[str, Tensor]:
        """Adapted module -> a view of its frozen weight, `[N, K]` whatever way it is stored."""
        from transformers.pytorch_utils import Conv1D

        found = {}
        for name in self.adapted_modules():
            base = self.model.get_submodule(name).get_base_layer()
            if not base.weight.is_floating_point():
                raise UsageError(
                    f"{name} holds its weight as {base.weight.dtype}, and this method changes base "
                    f"weights; load the model in float32, bfloat16 or float16"
                )
            found[name] = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data
        return found

    @torch.no_grad()
    def change_base(self, changes: Mapping[str, Tensor]) -> None:
        """Adapted modules' weights become those they were loaded with plus a change `[N, K]` each.

        Always from the loaded weights, so that nothing drifts however often it is called; modules
        that are not named get their loaded weights back.
        """
        weights = self.base_weights()
        for name in changes:
            if name not in self._loaded:
                self._loaded[name] = weights[name].clone()
        for name, loaded in self._loaded.items():
            weight = weights[name]
            if name in changes:
                change = changes[name].to(weight.device)
                weight.copy_(loaded.to(change.dtype) + change)
            else:
                weight.copy_(loaded)

    @contextmanager
    def scaled(self, scale: float | None) -> Iterator[None]:
        """Adapter branches multiplied by this, not by their own scale, in here; None: no change."""
        layers = [m for m in self.model.modules() if isinstance(m, FusedLayer)]
        before = [dict(layer.scaling) for layer in layers]
        try:
            if scale is not None:
                for layer in layers:
                    layer.scaling.update(dict.fromkeys(layer.scaling, scale))
            yield
        finally:
            if scale is not None:
                for layer, own in zip(layers, before, strict=True):
                    layer.scaling.update(own)

    @contextmanager
    def training_ranks(self, ranks: RankMask | None) -> Iterator[None]:
        """Only these ranks of the adapters learn in here; None: all of them."""
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, FusedLayer)}
        try:
            if ranks is not None:
                for name, layer in layers.items():
                    layer._fastrank.trainable = mask_of(ranks, name)
            yield
        finally:
            for layer in layers.values():
                layer._fastrank.trainable = None

    # -- running ---------------------------------------------------------------------------------

    def encode(
        self,
        splits: Sequence[Split],
        max_length: int,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> list[Encoded | EncodedImages]:
        """Splits as the model reads them: token ids, or pixels.

        Raises:
            UsageError: nothing to learn from within ``max_length``; or images that can't be
                decoded, that would not fit the memory or that the model can't take.
        """
        from fastrank.data import encode, encode_images

        if self.task != "image-cls":
            return [encode(split, self.tokenizer, self.task, max_length) for split in splits]
        channels = getattr(self.model.config, "num_channels", 3)
        encoded = encode_images(splits, self.tokenizer, channels, progress)
        one = encoded[0].batch([0], self.device, self.dtype)["pixel_values"]
        try:
            tokens = tokens_of(self.model, one)
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"{type(self.model).__name__} can't take images of {list(one.shape[1:])} as its "
                f"image processor makes them ({str(error).splitlines()[0]}); its config.json and "
                "preprocessor_config.json don't fit together"
            ) from error
        return [replace(part, lengths=part.lengths * tokens) for part in encoded]

    def collate(self, examples: Encoded | EncodedImages, indices: np.ndarray) -> dict[str, Tensor]:
        """A batch on the model's device: texts padded, pixels normalised."""
        from fastrank.data import collate

        if self.task == "image-cls":
            return examples.batch(indices, self.device, self.dtype)
        batch = collate(examples, indices, self.tokenizer.pad_token_id)
        return {name: value.to(self.device) for name, value in batch.items()}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forward without labels: losses are formed by the caller, per client."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.model(**inputs).logits

    def set_training(self, *, base_dropout: bool) -> None:
        """Training mode: adapters' dropout always, the base model's own only if asked for."""
        self.model.train(base_dropout)
        if not base_dropout:
            for name, module in self.model.named_modules():
                if name.endswith(".lora_dropout"):
                    module.train()


def server_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in fp32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to("cpu", wide, copy=True).contiguous()


def load_resident(
    name: str,
    data: TextData,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_length: int = 2,
) -> ResidentModel:
    """Load a model and its tokenizer, or image processor, for a data set.

    Args:
        name: "embedded", a local folder or a hub name.
        data: decides the task and, for classification, the head's size and label names.
        seed: seeds a newly initialised head.
        max_length: tokens of the longest example, checked against the model's positions.

    Raises:
        UsageError: the model can't be found or read, or doesn't fit the task.
    """
    auto = auto_class(data.task)
    path, config, reader = load_parts(name, data.task)
    positions = getattr(config, "max_position_embeddings", None) or max_length
    if data.task != "image-cls" and max_length > positions:
        raise UsageError(
            f"max_length is {max_length} but model {name!r} has {positions} positions; lower it"
        )
    changed = name_labels(config, data, reader)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(derive_seed("init", seed))  # the head's first values
            model, info = auto.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head of other classes; the rest is checked below
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model {name!r} does not load as {auto.__name__} ({reason}); choose a model made for "
            f"{purpose(data.task)}"
        ) from error
    # names before transformers 5, since then tuples that begin with them
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    head = head_modules(model, data.task, [*info["missing_keys"], *mismatched])
    check_shapes(name, model, head, mismatched)
    return ResidentModel(model, reader, data.task, head, device, base_changed=changed)
