"""A report on made-up regions and a browser to open it in."""

from contextlib import ExitStack

import pytest

from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from tests.report import synthetic
from tests.report.browser import REGIONS, WIDE, Visit, chromium


# Of module scope: while playwright runs, no test elsewhere could run an event loop of its own.
@pytest.fixture(scope="module")
def browser():
    """An installed Chromium."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def inputs():
    """The arguments of the report."""
    return synthetic.make_inputs(REGIONS)


@pytest.fixture(scope="module")
def path(inputs, browser, tmp_path_factory):
    """The report."""
    return write_dictionary_report(tmp_path_factory.mktemp("report") / "report.html", **vars(inputs))


@pytest.fixture
def visit(browser, path):
    """Opens the report, or another page; at the end of the test nothing may have gone wrong in any of them."""
    visits = []
    with ExitStack() as stack:

        def open_page(address="", size=WIDE, file=path, **options):
            visits.append(Visit(browser, file, address, size, **options))
            stack.callback(visits[-1].context.close)
            return visits[-1]

        yield open_page
        for visit in visits:
            assert visit.complaints == []
            assert set(visit.requests) <= {visit.url}
