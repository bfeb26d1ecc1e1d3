"""Pictures of the dashboard for `docs/images`, from a service that runs: a job in progress, one with failures.

python -m tests.dashboard.screenshots http://127.0.0.1:8100 docs/images      # the key from PAGEMILL_API_KEY
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support import browser as browsers
from tests.support.browser import DESKTOP, PHONE

LOOK_AHEAD = {"prompt": "Order 4711", "structured_outputs": {"regex": "(?=a)b"}}
PARAMS = {"temperature": 0, "max_tokens": 8}


def _send(client: httpx.Client, name: str, prompts: list[Any], **head: Any) -> str:
    body = {"model": "demo", "name": name, "prompts": prompts, "params": PARAMS} | head
    job_id: str = client.post("/v1/jobs", json=body).raise_for_status().json()["id"]
    return job_id


def _sums(count: int) -> list[dict[str, str]]:
    return [{"custom_id": f"sum-{n}", "prompt": f"{n % 90 + 10} + {n % 77 + 10} ="} for n in range(count)]


def main(url: str, directory: Path) -> None:
    key = os.environ["PAGEMILL_API_KEY"]
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        _send(client, "glossary", _sums(60))
        failed = _send(client, "invoices-extract", [*_sums(80), *[LOOK_AHEAD] * 7], metadata={"team": "finance"})
        while client.get(f"/v1/jobs/{failed}?wait=10").json()["ended_at"] is None:
            pass
        running = _send(client, "nightly-sums", _sums(30_000), metadata={"team": "search"})
        paused = _send(client, "evaluation", _sums(2_000), metadata={"team": "quality"})
        client.post(f"/v1/jobs/{paused}/pause")
        _send(client, "support-triage", _sums(400), priority=-5)
        time.sleep(float(os.environ.get("SETTLE", "150")))  # a curve needs whole minutes
        pages = {
            "jobs": "/",
            "job": f"/jobs/{running}",
            "failures": f"/jobs/{failed}",
            "line": f"/jobs/{failed}/lines/3",
            "fleet": "/fleet",
            "queue": "/queue",
        }
        with browsers.chromium() as browser:
            for theme in ("light", "dark"):
                for size, width in ((DESKTOP, "desktop"), (PHONE, "phone")):
                    with browsers.opened(browser, url, size=size, theme=theme) as page:
                        page.request.post(
                            "/session", data={"key": key}, headers={"origin": url, "x-pagemill-page": "1"}
                        )
                        for name, path in pages.items():
                            if name in ("fleet", "queue", "failures", "line") and (theme, width) != (
                                "light",
                                "desktop",
                            ):
                                continue
                            page.goto(path)
                            page.locator("[aria-busy=true]").first.wait_for(state="detached")
                            page.wait_for_timeout(500)  # the answers come with the second request
                            page.screenshot(path=directory / f"{name}-{width}-{theme}.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
