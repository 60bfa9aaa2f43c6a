"""Generate over gRPC as bytes: what is measured is the server, and not how fast a client reads messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio

from graftwork.v1 import generation_pb2 as pb


def generate_call(channel: grpc.aio.Channel) -> Any:
    """The method as a call of `channel`, of a serialized request, that streams serialized answers."""
    return channel.unary_stream("/graftwork.v1.GenerationService/Generate", None, None)


def generate_request(prompt: Sequence[int], new_tokens: int) -> bytes:
    """A serialized request to the base for exactly so many tokens."""
    sampling = pb.SamplingParameters(max_tokens=new_tokens, ignore_eos=True)
    request = pb.GenerateRequest(model="base", token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    return request.SerializeToString()
