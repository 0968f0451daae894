"""docs/architecture.md names every package, and only files that are there."""

import re

import pytest

from tests.helpers.pictures import FOLDER

PROJECT = FOLDER.parents[1]
PAGE = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:broker|policy|tests|integration)/[\w/.]*)`", PAGE)))
PACKAGES = sorted(
    path.parent.relative_to(PROJECT).as_posix()
    for name in ("broker", "policy")
    for path in (PROJECT / name).rglob("__init__.py")
    if path.parent != PROJECT / "broker"
)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_named_is_there(path: str) -> None:
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_named(package: str) -> None:
    assert f"`{package}/`" in PAGE


def test_short_names_are_of_the_folder_that_stands_before_them() -> None:
    for line in PAGE.splitlines():
        folder = ""
        for path in re.findall(r"`([\w/]+\.py)`", line):
            if "/" in path and (PROJECT / path).exists():
                folder = path.rpartition("/")[0]
            elif folder:
                parents = (folder, folder.rpartition("/")[0])
                assert any((PROJECT / parent / path).exists() for parent in parents), path
