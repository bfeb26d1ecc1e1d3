"""The dashboard in a real browser, over the whole service with the demo model: by its buttons and its keys.

One stack serves the module. Each test opens a page of its own; what one leaves in the service the others ignore.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from cli.login_link import login_link
from cli.stack import RunningStack
from jobs.settings import Settings
from tests.dashboard.service_calls import Open, ended, new_key_over_http, sent
from tests.support import browser as browsers
from tests.support.browser import DESKTOP, PHONE, needs_browser
from tests.support.processes import await_condition
from tests.support.receivers import receiver

pytestmark = needs_browser

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> \u202e\u05e9\u05dc\u05d5\u05dd"
WATCH_LAYOUT = """() => {
    window.shift = 0;
    new PerformanceObserver(list => list.getEntries().forEach(entry => { window.shift += entry.value; }))
        .observe({type: "layout-shift"});
}"""


def test_printed_link_logs_in_once_and_sign_out_ends_it(chromium: Any, stack: RunningStack, settings: Settings) -> None:
    link = login_link(settings, stack)
    with browsers.opened(chromium, stack.base_url) as page:
        page.allowed += ["401", "404"]  # the last page asks for a job that is not there
        page.goto(link)
        page.wait_for_selector(".answers")
        assert "#" not in page.url
        page.goto("/settings")
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_selector("#key")
        page.goto("/jobs/job_none")
        page.wait_for_selector("#key")
        page.goto(link)
        page.get_by_text("This link was used").wait_for()
        page.fill("#key", "pm_wrong")
        page.keyboard.press("Enter")
        page.get_by_text("no key of this service").wait_for()
        page.fill("#key", stack.api_key)
        page.keyboard.press("Enter")
        page.wait_for_url("**/jobs/job_none")


def test_empty_service_shows_commands_and_its_sample_runs(chromium: Any, stack: RunningStack, open_page: Open) -> None:
    key = new_key_over_http(stack, "empty")
    with open_page("/", key=key) as page:
        page.get_by_role("heading", name="No jobs yet").wait_for()
        # Until the first heartbeat has come, the page says how to start a worker.
        page.locator(".cmd", has_text=f"curl {stack.base_url}/v1/jobs").wait_for()
        page.get_by_role("button", name="Send this sample").click()
        page.wait_for_url("**/jobs/job_*")
        page.get_by_text("Nothing: every line has an answer").wait_for()
        assert page.locator(".res .ans").first.inner_text() == "75"


def test_pasted_prompts_are_sent_and_watched_to_the_end(open_page: Open) -> None:
    with open_page("/new") as page:
        page.get_by_label("Prompts: one a line").fill("17 + 58 =\nreverse stone =\nsort garden =")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Tokens at most").fill("12")
        page.get_by_label("Name, for people").fill("pasted")
        page.get_by_text("3 lines ≈").wait_for()
        page.get_by_role("button", name="Send 3").click()
        page.wait_for_url("**/jobs/job_*")
        page.get_by_text("Nothing: every line has an answer").wait_for()
        page.locator(".res .ans").nth(2).wait_for()
        assert sorted(page.locator(".res .ans").all_inner_texts()) == ["75", "adegnr", "enots"]
        await_condition(lambda: page.title().startswith("Completed · pasted"), "the title of an ended job")


def test_wrong_line_of_a_file_is_named_before_anything_is_sent(open_page: Open) -> None:
    lines = [json.dumps({"prompt": f"{number} ="}) for number in range(3000)]
    lines[1233] = '{"prompt": '
    with open_page("/new") as page:
        chooser = page.get_by_label("Choose a file")
        chooser.set_input_files(
            {"name": "p.jsonl", "mimeType": "application/x-ndjson", "buffer": "\n".join(lines).encode()}
        )
        page.get_by_text("Line 1,234: it is no JSON object").wait_for()
        assert page.locator("button.main").is_disabled()
        lines[1233] = '{"prompt": "2 ="}'
        page.get_by_role("button", name="Take it out").click()
        chooser.set_input_files(
            {"name": "p.jsonl", "mimeType": "application/x-ndjson", "buffer": "\n".join(lines[:300]).encode()}
        )
        page.get_by_label("Tokens at most").fill("4")
        page.get_by_role("button", name="Send 300").click()
        page.wait_for_url("**/jobs/job_*")
        page.locator(".hero").get_by_text("300", exact=True).first.wait_for()


def test_running_job_shows_progress_pauses_and_goes_on(open_page: Open, api: httpx.Client) -> None:
    # Over a million tokens: the job is still open when it is cancelled, however slow the browser is.
    endless = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
    job_id = sent(api, [f"{number % 90 + 10} + 7 =" for number in range(6000)], name="long one", params=endless)
    with open_page(f"/jobs/{job_id}") as page:
        page.locator(".badge", has_text="Running").wait_for()
        done = page.locator(".hero .legend b").first
        done.filter(has_text=re.compile("[1-9]")).wait_for()
        page.evaluate(WATCH_LAYOUT)
        before = done.inner_text()
        done.filter(has_not_text=re.compile(f"^{before}$")).wait_for()
        # A count may get one digit more; half a screen that moves by one line is more than this.
        assert page.evaluate("shift") < 0.01
        page.keyboard.press("p")
        page.locator(".badge", has_text="Paused").wait_for()
        assert api.get(f"/v1/jobs/{job_id}").json()["paused_at"] is not None
        page.get_by_role("button", name="Undo").click()
        page.locator(".badge", has_text=re.compile("Running|Waiting")).wait_for()
        assert api.get(f"/v1/jobs/{job_id}").json()["paused_at"] is None
        page.get_by_role("button", name="Cancel…").click()
        page.locator(".badge", has_text="Cancelled").wait_for()
    assert ended(api, job_id)["status"] == "cancelled"


def test_failures_are_one_row_a_kind_and_retry_runs_exactly_those(
    open_page: Open, api: httpx.Client, with_failures: dict[str, Any]
) -> None:
    with open_page(f"/jobs/{with_failures['id']}") as page:
        page.locator(".badge", has_text="Completed with failures").wait_for()
        rows = page.locator(".fail-table tbody tr")
        rows.first.wait_for()
        assert rows.count() == 1
        assert "invalid_grammar" in rows.first.inner_text()
        rows.first.get_by_role("button", name="Retry 4").click()
        page.locator(".toast", has_text="Retried 4 lines as").wait_for()
    newest = api.get("/v1/jobs?limit=1").json()["data"][0]
    assert newest["retry_of"] == with_failures["id"]
    assert newest["request_counts"]["total"] == 4


def test_line_is_shown_edited_and_run_again(open_page: Open, with_failures: dict[str, Any]) -> None:
    with open_page(f"/jobs/{with_failures['id']}/lines/8") as page:
        page.get_by_text("Answered in").wait_for()
        assert page.get_by_label("The prompt", exact=True).inner_text() == "17 + 7 ="
        assert page.get_by_label("The answer", exact=True).inner_text() == "24"
        page.get_by_role("button", name="Edit, run again").click()
        page.locator("textarea").fill("17 + 58 =")
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_label("The new answer").get_by_text("75").wait_for()
        assert page.get_by_label("The answer", exact=True).inner_text() == "24"
        page.locator("h1").click()
        page.keyboard.press("]")
        page.wait_for_url("**/lines/9")


def test_search_completes_finds_and_is_in_the_address(open_page: Open, with_failures: dict[str, Any]) -> None:
    with open_page("/") as page:
        page.keyboard.press("/")
        page.keyboard.type("sta")
        page.get_by_role("option", name="status:").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.keyboard.type("comp")
        page.get_by_role("option", name="completed").first.wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.keyboard.type("failed:>3 lines:24")
        page.keyboard.press("Enter")
        page.wait_for_url("**/?q=status%3Acompleted+failed%3A%3E3+lines%3A24")
        page.locator("table.jobs tbody tr:only-child").get_by_role("link", name="with failures").wait_for()
        address = page.url
        page.keyboard.press("Escape")
        page.locator("table.jobs").get_by_role("link", name="with failures").click()
        page.wait_for_url("**/jobs/*")
        page.go_back()
        page.wait_for_url("**/?q=*")
        assert page.url == address
        page.fill("#search", "modle:demo")
        page.get_by_role("button", name="model", exact=True).click()
        page.wait_for_url("**model%3Ademo*")


def test_job_is_seen_from_its_beginning_to_its_end_without_asking_again(open_page: Open, api: httpx.Client) -> None:
    with open_page("/") as page:
        asked: list[str] = []
        with page.expect_request("**/v1/events?*"):
            page.reload()
        page.locator("table.jobs").wait_for()
        page.on("request", lambda request: asked.append(request.url))
        job_id = sent(api, [f"{number % 90 + 10} + 7 =" for number in range(40)], name="seen whole")
        row = page.locator("table.jobs tr", has_text="seen whole")
        row.get_by_text("Completed").wait_for(state="attached")
        row.get_by_text("100 %").wait_for()
        assert not [url for url in asked if job_id in url and "/v1/events" not in url]


def test_all_jobs_that_match_are_deleted_after_their_count_was_shown(open_page: Open, api: httpx.Client) -> None:
    ids = [sent(api, ["1 + 1 ="], name=f"bulk {number}", params={"max_tokens": 1}) for number in range(110)]
    ended(api, ids[-1])
    await_condition(lambda: api.get("/v1/jobs/counts?q=bulk -status:open").json()["matching"] == 110, "their ends")
    with open_page("/?q=bulk") as page:
        page.allowed.append("409")
        page.locator("table.jobs[aria-busy=false]").get_by_text("bulk 109").wait_for()
        page.keyboard.press("*")
        page.get_by_text("100 selected").wait_for()
        page.get_by_role("button", name="Select all 110 that match").click()
        page.get_by_role("button", name="Delete…").click()
        page.get_by_text("Delete 110 jobs, 110 lines?").wait_for()
        api.delete(f"/v1/jobs/{ids[0]}").raise_for_status()
        page.get_by_role("button", name="Delete 110").click()
        page.locator(".toast", has_text="110 jobs were expected, and 109 match now").wait_for()
        assert api.get("/v1/jobs/counts?q=bulk").json()["matching"] == 109
        page.get_by_role("button", name="Delete…").click()
        page.get_by_role("button", name="Delete 109").click()
        page.locator(".toast", has_text="Delete: 109 jobs").wait_for()
        page.get_by_text("matches this search").wait_for()
    assert api.get("/v1/jobs/counts?q=bulk").json()["matching"] == 0


def test_page_says_that_it_is_cut_off_and_comes_back_alone(open_page: Open) -> None:
    with open_page("/") as page:
        page.allowed += ["Failed to load resource", "net::ERR"]
        page.locator(".rail .live", has_text="Live").wait_for()
        page.context.set_offline(True)
        try:
            page.locator(".rail .live", has_text="Not live since").wait_for()
        finally:
            page.context.set_offline(False)
        page.locator(".rail .live", has_text=re.compile("^Live")).wait_for()


def test_read_only_key_has_no_actions(open_page: Open, stack: RunningStack, api: httpx.Client) -> None:
    key = new_key_over_http(stack, "default", "read-only")
    job_id = ended(api, sent(api, ["1 + 1 ="]))["id"]
    with open_page("/", key=key) as page:
        for path in ("/", f"/jobs/{job_id}", "/keys"):
            browsers.go(page, path)
            page.locator("[aria-busy=true]").first.wait_for(state="detached")
            page.locator(".badge", has_text="read-only key").first.wait_for()
            for name in ("Pause", "Retry", "Cancel", "Delete", "New key", "Revoke"):
                assert page.get_by_role("button", name=re.compile(name)).count() == 0
            assert page.locator("input[type=checkbox]").count() == 0


def test_markup_right_to_left_and_nul_are_text(open_page: Open, api: httpx.Client) -> None:
    job_id = ended(api, sent(api, [HOSTILE, "nul \x00 here"], name='<img src=x onerror="alert(1)">'))["id"]
    with open_page(f"/jobs/{job_id}") as page:
        page.locator("h1", has_text="<img").wait_for()  # before the job has come, its id stands there
        assert page.locator("h1").inner_text() == '<img src=x onerror="alert(1)">'
        browsers.go(page, f"/jobs/{job_id}/lines/1")
        page.get_by_label("The prompt", exact=True).wait_for()
        assert page.get_by_label("The prompt", exact=True).inner_text() == HOSTILE
        browsers.go(page, f"/jobs/{job_id}/lines/2")
        page.get_by_label("The prompt", exact=True).wait_for()
        assert page.get_by_label("The prompt", exact=True).inner_text() == "nul ␀ here"
        assert page.locator("img").count() == 0


def test_webhook_endpoint_is_made_tested_changed_and_removed(open_page: Open, api: httpx.Client) -> None:
    with receiver() as hook, open_page("/webhooks") as page:
        panel = page.get_by_role("region", name="Endpoints")
        panel.get_by_text("None yet.").wait_for()
        panel.get_by_role("button", name="New endpoint…").click()
        page.get_by_label("Name, for people").fill("nightly")
        page.get_by_label("Address").fill(hook.url)
        page.get_by_label("job.expired").uncheck()
        page.get_by_role("button", name="Save").click()
        secret = page.get_by_label("The secret", exact=True).inner_text()
        page.get_by_role("button", name="I have copied it").click()
        panel.get_by_text("nightly").wait_for()
        (endpoint,) = api.get("/v1/webhook_endpoints").json()["data"]
        assert secret.startswith(endpoint["signing_secret_hint"].rstrip("…"))
        assert "job.expired" not in endpoint["event_types"]
        menu = panel.get_by_role("button", name="Actions of nightly")
        menu.click()
        panel.get_by_role("button", name="Send a test").click()
        page.locator(".toast", has_text="nightly answered 204").wait_for()
        menu.click()
        panel.get_by_role("button", name="Remove…").click()
        page.get_by_role("button", name="Remove", exact=True).click()
        panel.get_by_text("None yet.").wait_for()
    assert api.get("/v1/webhook_endpoints").json()["data"] == []


def test_failed_webhook_shows_its_attempts_and_is_replayed(open_page: Open, api: httpx.Client) -> None:
    retry_later = {"retry-after": "3600"}  # by itself it would soon be delivered
    with receiver((503, retry_later), (204, {})) as hook:
        job_id = sent(api, ["1 + 1 ="], webhook={"url": hook.url})
        with open_page(f"/jobs/{job_id}") as page:
            panel = page.get_by_role("region", name="Webhooks")
            panel.get_by_text("pending · job.completed · 503 · 1 attempt").wait_for()
            panel.get_by_text("attempts", exact=True).click()
            panel.get_by_text("the receiver answered 503").wait_for()
            panel.get_by_role("button", name="Replay").click()
            panel.get_by_text("delivered · job.completed · 204 · 2 attempts").wait_for()


def test_hidden_tab_lets_go_of_its_stream_and_takes_it_up_again(open_page: Open) -> None:
    with open_page("/queue") as page:
        page.clock.install()
        page.reload()
        page.locator(".rail .live", has_text="Live").wait_for()
        show = "is => { Object.defineProperty(document, 'hidden', {value: is, configurable: true}); "
        show += "document.dispatchEvent(new Event('visibilitychange')); }"
        with page.expect_event("requestfailed", lambda request: "/v1/events" in request.url):
            page.evaluate(show, True)
            page.clock.run_for(11_000)
        with page.expect_request("**/v1/events?*"), page.expect_request("**/v1/queue"):
            page.evaluate(show, False)
            page.clock.run_for(1_000)


def test_page_reads_anew_where_no_stream_is_to_be_had(open_page: Open, api: httpx.Client) -> None:
    job_id = sent(api, [f"{number % 90 + 10} + 7 =" for number in range(60)])
    with open_page("/queue") as page:
        page.route("**/v1/events?*", lambda route: route.fulfill(status=204))
        # The page before may still have its stream answered.
        with page.expect_response(lambda answer: "/v1/events?" in answer.url and answer.status == 204):
            browsers.go(page, f"/jobs/{job_id}")
        page.get_by_text("Nothing: every line has an answer").wait_for()
        assert page.locator(".rail .live").inner_text().startswith("Live")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    source = browsers.axe_source(tmp_path_factory.mktemp("axe"))
    if source is None:
        pytest.skip("npm cannot install axe-core here")
    return source


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(
    open_page: Open, axe: str, with_failures: dict[str, Any], theme: str, size: tuple[int, int]
) -> None:
    job = f"/jobs/{with_failures['id']}"
    loaded = {
        "/": "table.jobs tbody a",
        job: ".res .ans",
        f"{job}/lines/3": ".outcome",
        "/queue": "main h2",
        "/fleet": "table tbody a",
        "/new": "textarea",
        "/keys": "table tbody bdi, table tbody code",
        "/webhooks": "main h2",
        "/settings": "main dl",
    }
    found: dict[str, Any] = {}
    with open_page("/", size=size) as page:
        page.emulate_media(color_scheme=theme)
        for path, shown in loaded.items():
            browsers.go(page, path)
            page.locator("[aria-busy=true]").first.wait_for(state="detached")
            page.locator(shown).first.wait_for()
            found[path] = browsers.violations(page, axe)
            width = page.evaluate("document.documentElement.scrollWidth")
            if width > size[0]:
                found[path].append(f"{width} pixels wide")
    assert {path: bad for path, bad in found.items() if bad} == {}


def test_modules_of_the_page_keep_their_word(open_page: Open) -> None:
    """Formats, the search's grammar and what a pasted text means, in the browser itself."""
    with open_page("/") as page:
        prefix = page.locator("link[rel=modulepreload]").first.get_attribute("href").rsplit("/", 1)[0]
        prefix = re.match(r"/static/\w+", prefix).group()  # type: ignore[union-attr]

        def call(module: str, expression: str) -> Any:
            return page.evaluate(f"import('{prefix}/{module}').then(m => {expression})")

        formats = {
            "m.percent(999999, 1000000)": "99.9 %",
            "m.percent(1, 1000000)": "< 0.1 %",
            "m.percent(1000000, 1000000)": "100 %",
            "m.percent(0, 5)": "0 %",
            "m.count(999999)": "999,999",
            "m.count(1254000)": "1.25M",
            "m.short(41230)": "41.2k",
            "m.short(999999)": "1.00M",
            "m.duration(0.9)": "0.9 s",
            "m.duration(614)": "10 min 14 s",
            "m.duration(18120)": "5 h 2 min",
            "m.duration(273600)": "3 d 4 h",
            "m.rateText(612.3)": "612/s",
            "m.rateText(3.9)": "3.9/s",
            "m.rateText(0.2333)": "14/min",
            "m.visible('a\\u0000b\\u001b')": "a␀b␛",
        }
        assert {text: call("format.js", text) for text in formats} == formats
        terms = call("search.js", "m.parse('-status:waiting,paused \"two words\" metadata.team:x lins:>1')")
        assert [(term["negated"], term["field"], term["value"], term["known"]) for term in terms] == [
            (True, "status", "waiting,paused", True),
            (False, None, '"two words"', True),
            (False, "metadata.team", "x", True),
            (False, "lins", ">1", False),
        ]
        assert call("search.js", "m.nearest('lins')") == "lines"
        assert call("pages/new.js", 'm.csvPrompts(\'id,prompt\\n1,"a, ""b""\\nc"\\n2,d\')') == ['a, "b"\nc', "d"]
        assert call("pages/new.js", "m.toLines('x\\n\\n{\"prompt\": 1}')") == '{"prompt":"x"}\n{"prompt": 1}'
        assert call("pages/new.js", "m.look('{\"prompt\": 1}\\n{}').bad") == {
            "line": 2,
            "why": "it has neither “prompt” nor “messages”",
        }
