"""The link that logs a browser in once with the first key. Its code stands after `#`, which browsers send nowhere."""

from __future__ import annotations

import secrets

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cli.stack import RunningStack
from jobs import keys
from jobs.database import sqlalchemy_url
from jobs.queries import tenants
from jobs.settings import Settings

LINK_SECONDS = 600


def login_link(settings: Settings, stack: RunningStack) -> str:
    """A fresh link to the dashboard of a running service. It is for the terminal, and for no log."""
    code = secrets.token_urlsafe(24)
    pepper = keys.load_pepper(settings)
    engine = create_engine(sqlalchemy_url(stack.database_url), poolclass=NullPool)
    with engine.begin() as connection:
        tenants.add_login_code(
            connection, keys.digest(stack.api_key, pepper), keys.digest(code, pepper), seconds=LINK_SECONDS
        )
    return f"{stack.base_url}/login#{code}"
