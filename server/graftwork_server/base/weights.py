"""The base weights as one block of memory that other processes can map.

On CPU the block is an anonymous file (memfd): the engine maps it shared, a tuner maps it copy-on-write, so that both
see the same physical pages and nothing a strategy does can change what is served. On CUDA it is one allocation,
opened in the tuner through CUDA IPC. Linear layers that are computed together (q/k/v, gate/up) lie side by side, so
that one GEMM over the block serves them all without a second copy.
"""

from __future__ import annotations

import copy
import json
import mmap
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from graftwork_server.base.quantization import quantized_skeleton
from graftwork_server.errors import Internal
from graftwork_server.kernels.attention import packed
from graftwork_server.kernels.attention.rotary import rotate_by_length
from graftwork_server.wire.tuning import SharedWeightsInfo, TensorLayout

_ALIGNMENT = 64
"""Bytes; a cache line, and enough for vector loads."""

FUSED_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
"""Names of sibling linear layers that take the same input."""


class SharedWeights:
    """The engine's side: moves a model's tensors into one block and describes it."""

    def __init__(self, model: torch.nn.Module, device: torch.device, quantization: str = "none") -> None:
        """Moves every parameter and persistent buffer of `model` into the block, one after another, so that the peak
        is the block plus what is not yet moved."""
        tensors = _unique_tensors(model)
        self.layout = _lay_out(tensors)
        self.size_bytes = _size_of(self.layout, tensors)
        self.device = device
        self._quantization = quantization
        self._fd: int | None = None
        self._map: mmap.mmap | None = None
        if device.type == "cpu":
            self._fd = _anonymous_file(self.size_bytes)
            self._map = mmap.mmap(self._fd, self.size_bytes)
            self.block = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self.block = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self._config_json = json.dumps(model.config.to_dict() | {"architectures": [type(model).__name__]})  # type: ignore[operator, union-attr]
        with torch.no_grad():
            for entry in self.layout:
                view = _view(self.block, entry)
                view.copy_(tensors[entry.name])
                tensors[entry.name].data = view

    def info(self) -> SharedWeightsInfo:
        """What another process needs to map the block. On CPU it must inherit the file descriptor `fd`."""
        ipc: list[Any] | None = None
        if self.device.type == "cuda":
            ipc = list(self.block.untyped_storage()._share_cuda_())
        return SharedWeightsInfo(
            device=str(self.device),
            size_bytes=self.size_bytes,
            layout=self.layout,
            fd=self._fd,
            ipc=ipc,
            config_json=self._config_json,
            quantization=self._quantization,
        )


def map_base_model(info: SharedWeightsInfo) -> torch.nn.Module:
    """The base model over the engine's block: evaluation mode, frozen, packed attention, no weight copied.

    On CPU the mapping is copy-on-write. Raises Internal if the block and the model do not fit each other.
    """
    config_dict = json.loads(info.config_json)
    config = AutoConfig.for_model(config_dict.pop("model_type"), **config_dict)
    model = empty_model(config, info.quantization)
    block = _open_block(info)
    views = {entry.name: _view(block, entry) for entry in info.layout}
    assign_tensors(model, views)
    # Buffers that no checkpoint has, such as rotary tables, were computed on the CPU.
    return model.to(block.device).eval().requires_grad_(False)


def empty_model(config: Any, quantization: str = "none") -> torch.nn.Module:
    """A model of `config` whose parameters have no storage yet; its computed buffers (rotary tables) are real."""
    # from_config writes the attention's name into what it gets, and a model that runs in another thread reads it there.
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=packed.NAME)
        quantized_skeleton(model, quantization)
    rotate_by_length(model)
    return model


def assign_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Makes `tensors` the model's own, by name, without a copy, and ties what is tied and has no tensor of its own, as
    transformers does when it loads.

    Raises Internal if a name is unknown or a parameter is left without storage.
    """
    for name, tensor in tensors.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if leaf in parent._parameters:
            parent._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
        elif leaf in parent._buffers:
            parent._buffers[leaf] = tensor
        else:
            raise Internal(f"the model has no tensor {name}", reason="WEIGHTS_LAYOUT")
    tied: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    for name, other in list(tied.items()):
        if name in tensors and other in tensors:
            del tied[name]
    model.tie_weights(recompute_mapping=False)  # type: ignore[operator]
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise Internal(f"no weights for {', '.join(missing[:3])}", reason="WEIGHTS_LAYOUT")


def pack(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same tensors in one private block on `device`, laid out as the base's are, so that siblings can be fused."""
    layout = _lay_out(tensors)
    block = torch.empty(_size_of(layout, tensors), dtype=torch.uint8, device=device)
    views = {entry.name: _view(block, entry) for entry in layout}
    for name, view in views.items():
        view.copy_(tensors[name])
    return views


def _unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = set(model.state_dict())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return tensors


def _fused_order(names: Iterable[str]) -> list[str]:
    """Names in their order, those of siblings that are computed together moved behind the first of them."""
    remaining = dict.fromkeys(names)
    ordered: list[str] = []
    for name in list(remaining):
        if name not in remaining:
            continue
        *prefix, module, kind = name.split(".") if name.count(".") >= 1 else ["", name, ""]
        group = next((siblings for siblings in FUSED_SIBLINGS if module in siblings), (module,))
        for sibling in group:
            candidate = ".".join([*prefix, sibling, kind]) if kind else name
            if candidate in remaining:
                del remaining[candidate]
                ordered.append(candidate)
    return ordered


def _lay_out(tensors: dict[str, torch.Tensor]) -> list[TensorLayout]:
    layout: list[TensorLayout] = []
    offset = 0
    for name in _fused_order(tensors):
        tensor = tensors[name]
        previous = layout[-1].name if layout else ""
        if not _computed_together(previous, name):
            offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        layout.append(TensorLayout(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset))
        offset += tensor.nbytes
    return layout


def _size_of(layout: list[TensorLayout], tensors: dict[str, torch.Tensor]) -> int:
    return layout[-1].offset + tensors[layout[-1].name].nbytes if layout else 0


def _computed_together(first: str, second: str) -> bool:
    a, b = first.split("."), second.split(".")
    if len(a) < 2 or a[:-2] != b[:-2] or a[-1] != b[-1]:
        return False
    return any(a[-2] in siblings and b[-2] in siblings for siblings in FUSED_SIBLINGS)


def _view(block: torch.Tensor, entry: TensorLayout) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype)
    count = 1
    for size in entry.shape:
        count *= size
    nbytes = count * torch.empty((), dtype=dtype).element_size()
    return block[entry.offset : entry.offset + nbytes].view(dtype).view(entry.shape)


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("graftwork-base-weights", 0)
    else:  # macOS has no memfd; an unlinked file does the same
        handle, path = tempfile.mkstemp(prefix="graftwork-base-weights")
        os.unlink(path)
        fd = handle
    os.ftruncate(fd, size)
    return fd


def _open_block(info: SharedWeightsInfo) -> torch.Tensor:
    if info.fd is not None:
        mapping = mmap.mmap(info.fd, info.size_bytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapping, dtype=torch.uint8)
    if info.ipc is None:
        raise Internal("the weights can be mapped neither by file nor by CUDA IPC", reason="WEIGHTS_LAYOUT")
    device = torch.device("cuda", info.ipc[0])  # set_device takes no device without a number
    torch.cuda.set_device(device)
    storage = torch.UntypedStorage._new_shared_cuda(*info.ipc)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, torch.Size((info.size_bytes,)), (1,))
