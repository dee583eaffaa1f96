"""Parts of a run: found again when finished, refused when begun with other settings."""

import pytest

from bissl_hf.cli.parts import Part

SETTINGS = {"rate": 0.1, "dims": (3, 4), "name": None}


def test_a_finished_part_is_found_again(tmp_path):
    part = Part(tmp_path / "a" / "b", SETTINGS)
    assert part.result is None
    assert Part(tmp_path / "a" / "b", SETTINGS).result is None, "begun is not finished"
    (part.folder / "checkpoint-3").mkdir()
    assert part.finish({"accuracy": 0.5, "rows": (1, 2)}) == {"accuracy": 0.5, "rows": [1, 2]}
    assert Part(tmp_path / "a" / "b", SETTINGS).result == {"accuracy": 0.5, "rows": [1, 2]}
    assert sorted(path.name for path in part.folder.iterdir()) == ["result.json", "settings.json"]


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused(tmp_path, finished):
    part = Part(tmp_path, SETTINGS)
    if finished:
        part.finish({})
    with pytest.raises(
        ValueError, match=r"was begun with other settings: extra was None and is 1; rate was 0.1 and is"
    ):
        Part(tmp_path, {**SETTINGS, "rate": 0.2, "extra": 1})


def test_only_one_process_writes(tmp_path):
    other = Part(tmp_path / "part", SETTINGS, writes=False)
    assert not (tmp_path / "part").exists()
    assert other.finish({"a": 1}) == {"a": 1}
    assert not (tmp_path / "part").exists()
