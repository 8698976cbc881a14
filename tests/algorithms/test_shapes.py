import pytest
import torch

from rlhf_exp.algorithms.shapes import at_least_float32, check_denominator, check_shapes


def test_equal_names_must_have_equal_sizes():
    check_shapes(scores=(torch.zeros(2), "B"), kl=(torch.zeros(2, 3), "B T"))
    message = r"kl has shape \[3, 2\], expected \[B, T\] with B = 2 as in scores"
    with pytest.raises(ValueError, match=message):
        check_shapes(scores=(torch.zeros(2), "B"), kl=(torch.zeros(3, 2), "B T"))


def test_number_of_dimensions():
    with pytest.raises(ValueError, match=r"scores has shape \[2, 1\], expected \[B\]"):
        check_shapes(scores=(torch.zeros(2, 1), "B"))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_dots_stand_for_the_same_dimensions(shape):
    check_shapes(logits=(torch.zeros(*shape, 5), "... V"), targets=(torch.zeros(shape), "..."))
    with pytest.raises(ValueError, match=r"targets has shape .* with \.\.\. = .* as in logits"):
        check_shapes(logits=(torch.zeros(*shape, 5), "... V"), targets=(torch.zeros(*shape, 1), "..."))


def test_dots_leave_room_for_the_named_dimensions():
    with pytest.raises(ValueError, match=r"logits has shape \[\], expected \[\.\.\., V\]"):
        check_shapes(logits=(torch.zeros(()), "... V"))


def test_the_sizes_of_dots_are_said():
    with pytest.raises(ValueError, match=r"\[3\], expected \[\.\.\.\] with \.\.\. = \(2,\) as in logits"):
        check_shapes(logits=(torch.zeros(2, 5), "... V"), targets=(torch.zeros(3), "..."))


@pytest.mark.parametrize("name", ["mask", "allowed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_masks_are_bool(name, dtype):
    check_shapes(**{name: (torch.ones(2, dtype=torch.bool), "B")})
    with pytest.raises(ValueError, match=f"{name} must be bool"):
        check_shapes(**{name: (torch.ones(2, dtype=dtype), "B")})


@pytest.mark.parametrize("bad", [0, -1, 0.0, float("nan")])
def test_denominator_must_be_positive(bad):
    check_denominator(1)
    check_denominator(torch.zeros(()))  # not read
    with pytest.raises(ValueError, match="denominator"):
        check_denominator(bad)


def test_only_half_precision_is_widened():
    for dtype in (torch.bfloat16, torch.float16):
        assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64, torch.int64):
        assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == dtype
