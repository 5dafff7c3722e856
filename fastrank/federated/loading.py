"""What goes with a model: class, configuration, tokenizer or image processor, task head."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from fastrank.errors import UsageError
from fastrank.federated.quiet import quiet

if TYPE_CHECKING:
    from fastrank.data import TextData

_AUTO = {
    "seq-cls": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-cls": "AutoModelForImageClassification",
}
_PURPOSE = {
    "seq-cls": "classification",
    "causal-lm": "causal language modelling",
    "image-cls": "image classification",
}
# classifier heads under the names transformers gives them, for checkpoints that bring their own
_HEAD_NAMES = ("classifier", "score", "pre_classifier", "classification_head")


def auto_class(task: str) -> Any:
    """The transformers class that loads a model for a task."""
    import transformers

    return getattr(transformers, _AUTO[task])


def purpose(task: str) -> str:
    """A task in words."""
    return _PURPOSE[task]


def load_parts(name: str, task: str) -> tuple[str, Any, Any]:
    """Where a model lies, its configuration, and its tokenizer or image processor.

    Args:
        name: "embedded", a local folder or a hub name.

    Raises:
        UsageError: they can't be found or read, or don't go with the task.
    """
    import transformers

    from fastrank.data import encoder_path

    path = str(encoder_path()) if name == "embedded" else name
    if (
        name != "embedded"
        and not os.path.isdir(path)
        and (path.startswith((".", "/", "~")) or path.count("/") > 1)
    ):
        raise UsageError(
            f"model: no folder {path!r}; give a local folder, a hub name or 'embedded'"
        )
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            check_input(name, config, task)
            return path, config, load_reader(path, task)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model {name!r} could not be loaded ({reason}); give a local folder with config.json, "
            f"{'image processor' if task == 'image-cls' else 'tokenizer'} and weights, a hub "
            "name that this machine can reach, or 'embedded'"
        ) from error


def check_input(name: str, config: Any, task: str) -> None:
    """Raise a UsageError where a model takes images and the data is text, or the reverse."""
    import transformers

    kind = type(config)
    sees = kind in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if task == "image-cls" and not sees:
        raise UsageError(
            f"the data is images, but model {name!r} ({kind.__name__}) takes none; give --model "
            "one made for image classification, such as google/vit-base-patch16-224-in21k"
        )
    reads = (
        kind in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        or kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    if task != "image-cls" and sees and not reads:
        raise UsageError(
            f"the data is text, but model {name!r} ({kind.__name__}) takes images; give --dataset "
            "a folder of images, or --model one made for text"
        )


def load_reader(path: str, task: str) -> Any:
    """The tokenizer of a model, ready for batches, or its image processor.

    Raises:
        UsageError: images without Pillow, or a tokenizer that can't pad.
        OSError, ValueError: transformers can't find or read it.
    """
    import transformers

    if task != "image-cls":
        from fastrank.data import prepare_tokenizer

        return prepare_tokenizer(
            transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        )
    from fastrank.data.images import need_pillow

    need_pillow()
    # Pillow and NumPy also where torchvision is installed: pixels must not depend on that
    known = find_spec("transformers.image_processing_backends") is not None
    how = {"backend": "pil"} if known else {"use_fast": False}  # before transformers 5
    return transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False, **how)


def name_labels(config: Any, data: TextData, reader: Any) -> bool:
    """Give a configuration the data's label names, and padding; whether that changed it."""
    if not data.label_names:
        return False
    changes: dict[str, Any] = {}
    labels = dict(enumerate(data.label_names))
    if config.id2label != labels:
        changes = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    if data.task == "seq-cls" and config.pad_token_id is None:
        changes["pad_token_id"] = reader.pad_token_id
    for key, value in changes.items():
        setattr(config, key, value)
    return bool(changes)


def head_modules(model: nn.Module, task: str, new: Iterable[str]) -> tuple[str, ...]:
    """The task head: modules the checkpoint lacked, else those with a classifier's usual names.

    Args:
        new: names of weights that are newly initialised.

    Raises:
        UsageError: a model for classification has neither.
    """
    if task == "causal-lm":
        return ()
    children = [name for name, _ in model.named_children()]
    base = getattr(model, "base_model_prefix", "")
    first = {key.split(".")[0] for key in new} - {base}
    head = tuple(c for c in children if c in first) or tuple(
        c for c in children if c in _HEAD_NAMES
    )
    if not head:
        raise UsageError(
            f"{type(model).__name__} has no classification head that fastrank knows: its modules "
            f"are {', '.join(children)}, wanted one of {', '.join(_HEAD_NAMES)}"
        )
    return head


def check_shapes(
    name: str, model: nn.Module, head: tuple[str, ...], mismatched: Iterable[str]
) -> None:
    """Raise a UsageError where weights outside the head have other shapes than the checkpoint's."""
    base = getattr(model, "base_model_prefix", "")
    for key in mismatched:
        if key.split(".")[0] not in head or key.split(".")[0] == base:
            raise UsageError(
                f"model {name!r}: its weight {key} has another shape than its config.json says; "
                "is the folder complete?"
            )
