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

What __all__ names is the contract, which docs/plugins.md describes; within one API version it only grows. An author
needs nothing else but the kit, graftwork_plugins.testing. The host has graftwork_plugins.manager and hookspecs
besides. Nothing here imports torch or graftwork_server.
"""

import pluggy

from graftwork_plugins.automatic import Automatic, Choice
from graftwork_plugins.batches import IGNORED_LABEL, PackedBatch, TrainingRow
from graftwork_plugins.deltas import Delta, FullWeights, Head, LowRank, Prefix, Replace, Scale
from graftwork_plugins.documents import read_json
from graftwork_plugins.estimates import activation_bytes
from graftwork_plugins.heads import ENCODERS, HeadLayout, head_of, layout_of
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
from graftwork_plugins.tensors import all_finite, without_derived

PROJECT = "graftwork"

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's implementation of one of the hooks in graftwork_plugins.hookspecs."""

__all__ = [
    "API_VERSION",
    "ENCODERS",
    "IGNORED_LABEL",
    "PROJECT",
    "Artifact",
    "ArtifactError",
    "Automatic",
    "BaseInfo",
    "BaseModelHandle",
    "Choice",
    "ConfigError",
    "DatasetInfo",
    "Delta",
    "DeviceInfo",
    "Estimate",
    "FullWeights",
    "Head",
    "HeadLayout",
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
    "activation_bytes",
    "all_finite",
    "head_of",
    "hookimpl",
    "layout_of",
    "read_json",
    "without_derived",
]
