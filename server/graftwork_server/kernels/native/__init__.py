"""The engine's own CPU kernels (kernels.c) as functions of torch tensors."""

from graftwork_server.kernels.native.build import KV_BLOCK_TOKENS
from graftwork_server.kernels.native.kernels import NativeKernels, native_kernels

__all__ = ["KV_BLOCK_TOKENS", "NativeKernels", "native_kernels"]
