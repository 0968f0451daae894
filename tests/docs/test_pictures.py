"""The pictures of docs/ are those of their descriptions, and pages show them."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.helpers.pictures import FOLDER, draw, pictures

DOCS = FOLDER.parent


@pytest.mark.parametrize(
    ("path", "picture"), list(pictures()), ids=lambda value: Path(value).stem[:20]
)
def test_picture_is_that_of_its_description(path: Path, picture: str) -> None:
    assert path.read_text(encoding="utf-8") == picture, "run python -m tests.helpers.pictures"
    ET.fromstring(picture)
    shown = [page for page in DOCS.glob("*.md") if f"pictures/{path.name}" in page.read_text()]
    assert shown, f"no page of docs/ shows {path.name}"


def test_no_picture_is_without_a_description() -> None:
    assert {path.stem for path in FOLDER.glob("*.svg")} == {p.stem for p in FOLDER.glob("*.toml")}


def test_text_cannot_break_a_picture() -> None:
    made = draw(
        {
            "kind": "sequence",
            "title": "a <b> & c",
            "actors": ["one", "two"],
            "step": [{"from": "one", "to": "two", "text": "<&>"}],
        }
    )
    texts = [node.text for node in ET.fromstring(made).iter() if node.text]
    assert "<&>" in texts
    assert "a <b> & c" in texts


def test_a_step_between_actors_that_are_not_there_is_refused() -> None:
    wrong = {"kind": "sequence", "title": "", "actors": ["a"], "step": [{"from": "b", "text": ""}]}
    with pytest.raises(KeyError):
        draw(wrong)
