"""Every setting, its default, its meaning and its check.

A setting is a field of a frozen dataclass; the string under it is what ``python train.py --help`` prints. Checks that
need one section live in that section's ``__post_init__``, checks across sections in the section that holds both. These
files need nothing but the standard library, so that a layer can be built from a configuration in a unit test; reading
files and flags into these classes is the work of :mod:`moe.config_file`.
"""

from moe.config.attention import AttentionConfig, LatentConfig, QKNorm, RopeConfig, RopeScaling
from moe.config.balance import BalanceConfig, BalancedChoices, BalanceScope
from moe.config.checks import ConfigError, require, shown
from moe.config.data import DataConfig
from moe.config.experts import (
    Activation,
    ExpertBackend,
    ExpertsConfig,
    FeedForwardConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
)
from moe.config.model import ModelConfig, NormKind, Positions
from moe.config.parallel import ParallelConfig, PipelineSchedule, Shard, format_layout, parse_layout
from moe.config.parameters import ActiveConvention, Parameters
from moe.config.presets import Definition, Preset, learn_presets
from moe.config.router import (
    ACTS_WITH,
    CapacityConfig,
    CapacityOrder,
    CapacityScope,
    GroupScore,
    Noise,
    Projection,
    RouterConfig,
    RouterGradient,
    Score,
    Selection,
    SelectionBias,
    WeightPosition,
    WeightSource,
)
from moe.config.run import Config, RunConfig
from moe.config.training import (
    Checkpointing,
    Device,
    MuonConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    ScheduleConfig,
    ScheduleShape,
    StepSize,
    TrainingConfig,
    WeightDtype,
)

__all__ = [
    "ACTS_WITH",
    "Activation",
    "ActiveConvention",
    "AttentionConfig",
    "BalanceConfig",
    "BalanceScope",
    "BalancedChoices",
    "CapacityConfig",
    "CapacityOrder",
    "CapacityScope",
    "Checkpointing",
    "Config",
    "ConfigError",
    "DataConfig",
    "Definition",
    "Device",
    "ExpertBackend",
    "ExpertsConfig",
    "FeedForwardConfig",
    "GroupScore",
    "LatentConfig",
    "ModelConfig",
    "MuonConfig",
    "Noise",
    "NormKind",
    "OptimizerConfig",
    "OptimizerName",
    "ParallelConfig",
    "Parameters",
    "PipelineSchedule",
    "Positions",
    "Precision",
    "Preset",
    "Projection",
    "QKNorm",
    "RopeConfig",
    "RopeScaling",
    "RouterConfig",
    "RouterGradient",
    "RunConfig",
    "ScheduleConfig",
    "ScheduleShape",
    "Score",
    "Selection",
    "SelectionBias",
    "Shard",
    "SharedExpertsConfig",
    "SpecialExpertsConfig",
    "StepSize",
    "TrainingConfig",
    "WeightDtype",
    "WeightPosition",
    "WeightSource",
    "format_layout",
    "learn_presets",
    "parse_layout",
    "require",
    "shown",
]
