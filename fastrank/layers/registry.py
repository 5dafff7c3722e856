"""Which of PEFT's layer classes has a fused one."""

import sys

from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import Linear as PeftLinear

from fastrank.layers.adalora import FastAdaLoraLinear
from fastrank.layers.fused import FusedLayer
from fastrank.layers.lora import FastLoraLinear

# what `patch` looks for, for messages
LOOKED_FOR = (
    "peft.tuners.lora.Linear, Linear4bit, Linear8bitLt; "
    "peft.tuners.adalora.SVDLinear, SVDLinear4bit, SVDLinear8bitLt"
)


def fast_classes() -> dict[type, type[FusedLayer]]:
    """PEFT's class -> ours; exact types only, since a subclass may have a forward of its own."""
    classes = {PeftLinear: FastLoraLinear, SVDLinear: FastAdaLoraLinear}
    # PEFT imports bitsandbytes once a model has layers of it
    if "peft.tuners.lora.bnb" in sys.modules or "peft.tuners.adalora.bnb" in sys.modules:
        from fastrank.layers import quantised

        classes |= quantised.CLASSES
    return classes
