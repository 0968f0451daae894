"""Explanations that the supervisor gives, and where it has its catalogue and its snaps from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.supervisor.snaps.catalogue import Snaps, load_own_library
from broker.wire.errors import CallRefusedError, ConfigError
from policy.rules import AccessList
from policy.snaps.installed import World
from policy.snaps.library import CatalogueError, Library
from policy.text import parse_rule
from tests.helpers.snapstage import ME, OTHER, PAIR, PLAYER, QUESTION, REMOTE, Stage, open_stage


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Stage]:
    with open_stage(tmp_path) as stage:
        yield stage


@pytest.fixture
async def stage(empty: Stage) -> Stage:
    await empty.load(PLAYER, REMOTE, OTHER)
    return empty


# explaining


async def test_a_denial_is_explained_for_a_tag_and_for_a_sandbox(stage: Stage) -> None:
    id_ = await stage.add("remote")
    for what in (
        id_,
        f"/org/freedesktop/DBus/Containers1/{id_}",
        "remote.remote",
        "snap.remote.remote",
    ):
        explanation = await stage.policy.explain(ME, what, QUESTION)
        assert not explanation.verdict.allowed
        found = [str(one.connection) for one in explanation.remedies if one.connection]
        assert found == [" ".join(PAIR)]
    await stage.policy.connect(ME, *PAIR)
    for what in (id_, "remote.remote"):
        explanation = await stage.policy.explain(ME, what, QUESTION)
        assert explanation.verdict.allowed
        assert "connected remote:control player:control" in explanation.origin


async def test_what_a_sandbox_was_given_is_part_of_the_explanation(stage: Stage) -> None:
    id_ = await stage.add("remote", access=AccessList(rules=(parse_rule("send:", deny=True),)))
    await stage.policy.connect(ME, *PAIR)
    explanation = await stage.policy.explain(ME, id_, QUESTION)
    assert explanation.verdict.rule == parse_rule("send:", deny=True)
    assert explanation.remedies == ()
    stranger = await stage.add("remote", type="org.example.Other")
    (remedy,) = (await stage.policy.explain(ME, stranger, QUESTION)).remedies
    assert remedy.rule is not None


async def test_who_may_ask_about_whom(stage: Stage) -> None:
    id_ = await stage.add("remote")
    with pytest.raises(CallRefusedError, match="belongs to another user"):
        await stage.policy.explain(ME + 1, id_, QUESTION)
    for what in ("c99", "remote.nothing", ""):
        with pytest.raises(CallRefusedError, match="no installed snap has an app"):
            await stage.policy.explain(ME, what, QUESTION)


# the catalogue and the state file


async def test_a_wrong_file_of_ones_own_is_a_clear_error(empty: Stage) -> None:
    def load() -> Library:
        raise CatalogueError("mine.toml", 3, "what is this")

    snaps = Snaps(World(), load)
    with pytest.raises(CallRefusedError, match=r"mine\.toml:3: what is this"):
        snaps.interface("dbus")
    await empty.load(PLAYER)
    with pytest.raises(ConfigError, match=r"mine\.toml:3"):
        Snaps(empty.state.load_world(), load)


async def test_a_stored_connection_that_makes_no_sense_any_more_is_dropped(stage: Stage) -> None:
    await stage.policy.connect(ME, *PAIR)
    stage.state.put_connection("gone:plug", "player:control")
    assert len(stage.restart().snaps.ready().connections) == 1


def test_ones_own_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config/buswarden/interfaces.d"
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text('summary = "Mine."\n')
    assert load_own_library().interfaces["mine"].interface.summary == "Mine."
