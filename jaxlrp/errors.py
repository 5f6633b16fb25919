"""Everything that jaxlrp raises on its own account. Messages name the layer, the source line and what to do."""

from __future__ import annotations


class LRPError(Exception):
    """Base class of jaxlrp's errors."""


class UnknownPrimitiveError(LRPError, NotImplementedError):
    """The model uses an operation on the way from input to output that has no known meaning for relevance."""


class UnsupportedError(LRPError, NotImplementedError):
    """The operation is known, but no sound way of propagating relevance through it is built in."""


class NotDeterministicError(LRPError, ValueError):
    """Dropout or batch statistics are switched on: the model is in training mode."""


class NoRuleError(LRPError, ValueError):
    """A composite leaves a layer without a rule."""


class UnknownLayerError(LRPError, ValueError):
    """A composite or a capture names a layer, kind or operation that the model does not have."""


class RuleError(LRPError, TypeError):
    """A rule was given to a layer that it is not defined for."""


class InputError(LRPError, ValueError):
    """An argument cannot be explained: integers, NaN, wrong shape or class out of range."""


class ConservationError(LRPError, AssertionError):
    """Relevance went missing without a name; see `jaxlrp.Ledger.check`."""
