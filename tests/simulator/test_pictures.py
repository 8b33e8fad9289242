"""Generated pictures, which only the Responses API has."""

from __future__ import annotations

import io
from base64 import b64decode
from typing import Any

import openai
import pytest
from PIL import Image

from nbcodex.simulator.generated_answers import PICTURE_SIZE, png_pattern
from tests.simulator.helpers import MODEL, sdk, simulator
from tests.virtual import run_virtual

TOOLS: Any = [{"type": "image_generation"}]


@pytest.mark.parametrize("stream", [False, True])
def test_sdk_reads_the_picture_as_an_output_item(stream: bool) -> None:
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


def test_chat_completions_rejects_the_image_tool() -> None:
    async def main() -> None:
        async with sdk(simulator()) as client:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "a cat"}], tools=TOOLS
            )

    with pytest.raises(openai.BadRequestError, match="Supported values are: 'function'"):
        run_virtual(main())


def test_picture_depends_on_the_prompt_alone() -> None:
    assert png_pattern("a cat") == png_pattern("a cat") != png_pattern("a dog")
