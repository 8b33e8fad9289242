"""The README's pictures, of real cells in JupyterLab: ``python -m tests.browser.screenshots``.

Each shows one cell, prompt and panel, at two pixels per point and in at most 256 colours.
"""

from __future__ import annotations

import base64
import contextlib
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from nbcodex.models import MINUTE
from nbcodex.simulator import Fault
from tests.browser.lab import CHROMIUM, FLAGS, REPOSITORY, Lab, Notebook, serve
from tests.simulated import Simulated, simulated

FOLDER = REPOSITORY / "notebooks" / "images"
WARM_UP = "%%codex --no-history\nHello [[tokens=9]]"
PRICES = "from nbcodex.openai_api import pricing\npricing.known_provider = lambda url: 'openai'"
"""Gives the simulator's tokens OpenAI's price, so that the pictures show one."""
PROMPT = "%%codex -o answer\nExplain what a token bucket is, with an example in Python."
LIMIT = (
    "Rate limit reached for gpt-5.6-sol in organization org-simulated on tokens per min (TPM): "
    "Limit 30,000, Used 22,999, Requested 12,528. Please try again in 11.054s."
)


LOAD = """import asyncio, nbcodex
asked = [asyncio.ensure_future(ask(n, 6_000)) for n in range(50)]
None"""
BEFORE = """import asyncio, nbcodex
texts = [
    "it came a day late, with the box open", "fits as it should, and is quiet at night",
    "colours fade in the sun after a week", "would buy it again for the whole family",
]
tell = lambda n: f"Review {n}: {texts[n % 4]}. Sum it up in one line."
ask = lambda n, most=1_600: nbcodex.aask(
    f"{tell(n)}\\n[[tokens={590 + 37 * n % 200}]]", max_output=most
)
await asyncio.gather(*map(ask, range(9)))
None"""
WIDER, WIDE, NARROW = 1150, 870, 470


def main() -> None:
    """Make all pictures."""
    FOLDER.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as root,
        serve(Path(root)) as lab,
        simulated(tpm=30_000, latency=0.3, speed=60.0) as simulator,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for theme in ("Light", "Dark"):
            with opened(chromium, lab, simulator, theme) as nb:
                shoot(nb, simulator, theme.lower())
        with opened(chromium, lab, simulator, "Light", width=NARROW) as nb:
            wait(nb, simulator)
            take(nb, "waiting-narrow.png")
            nb.press("Park")
            nb.wait()
        simulator.core.change_knobs(tpm=20_000)
        for theme in ("Light", "Dark"):
            with opened(chromium, lab, simulator, theme, cell="%codex monitor", width=WIDER) as nb:
                watch(nb, simulator, f"monitor-{theme.lower()}.png")
        chromium.close()


def wait(nb: Notebook, simulator: Simulated) -> None:
    """Have the cell wait for a limit, until eight seconds are left."""
    refusal = Fault("tokens_per_minute", seconds=11.054, message=LIMIT)
    # A picture of a stream needs one that stands still for a moment.
    simulator.core.script([refusal, Fault("stalled", after=125, seconds=4.0)])
    nb.run(2)
    expect(nb.panel).to_have_attribute("data-phase", "waiting")
    expect(nb.panel.locator(".nbcodex-number")).to_have_text(re.compile(r"^8\.\d"))


def shoot(nb: Notebook, simulator: Simulated, theme: str) -> None:
    """Take the pictures of a cell that waits; in the light, also streaming, answered and parked."""
    wait(nb, simulator)
    take(nb, f"waiting-{theme}.png")
    if theme == "dark":
        nb.press("Cancel")
        nb.wait()
        return
    expect(nb.panel.locator(".nbcodex-log")).to_contain_text("requested:", timeout=20_000)
    take(nb, f"streaming-{theme}.png")
    nb.wait()
    take(nb, f"answer-{theme}.png")
    wait(nb, simulator)
    nb.press("Park")
    nb.wait()
    take(nb, f"parked-{theme}.png")


def watch(nb: Notebook, simulator: Simulated, name: str) -> None:
    """Take the picture of a monitor some seconds after fifty requests were asked at once.

    Some were answered before; then other users have used up the rest of the limit.
    """
    leave(simulator, 20_000)
    for index in (2, 3):
        nb.run(index)
        nb.wait()
    leave(simulator, 300)
    nb.run(4)
    nb.wait()
    nb.page.wait_for_timeout(6_000)
    take(nb, name)


def leave(simulator: Simulated, tokens: int) -> None:
    """Leave so many tokens of the minute, as if other users had taken the rest."""
    core = simulator.core
    seen, now = core.log[-1], core.clock.now()
    account = core.account(seen.key, seen.model)
    account.charge_tokens(round(account.tokens[MINUTE].level_at(now)) - tokens, now)


@contextlib.contextmanager
def opened(
    chromium: Browser,
    lab: Lab,
    simulator: Simulated,
    theme: str,
    *,
    cell: str = PROMPT,
    width: int = WIDE,
) -> Iterator[Notebook]:
    """Open a notebook whose third cell is `cell`; what is said once has been said before."""
    context = chromium.new_context(viewport={"width": width, "height": 1300}, device_scale_factor=2)
    name = f"{theme}-{width}.ipynb"
    lab.write(name, f"{simulator.setup}\n{PRICES}", WARM_UP, cell, BEFORE, LOAD)
    nb = Notebook(context.new_page(), lab, name).open()
    nb.use_theme(f"JupyterLab {theme}")
    nb.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    for index in (0, 1):
        nb.run(index)
        nb.wait()
    yield nb
    context.close()
    lab.reset()


def take(nb: Notebook, name: str) -> None:
    """Write the picture of the prompt's cell."""
    nb.deselect()
    nb.page.mouse.move(0, 0)  # what is under the pointer shows more than a reader would see
    picture = nb.page.locator(".jp-CodeCell").nth(2).screenshot()
    (FOLDER / name).write_bytes(indexed(nb.page, picture))


# Each channel in so many levels that no more than 256 colours are left.
_PALETTE = """async (data) => {
  const picture = await createImageBitmap(
    await (await fetch(`data:image/png;base64,${data}`)).blob(),
  );
  const { width, height } = picture;
  const canvas = new OffscreenCanvas(width, height).getContext('2d');
  canvas.drawImage(picture, 0, 0);
  const rgba = canvas.getImageData(0, 0, width, height).data;
  for (let levels = 64; ; levels /= 2) {
    const level = (v) => Math.round(Math.round(v * (levels - 1) / 255) * 255 / (levels - 1));
    const colours = new Map(), pixels = new Uint8Array(width * height);
    for (let i = 0; i < pixels.length && colours.size <= 256; i++) {
      const key = [0, 1, 2].reduce((key, c) => key * 256 + level(rgba[4 * i + c]), 0);
      if (!colours.has(key)) colours.set(key, colours.size);
      pixels[i] = colours.get(key);
    }
    if (colours.size > 256) continue;
    const blocks = [];
    for (let i = 0; i < pixels.length; i += 8192) {
      blocks.push(String.fromCharCode(...pixels.subarray(i, i + 8192)));
    }
    return { width, height, colours: [...colours.keys()], pixels: btoa(blocks.join('')) };
  }
}"""


def indexed(page: Page, picture: bytes) -> bytes:
    """Return a PNG as one with a palette, a third of its size."""
    found = page.evaluate(_PALETTE, base64.b64encode(picture).decode())
    width, pixels = found["width"], base64.b64decode(found["pixels"])
    rows = b"".join(b"\0" + pixels[i : i + width] for i in range(0, len(pixels), width))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, found["height"], 8, 3, 0, 0, 0)),
        (b"PLTE", b"".join(colour.to_bytes(3) for colour in found["colours"])),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


if __name__ == "__main__":
    main()
