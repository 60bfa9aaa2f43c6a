"""The base's linear layers with quantised weights: nf4 and int8. Adapters run on top of them in the base's data type.

nf4 is QLoRA's 4-bit normal float (arXiv:2305.14314) through bitsandbytes: blocks of 64 values share one float32 absmax,
4.5 bits a value. Its double quantisation is left out: it saves 0.37 bits, and layers whose absmax are quantised
together could not be computed together (q/k/v). int8 is one scale for each output and, while it runs, one for each row
of the input (vector-wise, section 3.1 of LLM.int8(), arXiv:2208.07339), on the CPU and on CUDA alike. Outliers are not
taken out of the product: which columns hold some depends on the other rows of a batch, and so would the answer.

Embeddings, the output layer, norms and biases stay as they are. Training on a quantised base multiplies with the
dequantised weights in both directions, made anew each time instead of kept; held-out loss is that of serving.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.native import NativeKernels

_NF4_BLOCK = 64
_LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Of a row of zeros, which any scale tells rightly."""
_EXACT_INPUTS = 2**24 // 128**2
"""Inputs whose products, each of two 8-bit integers, have a sum that float32 holds exactly."""


class QuantizedLinear(torch.nn.Linear):
    """Stands where a Linear or Conv1D of the base stood. Its tensors are parameters, so that they lie in the shared
    block like all others."""

    KIND: ClassVar[str]
    STATISTICS: ClassVar[str]
    """Name of the parameter beside `weight`, float32."""

    def __init__(
        self,
        sizes: tuple[int, int],
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None,
        is_conv1d: bool = False,
    ) -> None:
        """sizes: in_features, out_features. tensors: `weight` and STATISTICS. is_conv1d: the layer was a Conv1D."""
        torch.nn.Module.__init__(self)  # Linear's would allocate a weight
        self.in_features, self.out_features = sizes
        self.is_conv1d = is_conv1d
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """weight [out_features, in_features] -> `weight` and STATISTICS on the same device."""
        raise NotImplementedError

    @classmethod
    def empty(cls, in_features: int, out_features: int) -> dict[str, torch.Tensor]:
        """What `quantize` would make, without storage."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that this layer stands for, [out_features, in_features]."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, kernels: NativeKernels | None = None) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features], bias included. Without gradients."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]"""
        if torch.is_grad_enabled():
            y: torch.Tensor = _DequantizedProduct.apply(x, self)
            return y if self.bias is None else y + self.bias
        return self.product(x)

    def plain(self) -> torch.nn.Linear | Conv1D:
        """The layer that this one stands for, over the dequantised weight and the same bias."""
        weight = self.dequantized(torch.float32 if self.bias is None else self.bias.dtype)
        with torch.device("meta"):
            layer: Any = (
                Conv1D(self.out_features, self.in_features)
                if self.is_conv1d
                else torch.nn.Linear(self.in_features, self.out_features)
            )
        layer._parameters = {
            "weight": torch.nn.Parameter(weight.t() if self.is_conv1d else weight, requires_grad=False),
            "bias": self.bias,
        }
        return layer.eval()

    @property
    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the layer that this one stands for."""
        shape = (self.out_features, self.in_features)
        shapes: dict[str, tuple[int, ...]] = {"weight": shape[::-1] if self.is_conv1d else shape}
        return shapes if self.bias is None else shapes | {"bias": (self.out_features,)}


class Nf4Linear(QuantizedLinear):
    """weight uint8 [out_features, in_features / 2], two values in each; absmax float32 [blocks]."""

    KIND = "nf4"
    STATISTICS = "absmax"
    absmax: torch.nn.Parameter

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See QuantizedLinear."""
        out_features, in_features = weight.shape
        codes, state = bitsandbytes().functional.quantize_4bit(
            weight.contiguous(), blocksize=_NF4_BLOCK, compress_statistics=False, quant_type="nf4"
        )
        return {"weight": codes.view(out_features, in_features // 2), "absmax": state.absmax.float()}

    @classmethod
    def empty(cls, in_features: int, out_features: int) -> dict[str, torch.Tensor]:
        """See QuantizedLinear."""
        blocks = in_features * out_features // _NF4_BLOCK
        return {
            "weight": torch.empty(out_features, in_features // 2, dtype=torch.uint8, device="meta"),
            "absmax": torch.empty(blocks, dtype=torch.float32, device="meta"),
        }

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """See QuantizedLinear."""
        # A block a row: on the CPU bitsandbytes takes blocks to begin with each row, which they need not.
        state = self._state((self.absmax.shape[0], _NF4_BLOCK), dtype)
        weight: torch.Tensor = bitsandbytes().functional.dequantize_4bit(self.weight.view(-1, 1), state)
        return weight.view(self.out_features, self.in_features)

    def product(self, x: torch.Tensor, kernels: NativeKernels | None = None) -> torch.Tensor:
        """See QuantizedLinear."""
        rows = x.numel() // self.in_features
        if kernels is not None and kernels.quantized.takes_nf4(self.in_features, self.out_features, rows):
            return kernels.quantized.nf4_linear(x, self.weight, self.absmax, self.bias)
        if not x.is_cuda or self.in_features % _NF4_BLOCK:
            return functional.linear(x, self.dequantized(x.dtype), self.bias)
        state = self._state((self.out_features, self.in_features), x.dtype)
        y: torch.Tensor = bitsandbytes().matmul_4bit(x, self.weight.view(-1, 1), quant_state=state, bias=self.bias)
        return y

    def _state(self, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        functions = bitsandbytes().functional
        return functions.QuantState(
            absmax=self.absmax,
            shape=torch.Size(shape),
            code=functions.get_4bit_type("nf4", device=self.weight.device),
            blocksize=_NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )


class Int8Linear(QuantizedLinear):
    """weight int8 [out_features, in_features]; scale float32 [out_features].

    On the CPU by a kernel of the engine's own, because (benchmarks/quantization.py): torch._int_mm and bitsandbytes
    over it lay the weights out anew in each call; torch's dynamic linear keeps a second copy of them and takes one
    scale for all rows, so that an answer would depend on the batch; torch._weight_int8pack_mm is slow beyond one row.
    """

    KIND = "int8"
    STATISTICS = "scale"
    scale: torch.nn.Parameter

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See QuantizedLinear."""
        codes, scale = rows_to_int8(weight)
        return {"weight": codes, "scale": scale.view(-1)}

    @classmethod
    def empty(cls, in_features: int, out_features: int) -> dict[str, torch.Tensor]:
        """See QuantizedLinear."""
        return {
            "weight": torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            "scale": torch.empty(out_features, dtype=torch.float32, device="meta"),
        }

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """See QuantizedLinear."""
        return (self.weight * self.scale[:, None]).to(dtype)

    def product(self, x: torch.Tensor, kernels: NativeKernels | None = None) -> torch.Tensor:
        """See QuantizedLinear."""
        if kernels is not None and kernels.quantized.takes_int8(self.in_features, self.out_features):
            return kernels.quantized.int8_linear(x, self.weight, self.scale, self.bias)
        codes, scale = rows_to_int8(x.reshape(-1, self.in_features))
        y = _int8_product(codes, self.weight) * scale * self.scale  # [rows, out_features] float32
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class _DequantizedProduct(torch.autograd.Function):
    """x @ W^T with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


_KINDS: dict[str, type[QuantizedLinear]] = {kind.KIND: kind for kind in (Nf4Linear, Int8Linear)}


def rows_to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, size] -> int8 [rows, size] and scale float32 [rows, 1]; their product is x but for rounding."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).div_(127).clamp_min_(_LEAST_SCALE)  # NaN stays NaN
    return (x * scale.reciprocal()).round_().to(torch.int8), scale  # the kernel's own order of operations


def _int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x int8 [rows, in], weight int8 [out, in] -> int32 [rows, out]"""
    if x.is_cuda:
        y: torch.Tensor = torch.ops.bitsandbytes.int8_linear_matmul.default(x, weight)
        return y
    return torch._int_mm(x, weight.t()) if _int_mm_is_exact() else _product_in_floats(x, weight)


@functools.cache
def _int_mm_is_exact() -> bool:
    """False on processors without VNNI: oneDNN adds pairs of products in 16 bits there, and cuts off what is larger
    ("Nuances of int8 computations" in its documentation)."""
    x, weight = torch.full((3, 64), 127, dtype=torch.int8), torch.full((16, 64), -127, dtype=torch.int8)
    weight[::2] = 127
    return torch.equal(torch._int_mm(x, weight.t()), _product_in_floats(x, weight))


def _product_in_floats(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `_int8_product`, in float32: sums of so few products are whole numbers that it holds."""
    y = torch.zeros(len(x), len(weight), dtype=torch.int32)
    for x_part, weight_part in zip(x.split(_EXACT_INPUTS, 1), weight.split(_EXACT_INPUTS, 1), strict=True):
        y += (x_part.float() @ weight_part.float().t()).to(torch.int32)
    return y


def bitsandbytes() -> Any:
    """The library. Raises FailedPrecondition if it is not installed or does not work."""
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        return loaded
    # While it is imported, bitsandbytes fetches compiled code from the hub if it finds the package `kernels`, and gives
    # advice if not. Nothing is run here that the operator has not installed.
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # ImportError, and whatever a library that does not fit this torch raises
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not work here ({error})"
        raise FailedPrecondition(
            f"--quantization needs bitsandbytes, which {why}: pip install 'graftwork[quant]', or use --quantization "
            "none, or int8 on a CPU",
            reason="BITSANDBYTES_MISSING",
        ) from None
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def check_available(quantization: str, device: torch.device) -> None:
    """Raises FailedPrecondition if the library that `quantization` needs on `device` is missing."""
    if quantization == "nf4" or (quantization == "int8" and device.type == "cuda"):
        bitsandbytes()


def quantize_linears(model: torch.nn.Module, quantization: str, device: torch.device) -> None:
    """Replaces the linear layers of `model` but the output layer by quantised ones on `device`, one after another, so
    that the weights as they were are never on the device together. "none" does nothing.

    Raises FailedPrecondition for a model that holds its experts as stacked matrices: they would stay as large as ever.
    """
    if quantization == "none":
        return
    kind = _KINDS[quantization]
    stacks = sorted({name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.dim() == 3})
    if stacks:
        raise FailedPrecondition(
            f"--quantization {quantization}: {type(model).__name__} holds its experts as stacked matrices "
            f"({', '.join(stacks)}), which are not quantised; models whose weights are linear layers are",
            reason="MODEL_UNSUPPORTED",
        )
    for name, layer in _linear_layers(model).items():
        weight = layer.weight.detach().to(device)
        tensors = kind.quantize(weight.t() if isinstance(layer, Conv1D) else weight)
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        _replace(model, name, kind(_sizes(layer), tensors, bias, isinstance(layer, Conv1D)))


def quantized_skeleton(model: torch.nn.Module, quantization: str) -> None:
    """The same for a model whose parameters have no storage yet."""
    if quantization == "none":
        return
    kind = _KINDS[quantization]
    for name, layer in _linear_layers(model).items():
        bias = None if layer.bias is None else layer.bias.detach()
        _replace(model, name, kind(_sizes(layer), kind.empty(*_sizes(layer)), bias, isinstance(layer, Conv1D)))


def _linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear | Conv1D]:
    """What is quantised, by name. Layers that do not fill nf4's blocks stay as they are; hardly a model has one."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not output
        and math.prod(_sizes(module)) % _NF4_BLOCK == 0
    }


def _sizes(layer: torch.nn.Linear | Conv1D) -> tuple[int, int]:
    """in_features, out_features"""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def _replace(model: torch.nn.Module, name: str, layer: QuantizedLinear) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer.eval())
