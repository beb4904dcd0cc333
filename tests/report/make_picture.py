"""Make the README's picture, the map of the regions in the demo's report:

python -m tests.report.make_picture demo_output/report.html docs/images/report.png [REGION]
"""

import sys
from pathlib import Path

from tests.report.browser import chromium

SIZE = {"width": 1280, "height": 860}


def main(report: str, picture: str, region: str = "") -> None:
    """Open the report with a region chosen, go to its map, and save what is seen."""
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        page = browser.new_page(viewport=SIZE)
        page.goto(Path(report).resolve().as_uri() + (f"#region-{region}" if region else ""))
        page.locator("#map").evaluate("(section) => section.scrollIntoView()")
        page.locator("#map .disc, #map circle").first.wait_for()
        page.screenshot(path=picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
