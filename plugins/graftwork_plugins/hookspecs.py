"""The hooks. Each says who calls it, in which process, when, and what stops it.

A hook that raises is logged with the plugin's name and does not stop its caller, except where said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from graftwork_plugins.strategy import Artifact, Strategy

hookspec = pluggy.HookspecMarker("graftwork")


@hookspec
def graftwork_register_strategies() -> Sequence[Strategy]:  # type: ignore[empty-body]
    """Returns the strategies that this plugin brings.

    Called once for each plugin when a process that hosts plugins starts (engine and tuner workers; the front never
    imports a plugin). Every plugin is called. One that raises, or that returns something else than strategies of this
    API version, is listed with its error, and its strategies are not used.
    """


@hookspec(firstresult=True)
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """Returns the id of the strategy that serves these files, or None if this plugin does not know them.

    Called by the engine worker, off the token loop, when an adapter is uploaded without a strategy. Plugins are asked
    in pluggy's order (last registered first) until one answers. Look at names and small documents only; the files come
    from a client. ArtifactError, for files that are this plugin's and damaged, is told to that client; anything else
    that is raised passes the question on to the next plugin.
    """
