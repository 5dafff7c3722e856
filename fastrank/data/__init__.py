"""Data sets for simulations: the embedded task, files, images, hub names; the embedded encoder.

Importing this package loads none of torch, transformers, datasets and pyarrow; each public name is
loaded when it is first used.
"""

from fastrank._lazy import lazy

# public name -> module that defines it
_LAZY = {
    "Dialogue": "fastrank.data.schema",
    "Encoded": "fastrank.data.encoding",
    "EncodedImages": "fastrank.data.pixels",
    "Example": "fastrank.data.schema",
    "ImageFile": "fastrank.data.schema",
    "Split": "fastrank.data.schema",
    "TextData": "fastrank.data.schema",
    "collate": "fastrank.data.encoding",
    "encode": "fastrank.data.encoding",
    "encode_images": "fastrank.data.pixels",
    "encoder_path": "fastrank.data.encoder",
    "load_data": "fastrank.data.load",
    "prepare_tokenizer": "fastrank.data.encoding",
    "select": "fastrank.data.rows",
}

__getattr__, __dir__ = lazy(globals(), _LAZY)
__all__ = sorted(_LAZY)
