"""What a configuration asks for, put to what makes it: a data set, its split, local options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastrank.errors import UsageError
from fastrank.federated.local import LocalOptions
from fastrank.federated.partition import make_partition

if TYPE_CHECKING:
    import numpy as np

    from fastrank.data import Encoded, EncodedImages, Split, TextData
    from fastrank.federated.config import Config


def load(config: Config, progress: Callable[..., None]) -> TextData:
    """The data set that is named; progress(done, total, what) is told how far it is."""
    from fastrank.data import load_data

    return load_data(
        config.dataset,
        task=config.task,
        text_column=config.text_column,
        label_column=config.label_column,
        prompt_column=config.prompt_column,
        response_column=config.response_column,
        messages_column=config.messages_column,
        image_column=config.image_column,
        group_column=config.group_column,
        test_dataset=config.test_dataset,
        test_fraction=config.test_fraction,
        split=config.split,
        max_examples=config.max_examples,
        seed=config.seed,
        progress=progress,
    )


def split(
    config: Config, train: Split, encoded: Encoded | EncodedImages, given: Any = None
) -> tuple[Config, Sequence[np.ndarray]]:
    """Positions of each client's examples in the encoded training set.

    Args:
        train: the examples that were encoded.
        given: an object to use instead of the partition that is named.

    Returns:
        The configuration, with the name of the partition that was taken by default; the split.

    Raises:
        UsageError: it can't be made, or has fewer clients than a round.
    """
    from fastrank.data import select

    # a dialogue that lost its whole response to max_length is not there to be trained on
    train = select(train, encoded.kept)
    if given is None:
        default = "iid" if train.labels is None else "dirichlet"
        config = dataclasses.replace(config, partition=config.partition or default)
    partition = make_partition(
        config.partition if given is None else given,
        labels=train.labels,
        groups=train.groups,
        num_examples=len(train.examples),
        num_clients=config.num_clients,
        seed=config.seed,
        alpha=config.alpha,
        min_partition_size=config.min_partition_size,
        dialect=config.dialect,
        balance=config.balance,
        classes_per_client=config.classes_per_client,
        class_assignment_mode=config.class_assignment_mode,
        shards_per_client=config.shards_per_client,
        shard_size=config.shard_size,
        keep_incomplete_shard=config.keep_incomplete_shard,
        examples_per_client=config.examples_per_client,
        partition_index=config.partition_index,
    )
    if len(partition) < config.clients_per_round:
        raise UsageError(
            f"clients_per_round is {config.clients_per_round} but the partition gives "
            f"{len(partition)} clients; lower clients_per_round"
        )
    return config, partition


def local_options(config: Config) -> LocalOptions:
    """How every client trains."""
    return LocalOptions(
        seed=config.seed,
        batch_size=config.per_device_train_batch_size,
        epochs=config.local_epochs,
        max_steps=config.local_steps,
        group_by_length=config.group_by_length,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_ratio=config.warmup_ratio,
        base_dropout=config.base_dropout,
    )
