"""Dict schemas mean what the JSON Schema project's own test suite says (Debian packages it)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY

from nbcodex.errors import ConfigurationError
from nbcodex.openai_api.sent_schema import is_object, sent_form
from nbcodex.requests import structured_output
from nbcodex.requests.structured_output import SchemaMismatchError

SUITE = Path(os.environ.get("JSON_SCHEMA_TEST_SUITE", "/usr/share/json-schema-test-suite"))
DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
}

pytestmark = pytest.mark.skipif(
    not (SUITE / "tests").is_dir(), reason="the package json-schema-test-suite is not installed"
)


def groups(draft: str) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Yield a name, a schema and its tests; without booleans, which are no dicts."""
    for path in sorted((SUITE / "tests" / draft).glob("*.json")):
        if path.stem == "refRemote":  # nothing is downloaded
            continue
        for group in json.loads(path.read_text()):
            if isinstance(group["schema"], dict) and group["schema"]:
                name = f"{path.stem}: {group['description']}"
                yield name, {"$schema": DRAFTS[draft], **group["schema"]}, group["tests"]


def is_accepted_here(schema: Any, value: object) -> bool:
    text = json.dumps(value if is_object(schema.definition) else {"value": value})
    try:
        return bool([structured_output.parse_answer(schema, text)])
    except SchemaMismatchError:
        return False


def is_accepted_by_reference(definition: dict[str, Any], value: object) -> bool:
    try:
        return bool(validator_for(definition)(definition, registry=REGISTRY).is_valid(value))
    except Exception:  # a reference to another document, which is not downloaded
        return False


@pytest.mark.parametrize("draft", DRAFTS)
def test_values_are_accepted_as_the_reference_validator_accepts_them(draft: str) -> None:
    """Apart from nulls of optional fields, which count as left out."""
    differences, compared, refused = [], 0, 0
    for name, definition, tests in groups(draft):
        try:
            schema = structured_output.to_schema(definition)
        except ConfigurationError:
            refused += 1  # it refers to another document
            assert "$ref" in json.dumps(definition), name
            continue
        assert schema
        sent, _ = sent_form(schema)
        assert sent["type"] == "object"
        for test in tests:
            expected = is_accepted_by_reference(definition, test["data"])
            compared += 1
            if is_accepted_here(schema, test["data"]) != expected:
                differences.append((name, test["description"]))
    assert differences == []
    assert compared > 250
    assert refused < 10
