"""`/openapi.json` with every schema that it refers to, and `/docs`: Swagger UI from the package `fastapi-offline`.

Nothing is loaded from elsewhere, and the page's Content-Security-Policy keeps it so.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

STATIC = "/docs/static"
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' {scripts}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def install(app: FastAPI, schemas: dict[str, Any]) -> None:
    """Serve `/docs`, and add `schemas`, which no route names as its own, to the document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document["components"]["schemas"] = schemas | document["components"]["schemas"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
    app.mount(STATIC, StaticFiles(directory=str(files("fastapi_offline") / "static")))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Pagemill",
            swagger_js_url=f"{STATIC}/swagger-ui-bundle.js",
            swagger_css_url=f"{STATIC}/swagger-ui.css",
            swagger_favicon_url=f"{STATIC}/favicon.png",
        )
        inline = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in inline)
        scripts = " ".join(f"'sha256-{digest}'" for digest in hashes)
        page.headers["content-security-policy"] = _POLICY.format(scripts=scripts)
        return page
