"""What the base model can be asked for."""

from __future__ import annotations

from graftwork_server.errors import FailedPrecondition
from graftwork_server.types import ModelInfo


def require_generation(model: ModelInfo, what: str) -> None:
    """Raises FailedPrecondition (BASE_IS_ENCODER) unless the base generates; `what` was asked for: "Generate"."""
    if not model.generates:
        raise FailedPrecondition(
            f"the base model is {model.architecture}, an encoder, which {what} cannot use; Classify (with a base or "
            "adapter that has a head), Embed and Tokenize can",
            reason="BASE_IS_ENCODER",
        )
