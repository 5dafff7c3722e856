"""The accounting at M 8192, K = N = 4096 in bf16: passes by hand, and overheads per GPU."""

import pytest

from fastrank.bench import roofline
from fastrank.bench.cases import Case

M, D = 8192, 4096
PASS_BYTES = 2 * M * D
# dense bf16 FLOP/s and bytes/s, with what of them real code gets
H100, H200, A100 = ((0.72 * f, 0.85 * b) for f, b in (
    (989e12, 3.35e12), (989e12, 4.8e12), (312e12, 2.04e12)))  # fmt: skip

# schedule: passes forward, backward; overhead in percent on each GPU
TABLE = {
    "floor": (0, 1, 3, 2, 2),
    "split": (1, 2, 9, 6, 5),
    "lorafusion-dropout": (3.5, 2.5, 18, 13, 9),
    "add-single-read": (3, 4, 21, 15, 11),
    "add": (3, 5, 24, 17, 13),
    "unsloth": (3, 7, 31, 21, 16),
    "peft-16-bit": (7, 9, 49, 34, 25),
    "peft-16-bit-dropout": (9.5, 11.5, 64, 45, 33),
    "peft-autocast": (13, 15, 86, 60, 44),
    "peft": (19, 24, 131, 92, 68),
}


@pytest.mark.parametrize("name", TABLE)
def test_passes_and_overheads(name):
    forward, backward, *percent = TABLE[name]
    schedule = roofline.SCHEDULES[name]
    assert (schedule.forward, schedule.backward) == (forward, backward)
    assert schedule.bytes(M, D, D) == (forward + backward) * PASS_BYTES
    for (flops, bandwidth), wanted in zip((H100, H200, A100), percent, strict=True):
        found = 100 * roofline.overhead(name, M, D, D, flops, bandwidth)
        assert found == pytest.approx(wanted, abs=0.75), (name, found)


def test_the_frozen_layer():
    for (flops, _), milliseconds in zip((H100, H200, A100), (0.772, 0.772, 2.447), strict=True):
        assert 1e3 * roofline.frozen_seconds(M, D, D, flops) == pytest.approx(
            milliseconds, abs=5e-4
        )
    assert roofline.overhead("frozen", M, D, D, *H200) == 0.0


def test_inputs_and_outputs_are_counted_by_their_own_width():
    # unsloth: X for S, dA, S again and dx twice; y and dY five times
    assert roofline.SCHEDULES["unsloth"].bytes(10, 3, 100) == 2 * 10 * (5 * 3 + 5 * 100)


def test_every_variant_has_its_schedule():
    def of(variant, precision="16-bit", dropout=0.0):
        case = Case(1, 1, 1, 1, "bfloat16", dropout, precision=precision)
        return roofline.schedule_of(variant, case)

    assert of("frozen") == "frozen"
    assert of("fastrank", dropout=0.1) == "split"
    assert of("unsloth-schedule") == "unsloth"
    assert of("lorafusion-schedule") == "split"
    assert of("lorafusion-schedule", dropout=0.1) == "lorafusion-dropout"
    assert of("something else") is None
    for precision in ("16-bit", "autocast", "peft"):
        for dropout in (0.0, 0.1):
            assert of("peft", precision, dropout) in roofline.SCHEDULES
            assert of("peft", precision, dropout).endswith("-dropout") == (dropout > 0)
