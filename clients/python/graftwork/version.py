"""The version of the installed distribution."""

from importlib import metadata

VERSION: str = metadata.version("graftwork")
