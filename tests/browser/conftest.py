"""One JupyterLab and one Chromium for these tests; a page of its own for each.

All pages share one browser context and its cache, so that JupyterLab's scripts are compiled once.
So a test must set routes and init scripts on its own page, never on the context: they would stay.
Playwright keeps an event loop running in this thread. It ends with this package, so that other
tests can have their own.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

    from tests.browser.lab import Lab, Notebook

# Without playwright these tests cannot even be imported.
collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["test_*.py"]
if collect_ignore_glob and os.environ.get("CI") == "true":
    raise RuntimeError("playwright is missing: in CI the tests in a browser are not optional")


@pytest.fixture(scope="package")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """Chromium; where there is none a test is skipped, but fails in CI."""
    from playwright.sync_api import expect, sync_playwright

    from tests.browser.lab import CHROMIUM, FLAGS

    if not CHROMIUM.exists():
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"there is no Chromium at {CHROMIUM}")
    # The default of five seconds is too short on a machine that runs other tests, too.
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1100, "height": 900},
        )
        context.set_default_timeout(30_000)
        yield context
        context.close()


@pytest.fixture(scope="package")
def lab(chromium: BrowserContext, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab without access to the files of its user."""
    from tests.browser.lab import serve

    with serve(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def page(chromium: BrowserContext, lab: Lab) -> Iterator[Page]:
    """A new page without permissions. `Notebook.open` resets the state of JupyterLab."""
    page = chromium.new_page()
    yield page
    page.close()
    chromium.clear_permissions()
    lab.reset()


@pytest.fixture
def notebook(page: Page, lab: Lab) -> Callable[..., Notebook]:
    """Return a function that opens a new notebook with the given cells."""
    from tests.browser.lab import Notebook

    numbers = itertools.count()

    def open_with(*cells: str) -> Notebook:
        name = f"{os.urandom(3).hex()}-{next(numbers)}.ipynb"
        lab.write(name, *cells)
        return Notebook(page, lab, name).open()

    return open_with
