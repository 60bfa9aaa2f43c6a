"""Resource names, such as "adapters/dates/versions/3", of what a caller names a resource by."""

from __future__ import annotations

import re

from graftwork import types
from graftwork.requests.fields import text

_SINGULAR = {"datasets": "dataset", "tuningJobs": "job", "strategies": "strategy"}
"""What arguments that name one of a collection are called."""


def resource_name(collection: str, resource: str) -> str:
    """The resource name "collection/{id}" of an id; a name stays as it is."""
    return (
        resource if text(resource, _SINGULAR[collection]).startswith(f"{collection}/") else f"{collection}/{resource}"
    )


def adapter_name(adapter: str | types.Adapter) -> str:
    """The resource name of "id", "id@version", a resource name, or an Adapter (then of its version).

    Raises ValueError where the part after "@" is neither a number nor "latest".
    """
    if isinstance(adapter, types.Adapter):
        return f"adapters/{adapter.adapter_id}/versions/{adapter.version}"
    if text(adapter, "adapter").startswith("adapters/"):
        return adapter
    adapter_id, at, version = adapter.partition("@")
    if not at or version == "latest":
        return f"adapters/{adapter_id}"
    if not re.fullmatch(r"[0-9]{1,9}", version):
        raise ValueError(f'{adapter!r}: expected ID or ID@VERSION, where VERSION is a number or "latest"')
    return f"adapters/{adapter_id}/versions/{int(version)}"


def whole_adapter_name(adapter: str | types.Adapter) -> str:
    """The resource name without a version. Raises ValueError where one is named."""
    if isinstance(adapter, types.Adapter):
        adapter = adapter.adapter_id
    if "@" in adapter or "/versions/" in adapter:
        raise ValueError(f"{adapter!r}: the versions of an adapter are listed; give its id without a version")
    return adapter_name(adapter)


def dataset_name(dataset: str | types.Dataset, called: str = "dataset") -> str:
    """The resource name of a Dataset, an id or a resource name. Raises TypeError for rows that were not uploaded."""
    if isinstance(dataset, types.Dataset):
        return dataset.name
    if not isinstance(dataset, str):
        raise TypeError(
            f"{called} is {dataset!r:.60}; a stored data set or its id is accepted: "
            "client.datasets.upload(...) returns one"
        )
    return resource_name("datasets", dataset)
