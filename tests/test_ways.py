"""The way of a call to its kernel: what must not go straight to one, and what is refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import dispatch, functional
from fastnorm.ops import activation
from fastnorm.ops.weight_norm import group

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": lambda x: functional.swish(x, torch.tensor([1.5], device=x.device)),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),  # type: ignore[return-value]
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "mean_only": lambda x: functional.mean_only_batch_norm(x, None, None, True),
    "weight_norm": lambda x: functional.weight_norm(x, torch.ones(8, 1, device=x.device)),
    "weight_norm_group": lambda x: fastnorm.ops.weight_norm.group.weight_norm_group(
        [x, x], [torch.ones(8, 1, device=x.device)] * 2, [0, 0], [None, None]
    )[1],
}


@pytest.mark.parametrize("name", LAYERS)
def test_batched_gradients(name: str, backend: str, device: str) -> None:
    x = torch.randn(8, 4, device=device, requires_grad=True)
    y, dys = LAYERS[name](x), torch.randn(3, 8, 4, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are faster ways to batch
        (found,) = torch.autograd.grad(y, x, dys, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(found, torch.stack(each))
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["silu", "swish", "layer_norm", "batch_norm"])
def test_a_tensor_that_vmap_has_left_behind_is_torchs_error(name: str, backend: str) -> None:
    left: list[Tensor] = []
    torch.func.vmap(lambda t: (left.append(t), t.sum())[1])(torch.randn(2, 8, 4))
    with pytest.raises(RuntimeError, match="may have escaped from inside a function being vmapped"):
        LAYERS[name](left[0])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("only_mean", [True, False])
def test_a_count_that_no_kernel_can_reach(
    only_mean: bool, dtype: torch.dtype, momentum: float | None, backend: str, device: str
) -> None:
    """On another device, or no int64: what torch's layers count too."""
    x = torch.randn(8, 4, device=device).to(dtype)
    count = torch.tensor(1.0)  # on a CPU, where only a GPU's tensors are another device's
    mean, var = torch.ones(4, device=device), torch.ones(4, device=device)
    if only_mean:
        y = functional.mean_only_batch_norm(
            x, mean, None, True, momentum, num_batches_tracked=count
        )
        torch.testing.assert_close(y, x - x.float().mean(0).to(dtype), atol=1e-2, rtol=1e-2)
    else:
        weight = torch.ones(4, dtype=dtype, device=device)
        functional.batch_norm(
            x, mean, var, weight, weight, True, momentum, num_batches_tracked=count
        )
    share = 0.5 if momentum is None else momentum
    torch.testing.assert_close(mean, (1 - share) + share * x.float().mean(0))
    assert count == 2


def test_a_count_without_data_counts_nothing(backend: str, device: str) -> None:
    x, mean = torch.randn(8, 4, device=device), torch.zeros(4, device=device)
    count = torch.zeros((), dtype=torch.int64, device="meta")
    functional.mean_only_batch_norm(x, mean, None, True, num_batches_tracked=count)
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


STRIDES = [
    ((1, 4, 4), (3, 4, 1)),
    ((4, 1), (1, 9)),
    ((2, 4, 1, 1), (4, 1, 4, 4)),
    ((2, 1, 4, 4), (16, 1, 4, 1)),
]


@pytest.mark.parametrize("shape, strides", STRIDES)
def test_strides_of_size_1_are_torchs(
    shape: tuple[int, ...], strides: tuple[int, ...], backend: str, device: str
) -> None:
    x = torch.empty_strided(shape, strides, device=device).normal_()
    statistics = [torch.ones(shape[1], device=device)] * 2
    y = functional.batch_norm(x, *statistics)
    assert y.stride() == torch.nn.functional.batch_norm(x, *statistics).stride()
    z = functional.layer_norm(x, shape[-1:])
    assert z.stride() == torch.nn.functional.layer_norm(x, shape[-1:]).stride()


def test_a_backend_that_is_not_there_is_refused_after_the_layers_own_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_serves", lambda *_: False)
    monkeypatch.setattr(dispatch, "_served", dispatch._served.__wrapped__)
    x = torch.randn(8, 4)
    with fastnorm.backend("triton"):
        empty = functional.batch_norm(x[:0], torch.zeros(4), torch.ones(4))
        with pytest.raises(NotImplementedError, match="give a floating-point tensor"):
            functional.silu(torch.ones(3, dtype=torch.long))
        with pytest.raises(ValueError, match="expected 2D or 3D input"):
            fastnorm.BatchNorm1d(4)(x[0])
        with pytest.raises(ValueError, match="unknown activation 'swash'"):
            functional.batch_norm(x, None, None, training=True, activation="swash")
        with pytest.raises(RuntimeError, match="'triton' was forced but cannot serve this call"):
            functional.silu(x)
    assert empty.shape == (0, 4)


def test_parameters_that_are_no_floats_are_named(backend: str, device: str) -> None:
    x, whole = torch.randn(8, 4, device=device), torch.ones(4, dtype=torch.int64, device=device)
    with pytest.raises(NotImplementedError, match=r"bias is torch\.int64: give a floating-point"):
        functional.mean_only_batch_norm(x, None, whole, True)
    with pytest.raises(NotImplementedError, match=r'"swish" not implemented for torch\.int64'):
        functional.swish(x, whole)


@pytest.mark.cuda
def test_a_dtype_that_the_extension_lacks(device: str) -> None:
    if fastnorm.backends()["cuda"] is not None:
        pytest.skip(f"needs the CUDA backend: {fastnorm.backends()['cuda']}")
    x = torch.randn(64, 64, device=device).to(torch.float8_e4m3fn)
    text = r"takes float32, bfloat16, float16, float64, and was given torch\.float8_e4m3fn"
    with fastnorm.backend("cuda"), pytest.raises(TypeError, match=text):
        functional.silu(x)


@pytest.mark.cuda
def test_a_tensor_without_data_is_refused(device: str) -> None:
    if fastnorm.backends()["cuda"] is not None:
        pytest.skip(f"needs the CUDA backend: {fastnorm.backends()['cuda']}")
    x = torch._efficientzerotensor((3, 5), device=device)
    with fastnorm.backend("cuda"), pytest.raises(ValueError, match="a tensor without data"):
        functional.silu(x)


def test_layers_of_two_devices_are_no_group(backend: str, device: str) -> None:
    from fastnorm.ops.weight_norm.group import weight_norm_group

    v = [torch.ones(2, 3, device=device), torch.ones(2, 3, device="meta")]
    g = [torch.ones(2, 1, device=device)] * 2
    with pytest.raises(RuntimeError, match=r"on the same device, and they are on .*meta"):
        weight_norm_group(v, g, [0, 0], [None, None])


@pytest.mark.parametrize("name", ["triton", "cuda", "reference"])
def test_a_tensor_that_is_not_on_the_current_device_goes_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several GPUs, which no machine of the tests has: one is made up."""

    class OnSecond:
        is_cuda, is_cpu = True, False
        get_device = staticmethod(lambda: 1)

    x: Any = OnSecond()
    monkeypatch.setattr(dispatch, "_watched", lambda _: False)
    monkeypatch.setattr(dispatch, "_served", lambda *_: (name, 0))
    monkeypatch.setattr(dispatch, "select", lambda *_: name)
    monkeypatch.setattr(dispatch, "_current_device", lambda: 1)
    assert dispatch.way("activation", x) == dispatch.way_to_backend("activation", x) == name
    monkeypatch.setattr(dispatch, "_current_device", lambda: 0)
    elsewhere = name if name == "reference" else f"{name} elsewhere"
    assert dispatch.way("activation", x) == dispatch.way_to_backend("activation", x) == elsewhere


def test_kernels_launch_on_the_device_of_their_tensors(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend not in dispatch.ELSEWHERE:
        pytest.skip("torch's own functions see to the device themselves")
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    x, w = torch.randn(8, 4, device=device), torch.ones(8, 1, device=device)
    for op, inputs in (
        (activation._forward, (x, "silu")),
        (group._forward, ([x], [w], [0], [0.0])),
    ):
        y = op.by[dispatch.ELSEWHERE[backend]](*inputs)
        torch.testing.assert_close(y, op.by[backend](*inputs))
    assert entered == [x.device] * 2


class Stop(torch.autograd.Function):
    """x + p, without a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        return x + p

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, dy


@pytest.mark.parametrize("name", LAYERS)
def test_what_gets_no_gradient_gives_none(name: str, backend: str, device: str) -> None:
    if name == "weight_norm_group":
        pytest.skip("its test is test_weight_norm_group.py's: layers that are not used")
    x, p = (torch.randn(8, 4, device=device, requires_grad=True) for _ in range(2))
    y = Stop.apply(LAYERS[name](x), p)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None, "as torch's layers: an optimizer must not see zeros"
    assert p.grad is not None


def test_in_place_is_a_change_where_no_gradient_is_needed(backend: str, device: str) -> None:
    x, w = torch.randn(4, device=device), torch.randn(4, device=device, requires_grad=True)
    y = x * w
    functional.silu(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        z = torch.ones(4, device=device)
        assert functional.silu(z, inplace=True) is z


def test_in_place_through_a_view_that_negates(backend: str, device: str) -> None:
    z = torch.randn(3, 4, dtype=torch.complex64, device=device)
    x, expected = z.conj().imag, torch.nn.functional.silu(-z.imag)
    assert x.is_neg()
    assert functional.silu(x, inplace=True) is x
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(z.imag, -expected)


@pytest.mark.parametrize(
    "shape, normalized", [((2, 0), (2, 0)), ((4, 2, 0), (2, 0)), ((3, 0), (0,))]
)
def test_layer_norm_of_nothing(
    shape: tuple[int, ...], normalized: tuple[int, ...], backend: str, device: str
) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = functional.layer_norm(x, normalized)
    assert isinstance(y, Tensor)
    assert y.shape == shape
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
