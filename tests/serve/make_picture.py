"""Make the picture of the live page in its how-to, of a page that is being served (`make serve`):

python -m tests.serve.make_picture http://127.0.0.1:7860/ docs/images/live.png
"""

import sys
from pathlib import Path

from tests.report.browser import Visit, chromium

SIZE = {"width": 1280, "height": 860}
TEXT = "The best way to spend a free afternoon is to define a new class of 3 integers."
TOKEN = 13  # " new"


def main(address: str, picture: str) -> None:
    """Read a text, choose a token, steer with its region, and save what is seen."""
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        visit = Visit(browser, address, size=SIZE)
        visit.page.fill("#text", TEXT)
        visit.page.click("#read")
        visit.page.locator("#tokens button").nth(TOKEN).click()
        visit.until("document.getElementById('latent-body').children.length > 0")
        visit.page.click("#add")
        visit.page.fill("#n-new", "20")
        visit.page.click("#continue")
        visit.until("document.getElementById('status').textContent.startsWith('Done')", seconds=300)
        visit.page.screenshot(path=picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
