"""What a recipe knows for the model card."""

import pytest

from bissl_hf.cli.card import CardArguments, license_of, recipe_facts


def write_card(folder, metadata: str) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n")
    return str(folder)


def test_the_licence_of_the_base_model_is_inherited(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    base = write_card(tmp_path / "base", "license: cc-by-4.0")
    facts = recipe_facts(CardArguments(), dataset="digits", base_models=[None, str(bare), base])
    assert facts.license == "cc-by-4.0"
    assert recipe_facts(CardArguments(license="mit"), dataset="digits", base_models=[base]).license == "mit"


@pytest.mark.parametrize(
    "metadata", ["tags: [one]", "license: Home-made 1.0", "license: [mit, cc]", "license: {", "[]"]
)
def test_a_licence_that_cannot_be_read_is_not_known(tmp_path, metadata):
    assert license_of(write_card(tmp_path / "base", metadata)) is None


def test_a_hub_that_does_not_answer_stops_nothing():
    assert license_of("user/model") is None


def test_a_wrong_licence_is_refused():
    with pytest.raises(ValueError, match="license is 'mine'; it must be an identifier that the Hub knows"):
        recipe_facts(CardArguments(license="mine"), dataset="digits")


def test_only_hub_ids_are_base_models(tmp_path):
    facts = recipe_facts(
        CardArguments(), dataset="a/b", lower_dataset="c/d", base_models=["user/model", None, str(tmp_path)]
    )
    assert (facts.base_model, facts.dataset, facts.lower_dataset) == (["user/model"], "a/b", "c/d")
