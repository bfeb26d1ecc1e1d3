"""Errors that the engine raises on purpose; `message` is written for the author of the request or of the settings."""

# EngineError
# ├── InvalidConfig      (ValueError)  settings of an engine that cannot be honoured
# ├── InvalidParams      (ValueError)  sampling parameters that contradict themselves or their ranges
# ├── InvalidPrompt      (ValueError)  a text or a conversation that does not become tokens
# ├── RequestRejected    (ValueError)  a well-formed request that can never run here: too long, unknown tokens
# ├── RequestFailed                    one request that cannot go on, or be queued: NaN logits, no token allowed
# │   └── GrammarError                 a schema, regex or grammar that is wrong, or costs too much
# ├── ModelError                       a model that cannot be served
# │   ├── ModelNotFound                nothing at that path or hub id
# │   ├── UnsupportedModel             an architecture or option that the engine refuses, with the reason
# │   └── InvalidWeights               missing, unknown or misshapen weights
# └── EngineFailed                     the runner is broken; no later step can succeed, the process should end
#
# InvalidConfig reaches the maker of an `EngineConfig`; InvalidParams, InvalidPrompt and RequestRejected reach the
# caller of `Engine.add`. RequestFailed does too where queueing went wrong, and is the `error` of one `RequestOutput`
# after that. ModelError ends loading, EngineFailed the process.

from __future__ import annotations


class EngineError(Exception):
    """Root of everything the engine raises on purpose."""

    @property
    def message(self) -> str:
        return str(self)


class InvalidConfig(EngineError, ValueError):
    """Settings of an engine that contradict themselves, or that nothing here can honour."""


class InvalidParams(EngineError, ValueError):
    """Sampling parameters that contradict themselves or their ranges."""


class InvalidPrompt(EngineError, ValueError):
    """A text or a conversation that does not become tokens."""


class RequestRejected(EngineError, ValueError):
    """A well-formed request that can never run on this engine."""


class RequestFailed(EngineError):
    """One request cannot go on; its neighbours can."""


class GrammarError(RequestFailed):
    """A request's schema, regex or grammar is wrong or costs too much; it would fail again."""


class ModelError(EngineError):
    """A model that cannot be served."""


class ModelNotFound(ModelError):
    """Nothing is at that path, or the hub has no such model or cannot be reached."""


class UnsupportedModel(ModelError):
    """An architecture or an option that the engine refuses; the message says why."""


class InvalidWeights(ModelError):
    """Weights that are missing, unknown or of another shape than the architecture says."""


class EngineFailed(EngineError):
    """The runner is broken: no later step can succeed, and the process should end."""
