"""The errors a user can meet. Each message says what was expected, what was got, where, and the remedy."""


class EvolveNetError(Exception):
    """Base of every error that EvolveNet raises on purpose."""


class IndexMapError(EvolveNetError, ValueError):
    """An index map is malformed, or does not fit the size that it is applied to."""


class TraceError(EvolveNetError, RuntimeError):
    """The model could not be run on the example inputs, or nothing in it can be resized."""


class ResizeError(EvolveNetError, ValueError):
    """A requested width does not exist, is frozen, or cannot take the requested size."""


class PolicyError(EvolveNetError, ValueError):
    """A policy was configured with values outside their range."""


class SpectrumError(EvolveNetError, ValueError):
    """A weight has no spectrum: it holds NaN or infinite entries, or has a shape without a matrix form."""


class OptimizerStateError(EvolveNetError, RuntimeError):
    """An optimizer's state does not fit its parameters, before or after a resize."""


class RecordError(EvolveNetError, RuntimeError):
    """A checkpoint does not belong to this model."""


class UnsupportedStrategyError(EvolveNetError, RuntimeError):
    """The trainer's strategy shards parameters, so widths cannot change under it."""


class ValidationError(EvolveNetError, RuntimeError):
    """A model was not what it should be after a change of its widths; the change was taken back."""


class SkippedEvent(EvolveNetError, RuntimeError):
    """Nothing can be measured at the moment (NaN weights, too few samples): the event is left out, the next may do."""


class RankMismatchError(EvolveNetError, RuntimeError):
    """Processes that train one model do not agree on it. Not survived: they would train different networks."""


class MissingPackageError(EvolveNetError, ImportError):
    """An optional package that a part of EvolveNet builds on is not installed."""
