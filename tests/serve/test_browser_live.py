"""The live page in a real browser: read, choose a token, steer, stop."""

from itertools import count
from time import sleep

import pytest

from saelens_ext.host.tokens import visible
from saelens_ext.serve.live import SteeredSoFar
from saelens_ext.serve.worker import Worker
from saelens_ext.steering.sampling import SamplingOptions
from tests.report.browser import PHONE, WIDE, Visit, chromium

TEXT = 'The assert statement raises <img src=x onerror="window.pwned=1"> an error'


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, address):
    visits = []

    def open_page(size=WIDE):
        visits.append(Visit(browser, address, size=size))
        return visits[-1]

    yield open_page
    for one in visits:
        assert one.complaints == [] and {url.rsplit("/", 1)[0] + "/" for url in one.requests} == {address}
        assert one.page.evaluate("window.pwned") is None
        one.context.close()


def read(page, text=TEXT):
    page.page.fill("#text", text)
    page.page.click("#read")
    page.page.locator("#tokens button").first.wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_a_text_is_read_a_latent_shown_and_steered_with(visit, live, size):
    page = visit(size)
    assert page.text("h1") == "A <b>tiny</b> model"
    read(page)
    tokens = live.read(TEXT)["regions"]
    assert page.texts("#tokens button") == [token.text for token in tokens]
    page.page.locator("#tokens button").nth(4).click()
    region = tokens[4].region
    page.until("(region) => document.getElementById('latent-body').textContent.includes(`region ${region}`)", region)
    assert page.text("#latent-title") == f"Region {region}"
    assert f"{tokens[4].novelty:.3f}" in page.text("#token-body")
    page.page.click("#add")
    page.page.fill("#n-new", "5")
    page.page.click("#continue")
    page.until("document.getElementById('status').textContent.startsWith('Done')")
    assert "5 tokens" in page.text("#status") and "0.5" in page.text("#status")
    assert page.text("#unsteered") and page.text("#unsteered") != page.text("#steered")
    assert "coefficient +" in page.text("#changes .note")
    assert page.overflow() <= 0


def test_what_is_wrong_is_said_and_nothing_is_lost(visit):
    page = visit()
    page.page.click("#read")
    page.until("document.getElementById('read-message').textContent.startsWith('The text is empty')")
    page.page.click("#continue")
    page.until("document.getElementById('steer-message').textContent.startsWith('The text is empty')")
    read(page)
    assert page.page.locator("#read-message").is_hidden()
    page.page.fill("#n-new", "100000")
    page.page.click("#continue")
    page.until("document.getElementById('steer-message').textContent.startsWith('At most 200 new tokens')")
    assert page.page.locator("#tokens button").count() > 3
    assert all("status of 400" in line for line in page.complaints)  # a browser notes refusals by itself
    page.complaints.clear()


@pytest.mark.parametrize("early", [False, True])
def test_a_continuation_is_stopped(visit, live, monkeypatch, early):
    """Also where the server gets to know of it only after it is asked to stop it."""
    stop, unknown = Worker.stop, [False] * 2 * early

    def endless(self, prompt, changes=(), options=None, *, chat_template_options=None):
        for n in count(1):
            sleep(0.02)
            yield SteeredSoFar(stage="continuing", unsteered="a" * n, steered="b" * n, n_tokens=n, divergence=0.1)

    monkeypatch.setattr(type(live), "steer", endless)
    monkeypatch.setattr(Worker, "stop", lambda self, job: unknown.pop() if unknown else stop(self, job))
    page = visit()
    page.page.fill("#text", TEXT)
    page.page.click("#continue")
    page.until("document.getElementById('steered').textContent.length > 5")
    page.page.click("#stop")
    page.until("document.getElementById('status').textContent === 'Stopped.'")
    page.until("document.getElementById('continue').getAttribute('aria-disabled') === 'false'")
    monkeypatch.undo()
    page.page.click("#continue")
    page.until("document.getElementById('status').textContent.startsWith('Done')")


def test_an_answer_that_comes_late_is_not_shown(visit, live):
    page, held = visit(), []
    read(page)

    def overtaken(path, first, then):
        """Ask twice; the first answer comes when the second has."""
        page.page.route(f"**/{path}", lambda route: held.append((route, route.fetch())), times=1)
        first()
        while not held:
            page.page.wait_for_timeout(20)
        then()
        route, answer = held.pop()
        with page.page.expect_response(f"**/{path}"):
            route.fulfill(response=answer)
        page.page.evaluate("new Promise((resolve) => setTimeout(resolve))")  # until the page has dealt with it

    def read_another():
        page.page.fill("#text", "in tests")
        page.page.press("#text", "Control+Enter")
        page.until("document.querySelectorAll('#tokens button').length < 8")

    overtaken("read", lambda: page.page.click("#read"), read_another)
    assert page.texts("#tokens button") == [token.text for token in live.read("in tests")["regions"]]

    def choose(number):
        page.page.locator("#tokens button").nth(number).click()

    def choose_another():
        page.page.select_option("#dictionary", "neurons")
        choose(2)
        page.until("document.getElementById('latent-body').textContent.startsWith('No profile lies beside')")

    overtaken("latent", lambda: choose(1), choose_another)
    assert page.text("#latent-body").startswith("No profile lies beside")


def test_dictionaries_colours_sliders_and_the_search(visit):
    page = visit()
    read(page)
    page.page.select_option("#colour", "novelty")
    assert page.page.locator("#tokens button[style*=background]").count() > 3
    page.page.fill("#query", "3")
    page.until("document.querySelectorAll('#found li').length === 1")
    page.page.locator("#found button").click()
    page.until("document.getElementById('latent-title').textContent === 'Region 3'")
    page.page.click("#add")
    page.page.click("#add")
    assert page.page.locator("#changes li").count() == 1
    page.page.focus("#changes input[type=range]")
    for _ in range(20):
        page.page.keyboard.press("ArrowLeft")
    assert page.text("#changes output") == "−0.50 nats"
    page.page.check("#changes input[type=checkbox]")
    assert page.text("#changes output") == "off"
    page.page.select_option("#dictionary", "neurons")
    page.until("document.querySelector('#tokens button:nth-child(3)').title.startsWith('latent')")
    page.page.locator("#tokens button").nth(3).click()
    page.until("document.getElementById('latent-body').textContent.startsWith('No profile lies beside')")
    page.page.click("#changes .remove")
    assert page.page.locator("#no-changes").is_visible()


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_a_conversation_is_entered_read_and_continued(visit, live, size):
    page = visit(size)
    page.page.fill("#text", "What is truth?")
    page.page.select_option("#kind", "talk")
    assert page.text("#text-title") == "Conversation" and page.page.locator("#text").is_hidden()
    page.page.click("#add-turn")
    assert [one.input_value() for one in page.page.locator("#turns select").all()] == ["user", "assistant"]
    page.page.locator("#turns textarea").nth(1).fill("It is")
    page.page.click("#read")
    page.page.locator("#tokens button").first.wait_for()
    talk = [{"role": "user", "content": "What is truth?"}, {"role": "assistant", "content": "It is"}]
    assert page.texts("#tokens button") == [token.text.replace("\n", "↵\n") for token in live.read(talk)["regions"]]
    page.page.fill("#n-new", "4")
    page.page.click("#continue")
    page.until("document.getElementById('status').textContent.startsWith('Done')")
    *_, end = live.steer(talk, (), SamplingOptions(max_new_tokens=4))
    assert page.page.locator("#unsteered").text_content() == visible(end.unsteered)
    page.page.fill("#template-options", "{thinking")
    page.page.click("#read")
    page.until("document.getElementById('read-message').textContent.startsWith('The template options must be')")
    page.page.fill("#template-options", "[]")
    page.page.click("#continue")
    page.until("document.getElementById('steer-message').textContent.startsWith('The template options must be')")
    page.page.fill("#template-options", "")
    page.page.locator("#turns .remove").nth(1).click()
    page.page.click("#read")
    page.until("!document.getElementById('tokens').textContent.includes('It is')")
    assert page.overflow() <= 0
    page.complaints.clear()  # a browser notes refusals by itself
