"""The accessibility violations that axe-core finds in a part of a page."""

from __future__ import annotations

from importlib.resources import files

from playwright.sync_api import Page

SCRIPT = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")

_RUN = """async (selector) => {
  const { violations } = await axe.run(selector, { resultTypes: ['violations'] });
  return violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.html} ${n.failureSummary}`));
}"""


def violations(page: Page, selector: str) -> list[str]:
    """Return every violation, as the rule and the node that breaks it."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(SCRIPT)
    found: list[str] = page.evaluate(_RUN, selector)
    return found
