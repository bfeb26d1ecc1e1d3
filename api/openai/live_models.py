"""The model that a request names, by a look that requests which come together share."""

from __future__ import annotations

from api.deps import Services
from jobs.errors import InvalidInput, ModelNotFound
from jobs.queries.live import LiveModel


async def find_model(services: Services, name: object) -> LiveModel:
    """A model that some worker has registered. Raises `InvalidInput`, `ModelNotFound`."""
    if not isinstance(name, str) or not name:
        raise InvalidInput("the name of a model is needed", param="model")
    found = None if "\x00" in name else await services.models.get(name)
    if found is None:
        raise ModelNotFound(name[:256])
    return found
