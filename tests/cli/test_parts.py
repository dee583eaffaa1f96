"""Parts of a run: found again when finished, refused when begun with other settings."""

import pytest

from bissl_hf.checkpoints import DamagedFileError
from bissl_hf.cli.parts import Stage

from ..conftest import flip_a_bit

SETTINGS = {"rate": 0.1, "dims": (3, 4), "name": None}


def test_a_finished_part_is_found_again(tmp_path):
    part = Stage(tmp_path / "a" / "b", SETTINGS)
    assert part.result is None
    assert Stage(tmp_path / "a" / "b", SETTINGS).result is None, "begun is not finished"
    (part.folder / "checkpoint-3").mkdir()
    assert part.finish({"accuracy": 0.5, "rows": (1, 2)}) == {"accuracy": 0.5, "rows": [1, 2]}
    assert Stage(tmp_path / "a" / "b", SETTINGS).result == {"accuracy": 0.5, "rows": [1, 2]}
    assert sorted(path.name for path in part.folder.iterdir()) == ["result.json", "settings.json"]


@pytest.mark.parametrize("left", ["result.json", "checkpoint-3/weights", "backbone/search.db"])
def test_other_settings_are_refused_once_there_is_something_to_lose(tmp_path, left):
    Stage(tmp_path, SETTINGS)
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(
        ValueError, match=r"was begun with other settings: extra was None and is 1; rate was 0.1 and is"
    ):
        Stage(tmp_path, {**SETTINGS, "rate": 0.2, "extra": 1})


def test_settings_can_be_corrected_while_there_is_nothing_to_lose(tmp_path):
    Stage(tmp_path, SETTINGS)
    Stage(tmp_path / "backbone", SETTINGS)
    corrected = {**SETTINGS, "rate": 0.2}
    Stage(tmp_path, corrected).finish({})
    Stage(tmp_path, corrected)
    with pytest.raises(ValueError, match=r"begun with other settings: rate was 0.2 and is 0.1"):
        Stage(tmp_path, SETTINGS)


def test_looking_leaves_nothing_behind(tmp_path):
    part = Stage(tmp_path / "part", SETTINGS, begins=False)
    assert part.result is None
    assert list(tmp_path.iterdir()) == []
    part.begin()
    assert [path.name for path in part.folder.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("content", ["", '{"a": 1', "[]"])
@pytest.mark.parametrize("name", ["settings.json", "result.json"])
def test_damaged_files_are_named(tmp_path, name, content):
    Stage(tmp_path, SETTINGS).finish({})
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name} is empty or damaged. Put a whole copy"):
        Stage(tmp_path, SETTINGS).result  # noqa: B018
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("at", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_a_flipped_bit_in_a_result_is_found(tmp_path, at):
    Stage(tmp_path, SETTINGS).finish({"accuracy": 0.512345, "rows": [1, 2, 3], "name": "ours"})
    flip_a_bit(tmp_path / "result.json", at)
    with pytest.raises(DamagedFileError, match=r"result.json is empty or damaged"):
        Stage(tmp_path, SETTINGS).result  # noqa: B018


def test_only_one_process_writes(tmp_path):
    other = Stage(tmp_path / "part", SETTINGS, writes=False)
    assert not (tmp_path / "part").exists()
    assert other.finish({"a": 1}) == {"a": 1}
    assert not (tmp_path / "part").exists()
