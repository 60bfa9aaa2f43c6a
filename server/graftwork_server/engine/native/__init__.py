"""The engine's own CPU kernels (kernels.c) as functions of torch tensors."""

from graftwork_server.engine.native.kernels import NativeKernels, native_kernels

__all__ = ["NativeKernels", "native_kernels"]
