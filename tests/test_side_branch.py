"""A LoRA beside a layer equals the same LoRA in its weight."""

from __future__ import annotations

import copy

import packed_layers
import pytest
import torch
from torch.nn import Conv1d, Conv2d, Conv3d, Embedding, GroupNorm, Linear, Module, Parameter, Sequential

from freq_loss_plugin.lora.side_branch import Bias, Dense, LowRank, attached, can_attach, weight_shape

R, SCALE, STRENGTH = 3, 0.7, -1.3
LAYERS = {
    "linear": (lambda: Linear(6, 10), (2, 5, 6), (R, 6), (10, R)),
    "linear without bias": (lambda: Linear(6, 10, bias=False), (2, 6), (R, 6), (10, R)),
    "linear, weights of a 1 × 1 convolution": (lambda: Linear(6, 10), (2, 5, 6), (R, 6, 1, 1), (10, R, 1, 1)),
    "1 × 1 convolution": (lambda: Conv2d(6, 10, 1), (2, 6, 7, 5), (R, 6, 1, 1), (10, R, 1, 1)),
    "1 × 1 convolution, weights of a linear layer": (lambda: Conv2d(6, 10, 1), (2, 6, 7, 5), (R, 6), (10, R)),
    "convolution": (lambda: Conv2d(6, 10, 3, padding=1), (2, 6, 7, 5), (R, 6, 3, 3), (10, R, 1, 1)),
    "with a stride": (lambda: Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 5), (R, 6, 3, 3), (10, R, 1, 1)),
    "dilated": (lambda: Conv2d(6, 10, 3, dilation=2), (2, 6, 9, 9), (R, 6, 3, 3), (10, R)),
    "one dimension": (lambda: Conv1d(6, 10, 3), (2, 6, 9), (R, 6, 3), (10, R, 1)),
    "three dimensions": (lambda: Conv3d(6, 10, 3, padding=1), (1, 6, 4, 5, 6), (R, 6, 3, 3, 3), (10, R, 1, 1, 1)),
}


def patched(layer, change):
    """The layer with the change in its weight."""
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        merged.weight += change.reshape(merged.weight.shape)
    return merged


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_beside_is_inside(kind):
    make, shape, down_shape, up_shape = LAYERS[kind]
    layer, x, down, up = make(), torch.randn(shape), torch.randn(down_shape), torch.randn(up_shape)
    before = copy.deepcopy(layer.state_dict())
    change = up.flatten(1) @ down.flatten(1)
    branch = LowRank(up, down, SCALE)
    with attached({layer: [branch]}, STRENGTH):
        made = layer(x)
    torch.testing.assert_close(made, patched(layer, STRENGTH * SCALE * change)(x), atol=2e-5, rtol=1e-4)
    full = Dense(lambda device: SCALE * change.reshape(layer.weight.shape).to(device))
    with attached({layer: [full]}, STRENGTH):
        torch.testing.assert_close(layer(x), made, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("layer", [Linear(6, 10), Conv2d(6, 10, 1)], ids=["linear", "convolution"])
@torch.no_grad()
def test_outputs_of_a_layer_that_combines_several(layer):
    x = torch.randn((2, 5, 6) if isinstance(layer, Linear) else (2, 6, 5, 4))
    up, down = torch.randn(4, R), torch.randn(R, 6)
    change = torch.zeros(10, 6)
    change[3:7] = up @ down
    expected = patched(layer, STRENGTH * change)(x)
    with attached({layer: [LowRank(up, down, 1.0, padding=(3, 3))]}, STRENGTH):
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [Linear(6, 10), Conv2d(6, 10, 1)], ids=["linear", "convolution"])
@torch.no_grad()
def test_a_bias(layer):
    x, values = torch.randn((2, 5, 6) if isinstance(layer, Linear) else (2, 6, 5, 4)), torch.randn(10)
    merged = copy.deepcopy(layer)
    merged.bias += STRENGTH * values
    with attached({layer: [Bias(values)]}, STRENGTH):
        torch.testing.assert_close(layer(x), merged(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_several_branches_add_up_and_blocks_may_be_nested():
    layer, x = Linear(6, 10), torch.randn(3, 6)
    first, second = (LowRank(torch.randn(10, R), torch.randn(R, 6), SCALE) for _ in range(2))
    plain = layer(x)
    with attached({layer: [first]}, 1.0):
        one = layer(x)
        with attached({layer: [second]}, 2.0):
            nested = layer(x)
        assert torch.equal(layer(x), one)
    with attached({layer: [first, second]}, 1.0):
        both = layer(x)
    assert torch.equal(layer(x), plain)
    with attached({layer: [second]}, 1.0):
        other = layer(x)
    torch.testing.assert_close(both - plain, (one - plain) + (other - plain), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(nested - plain, (one - plain) + 2 * (other - plain), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_nothing_stays_whatever_happens_inside():
    layer, x = Linear(6, 10), torch.randn(3, 6)
    plain = layer(x)
    wrong = LowRank(torch.randn(10, R), torch.randn(R, 7), 1.0)
    with pytest.raises(RuntimeError), attached({layer: [wrong]}, 1.0):
        layer(x)
    assert torch.equal(layer(x), plain)
    assert not layer._forward_hooks


@torch.no_grad()
def test_strength_zero_attaches_nothing():
    layer = Linear(6, 10)
    with attached({layer: [LowRank(torch.randn(10, R), torch.randn(R, 6), 1.0)]}, 0.0):
        assert not layer._forward_hooks


@torch.no_grad()
def test_it_follows_the_dtype_of_the_input_and_releases_its_copies():
    branch = LowRank(torch.randn(10, R, dtype=torch.float16), torch.randn(R, 6, dtype=torch.float16), 1.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer = Linear(6, 10).to(dtype)
        with attached({layer: [branch]}, 1.0):
            assert layer(torch.randn(2, 6, dtype=dtype)).dtype == dtype
        ((down, up),) = branch._on_device.values()
        assert down.dtype == up.dtype == dtype
    branch.release()
    assert not branch._on_device


def test_layers_that_a_branch_can_stand_beside():
    assert can_attach(Linear(2, 2))
    assert can_attach(Conv2d(2, 2, 1))
    assert not can_attach(Conv2d(2, 2, 1, groups=2))
    assert not can_attach(GroupNorm(1, 2))
    assert not can_attach(Sequential())
    assert not can_attach(Embedding(2, 2))
    assert can_attach(packed_layers.GGMLLinear(Linear(64, 32)))
    assert can_attach(packed_layers.NF4Linear(Linear(64, 32)))
    assert not can_attach(packed_layers.UnknownLinear(Linear(64, 32)))


def experts(dtype):
    """Several layers in one, as ComfyUI has them for mixtures of experts."""
    made = Module()
    made.in_features, made.out_features = 6, 4
    made.weight = Parameter(torch.zeros(3, 4, 6, dtype=dtype), requires_grad=False)
    return made


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Linear(6, 10), (10, 6)),
        (Conv2d(6, 10, 3), (10, 6, 3, 3)),
        (GroupNorm(1, 2), (2,)),
        (packed_layers.GGMLLinear(Linear(64, 32)), (32, 64)),
        (packed_layers.NF4Linear(Linear(64, 32)), (32, 64)),
        (packed_layers.UnknownLinear(Linear(64, 32)), None),
        (experts(torch.float32), (3, 4, 6)),
        (experts(torch.uint8), None),
        (Sequential(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_shape_of_a_weight_that_may_be_packed(layer, shape):
    assert weight_shape(layer) == shape


def test_layers_of_experts_are_no_linear_layers():
    assert not can_attach(experts(torch.float32))


@torch.no_grad()
def test_compiled_code_sees_the_branches_of_every_call_and_none_afterwards():
    inner = Linear(6, 10)
    model = torch.compile(Sequential(inner, torch.nn.ReLU()), backend="eager")
    plain, x = Sequential(inner, torch.nn.ReLU()), torch.randn(3, 6)
    branch = LowRank(torch.randn(10, R), torch.randn(R, 6), SCALE)
    for strength in (1.0, 0.0, -0.5, 1.0):
        with attached({inner: [branch]}, strength) as executed:
            made, expected = model(x), plain(x)
        assert torch.equal(made, expected)
        assert executed == ({inner} if strength else set())
        assert torch.equal(model(x), plain(x))


@torch.no_grad()
def test_skipped_layers_are_not_among_the_executed():
    first, second = Linear(6, 10), Linear(6, 10)
    branch = LowRank(torch.randn(10, R), torch.randn(R, 6), SCALE)
    with attached({first: [branch], second: [branch]}, 1.0) as executed:
        assert executed == set()
        first(torch.randn(3, 6))
        assert executed == {first}
