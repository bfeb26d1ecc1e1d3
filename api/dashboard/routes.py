"""Addresses of the dashboard: one shell for every page of it, and the files that the shell names."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from api.dashboard.assets import Asset, load_assets

# Every page of the dashboard; `static/router.js` maps the same addresses to what is shown.
PAGES = (
    "/",
    "/login",
    "/jobs/{job_id}",
    "/jobs/{job_id}/lines/{line}",
    "/queue",
    "/fleet",
    "/fleet/{worker_id}",
    "/new",
    "/keys",
    "/webhooks",
    "/settings",
)
SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
YEAR = 365 * 24 * 3600

router = APIRouter(include_in_schema=False)


def shell(request: Request) -> Response:
    """The page without data. Nothing in it is secret, so it wants no key: the login page is this, too."""
    assets = load_assets()
    headers = {**SECURITY, "cache-control": "no-cache", "etag": f'W/"{assets.digest}"'}
    if _knows(request, assets.digest):
        return Response(status_code=304, headers={**headers, "vary": "accept-encoding"})
    return _answer(request, assets.shell, headers)


for _path in PAGES:
    router.add_api_route(_path, shell, methods=["GET", "HEAD"])


@router.head("/static/{digest}/{path:path}")
@router.get("/static/{digest}/{path:path}")
def static_file(digest: str, path: str, request: Request) -> Response:
    """A file of this version. One of another version is 404: it must not come back in place of this one."""
    assets = load_assets()
    asset = assets.by_path.get(path) if digest == assets.digest else None
    if asset is None:
        raise HTTPException(404)
    return _answer(request, asset, {**SECURITY, "cache-control": f"public, max-age={YEAR}, immutable"})


def _knows(request: Request, digest: str) -> bool:
    tags = request.headers.get("if-none-match", "").split(",")
    return any(tag.strip().removeprefix("W/") == f'"{digest}"' for tag in tags)


def _answer(request: Request, asset: Asset, headers: dict[str, str]) -> Response:
    headers = {**headers, "content-type": asset.media_type, "vary": "accept-encoding"}
    codings = (part.partition(";") for part in request.headers.get("accept-encoding", "").split(","))
    if any(name.strip() == "gzip" and weight.replace(" ", "") not in ("q=0", "q=0.0") for name, _, weight in codings):
        return Response(asset.packed, headers={**headers, "content-encoding": "gzip"})
    return Response(asset.content, headers=headers)
