"""Letters as Flower's records: the header in a ConfigRecord, byte strings as uint8 arrays.

Arrays and not one long bytes value, because Flower cuts arrays into chunks on their way, so that a
payload may be larger than a gRPC or HTTP message.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fastrank.federated.flower.letters import Letter, LetterError, read_letter

_HEADER, _BLOBS = "fastrank", "payloads"


def content_of(letter: Letter) -> RecordDict:
    """The content of a message."""
    content = RecordDict({_HEADER: ConfigRecord({"header": letter.text()})})
    if letter.blobs:
        arrays = [Array(np.frombuffer(blob, dtype=np.uint8)) for blob in letter.blobs]
        content[_BLOBS] = ArrayRecord({f"{i:06d}": array for i, array in enumerate(arrays)})
    return content


def letter_of(content: RecordDict) -> Letter:
    """The letter in a message.

    Raises:
        LetterError: another app's message, or a damaged one.
    """
    header = content.config_records.get(_HEADER)
    if header is None or "header" not in header:
        raise LetterError("the message is not fastrank's: use fastrank's apps on both sides")
    arrays, blobs = content.array_records.get(_BLOBS, {}), []
    for name in sorted(arrays):
        try:
            array = arrays[name].numpy()
        except (TypeError, ValueError) as error:
            raise LetterError(f"payload {name} is no array: {error}") from None
        if array.dtype != np.uint8 or array.ndim != 1:
            raise LetterError(f"payload {name} is {array.dtype} {array.shape}; expected bytes")
        blobs.append(array.tobytes())
    return read_letter(header["header"], blobs)
