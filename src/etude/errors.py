"""The exceptions of the library, all in one place.

    EtudeError
    ├── ConfigError          a setting: unknown, contradictory, out of range
    ├── DataError            a dataset, file or column
    │   └── TemplateError    a chat template that breaks its own prefix
    ├── ModelError           a model or tokenizer that can't do what was asked
    ├── SamplerError         the sampler can't serve a request
    │   └── CacheBudgetError the KV cache can't hold even one sequence
    ├── ToolError            a tool that can't be built or called; in an episode it becomes data
    ├── RewardError          a reward that is NaN, infinite or of the wrong length
    ├── EnvironmentSetupError  an environment that was built or used wrongly
    ├── InstanceError        somebody else's environment failed; in an episode it becomes data
    └── CheckpointError      a run directory or checkpoint that can't be read

A message says what was wrong, what was expected, and what to do. A model's mistakes are not exceptions:
they are recorded in the episode.
"""


class EtudeError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(EtudeError, ValueError):
    """A setting is unknown, contradictory or out of range."""


class DataError(EtudeError, ValueError):
    """A dataset, a file or a column is not what was expected."""


class TemplateError(DataError):
    """A chat template rewrites what it has already rendered."""


class ModelError(EtudeError, ValueError):
    """A model or tokenizer can't do what was asked."""


class SamplerError(EtudeError, RuntimeError):
    """The sampler can't serve a request."""


class CacheBudgetError(SamplerError):
    """The KV cache is too small for the request."""


class ToolError(EtudeError, ValueError):
    """A tool can't be built or called."""


class RewardError(EtudeError, ValueError):
    """A reward is NaN, infinite, of the wrong type or of the wrong length."""


class EnvironmentSetupError(EtudeError, ValueError):
    """An environment was built or used wrongly."""


class InstanceError(EtudeError, RuntimeError):
    """Somebody else's environment raised, or didn't answer in time."""


class CheckpointError(EtudeError, RuntimeError):
    """A run directory or checkpoint can't be read or written."""
