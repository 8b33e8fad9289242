"""Pictures of the simulator: as the Responses API tells them, and nowhere else."""

from __future__ import annotations

import io
from base64 import b64decode
from typing import Any

import openai
import pytest
from PIL import Image

from nbcodex.simulator.generated_answers import PICTURE_SIZE, png_pattern
from tests.simulator.asking import MODEL, sdk, simulator
from tests.virtual import run_virtual

TOOLS: Any = [{"type": "image_generation"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_is_an_item_of_the_answer(stream: bool) -> None:
    """The SDK reads it, streamed or whole: a call that is completed, its result a PNG file."""

    async def main() -> Any:
        async with sdk(simulator()) as client:
            if not stream:
                return await client.responses.create(model=MODEL, input="a cat", tools=TOOLS)
            events = await client.responses.create(
                model=MODEL, input="a cat", tools=TOOLS, stream=True
            )
            *_, last = [event async for event in events]
            return last.response  # type: ignore[union-attr]

    (item,) = run_virtual(main()).output
    assert (item.type, item.status) == ("image_generation_call", "completed")
    with Image.open(io.BytesIO(b64decode(item.result))) as picture:
        assert (picture.format, picture.size) == ("PNG", (PICTURE_SIZE, PICTURE_SIZE))


def test_chat_draws_nothing() -> None:
    """Chat Completions refuse the tool, in the real server's words."""

    async def main() -> None:
        async with sdk(simulator()) as client:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "a cat"}], tools=TOOLS
            )

    with pytest.raises(openai.BadRequestError, match="Supported values are: 'function'"):
        run_virtual(main())


def test_a_prompt_has_its_picture() -> None:
    """The same each time, and another for another."""
    assert png_pattern("a cat") == png_pattern("a cat") != png_pattern("a dog")
