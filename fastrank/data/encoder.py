"""The small pretrained encoder that ships with fastrank."""

from pathlib import Path

from fastrank.errors import UsageError


def encoder_path() -> Path:
    """Return the folder of the embedded encoder, for `from_pretrained`.

    A ModernBERT of 4 layers and 256 hidden units with mean pooling, stored in 16 bits;
    pretrain.json beside the weights says how it was made.

    Raises:
        UsageError: the installed package lacks the weights.
    """
    folder = Path(__file__).parent / "encoder"
    missing = [
        n
        for n in ("config.json", "model.safetensors", "tokenizer.json")
        if not (folder / n).exists()
    ]
    if missing:
        raise UsageError(
            f"the embedded encoder in {folder} lacks {', '.join(missing)}; reinstall fastrank or "
            "give --model NAME_OR_FOLDER"
        )
    return folder
