"""The plugin contract of Graftwork: what a strategy is, and how one is registered.

A strategy plugin is a module or object with a hook implementation, named by an entry point:

    # my_strategy.py
    from graftwork_plugins import Strategy, hookimpl

    class MyStrategy(Strategy): ...

    @hookimpl
    def graftwork_register_strategies():
        return [MyStrategy()]

    # pyproject.toml
    [project.entry-points."graftwork.strategies"]
    mine = "my_strategy"

Nothing here imports torch or graftwork_server. Within one API version the contract only grows.
"""

import pluggy

from graftwork_plugins.batches import IGNORED_LABEL, PackedBatch, TrainingRow
from graftwork_plugins.deltas import Delta, FullWeights, Head, LowRank, Prefix, Replace, Scale
from graftwork_plugins.strategy import (
    API_VERSION,
    Artifact,
    ArtifactError,
    BaseInfo,
    BaseModelHandle,
    ConfigError,
    DatasetInfo,
    DeviceInfo,
    Estimate,
    SavedArtifact,
    Strategy,
    Trainable,
    TrainingConfig,
    UnsupportedBase,
)

PROJECT = "graftwork"

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's implementation of one of the hooks in graftwork_plugins.hookspecs."""

__all__ = [
    "API_VERSION",
    "IGNORED_LABEL",
    "PROJECT",
    "Artifact",
    "ArtifactError",
    "BaseInfo",
    "BaseModelHandle",
    "ConfigError",
    "DatasetInfo",
    "Delta",
    "DeviceInfo",
    "Estimate",
    "FullWeights",
    "Head",
    "LowRank",
    "PackedBatch",
    "Prefix",
    "Replace",
    "SavedArtifact",
    "Scale",
    "Strategy",
    "Trainable",
    "TrainingConfig",
    "TrainingRow",
    "UnsupportedBase",
    "hookimpl",
]
