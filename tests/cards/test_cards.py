"""Model cards: what they say is what the run was, and an edited card is never lost."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from bissl_hf.cards.card import build_converted_card, build_model_card
from bissl_hf.cards.descriptions import describe, native_usage
from bissl_hf.cards.facts import LICENSES, ModelFacts, check_license
from bissl_hf.cards.record import ModelRecord, RunRecord, Settings, loaded_from_hub, record_model, settings_of
from bissl_hf.cards.tables import Evaluation, markdown_table, metrics_under, settings_table
from bissl_hf.cards.writing import write_model_card

# From the Hub's own messages about cards that it refuses.
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")


CLASSIFIER = ModelRecord(
    "ResNetForImageClassification", "resnet", 1234, task="image-classification",
    loader="AutoModelForImageClassification", has_pipeline=True, processor="AutoImageProcessor",
    class_names=("cat", "dog"), takes_images=True,
)  # fmt: skip
SIMCLR = ModelRecord("SimCLRForPreTraining", "simclr", 2_500_000, takes_images=True)
LOGS = [
    {"step": 5, "loss": 2.0, "levels/pull": 0.5, "levels/moved": 0.1, "levels/distance": 0.2},
    {"step": 5, "eval_loss": 1.5, "eval_accuracy": 0.25, "eval_upper_accuracy": 0.125, "eval_runtime": 3.0},
    {"step": 10, "loss": 1.0, "levels/pull": 1.25, "levels/moved": 0.3, "levels/distance": 0.4},
    {"step": 10, "eval_loss": 1.25, "eval_accuracy": 0.5, "eval_upper_accuracy": 0.375, "eval_runtime": 3.0},
]


def make_record(**changes) -> RunRecord:
    """Two alternations of three lower and two upper steps, with an evaluation in each."""
    record = RunRecord(
        "aligned", {"upper": CLASSIFIER, "lower": SIMCLR},
        arguments={"num_alternations": 2, "lower_steps": 3, "upper_steps": 2},
        arguments_class="BiSSLTrainingArguments",
        settings={
            "Both levels": Settings({"damping": 1 / 3, "seed": 7}, {"damping": 10.0, "seed": 42}),
            "Upper level": Settings({"learning_rate": 0.1, "optim": "sgd"}, {"learning_rate": 0.015, "optim": "sgd"}),
        },
        examples={"train": 12, "lower": 24, "eval": 9}, log_history=LOGS, steps=10,
        versions={"bissl_hf": "1.2.3", "torch": "4.5"},
    )  # fmt: skip
    return replace(record, **changes)


def card_of(folder: Path, record: RunRecord | None = None, *, model_name: str | None = None, **facts) -> ModelCard:
    card = build_model_card(record or make_record(), ModelFacts(**facts), folder=folder, model_name=model_name)
    return ModelCard.load(write_model_card(card, folder))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny-run").mkdir()
    return tmp_path / "tiny-run"


def tables_of(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """All tables of a card: by the heading above, then by their first column, then by the heading of the column."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    heading, part, columns = "", "", None
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif not set("".join(cells)) <= set("-: "):
            part = cells[0] or part  # a part of the settings is named once
            tables.setdefault(heading, {})[f"{part} {cells[1]}"] = dict(zip(columns, [part, *cells[1:]], strict=True))
    return tables


def assert_the_hub_takes(card: ModelCard) -> None:
    """The rules of the Hub's metadata, as its documentation and its messages state them."""
    metadata = yaml.safe_load(str(card).split("---\n")[1])
    assert metadata.get("license", "mit") in LICENSES
    for name in metadata.get("datasets", []):
        assert DATASET_TYPE.fullmatch(name)
    for entry in metadata.get("model-index", []):
        assert entry["name"]
        for result in entry["results"]:
            assert result["task"]["type"]
            assert result["dataset"]["name"]
            assert DATASET_TYPE.fullmatch(result["dataset"]["type"])
            assert all(isinstance(metric["type"], str) and "value" in metric for metric in result["metrics"])
    assert all(value not in (None, [], "") for value in metadata.values())


# What the card says


def test_the_last_evaluation_is_in_the_table_and_in_the_metadata(folder):
    card = card_of(folder, dataset="uoft-cs/cifar10")
    assert_the_hub_takes(card)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"loss": 1.25, "accuracy": 0.5}
    assert results["accuracy"].dataset_type == "uoft-cs/cifar10"
    assert results["accuracy"].dataset_split == "validation"
    assert results["accuracy"].task_type == card.data.pipeline_tag == "image-classification"
    assert card.data.metrics == ["accuracy"]
    table = tables_of(card.text)["Evaluation"]
    assert table["**This model** validation (9)"]["Loss"] == "1.2500"
    assert table["The upper level's model validation (9)"]["Accuracy"] == "0.3750"


def test_the_best_checkpoint_is_the_one_that_counts(folder):
    results = card_of(folder, make_record(best_step=5), dataset="digits").data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {"loss": 1.5, "accuracy": 0.25}


def test_progress_is_that_of_the_last_log(folder):
    text = " ".join(card_of(folder).text.split())
    assert "2 alternations of 3 lower steps and 2 upper steps. The pull of the upper level on the lower one" in text
    assert "summed over the run, is 1.25." in text
    assert "has moved by 0.3 of its norm, and its distance to that of the upper level is 0.4 of its norm." in text
    assert "10 steps were taken on one process (cpu) with bissl_hf 1.2.3, torch 4.5." in text


@pytest.mark.parametrize(
    ("level", "chosen", "sentences", "accuracy"),
    [
        ("aligned", "aligned", ["This is the aligned model"], 0.5),
        ("upper", "upper", ["This is the upper level's model"], 0.375),
        ("upper", "best", ["This is the upper level's model", "It did better in the last evaluation"], 0.375),
    ],
)
def test_the_card_is_of_the_level_that_is_saved(folder, level, chosen, sentences, accuracy):
    arguments = {**make_record().arguments, "export_level": chosen}
    card = card_of(folder, make_record(exported_level=level, arguments=arguments), dataset="digits")
    assert all(sentence in " ".join(card.text.split()) for sentence in sentences)
    assert sum(f"This is the {name}" in card.text for name in ("aligned model", "upper level's model")) == 1
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["accuracy"] == accuracy
    table = tables_of(card.text)["Evaluation"]
    assert float(table["**This model** validation (9)"]["Accuracy"]) == accuracy
    other = {"aligned": "The upper level's model", "upper": "The aligned model"}[level]
    assert float(table[f"{other} validation (9)"]["Accuracy"]) == 0.875 - accuracy


COUPLINGS = [
    (
        {"solver": "cg", "curvature_kind": "hessian", "damping": 10.0, "proximal_weight": 0.001, "target_pull": None},
        {},
        "The proximal weight lambda was 0.001. The solver of the upper steps was `cg` with the curvature `hessian`, "
        "its damping 10.",
    ),
    (
        {
            "solver": "recycled", "curvature_kind": "gauss_newton", "damping": "auto", "proximal_weight": None,
            "target_pull": 3.0,
        },
        {"levels/proximal_weight": 0.25, "solver/damping": 0.125},
        "The proximal weight lambda was 0.25 at the end, found for a pull of 3. The solver of the upper steps was "
        "`recycled` with the curvature `gauss_newton`, its damping 0.125 at the end (`auto`).",
    ),
    (
        {"solver": "mfac", "curvature_kind": "hessian", "damping": 2.0, "proximal_weight": 1.0, "target_pull": None},
        {},
        "The solver of the upper steps was `mfac`, its damping 2.",
    ),
    (
        {"solver": "none", "curvature_kind": "hessian", "damping": 2.0, "proximal_weight": 1.0, "target_pull": None},
        {},
        "The solver of the upper steps was `none`, which has no damping.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "figures", "sentences"), COUPLINGS, ids=lambda value: str(value)[:24])
def test_the_card_says_what_coupled_the_levels(folder, arguments, figures, sentences):
    earlier = dict.fromkeys(figures, 99.0)  # only the last figures count
    logs = [{**LOGS[0], **earlier}, LOGS[1], {**LOGS[2], **figures}, LOGS[3]]
    record = make_record(arguments={**make_record().arguments, **arguments}, log_history=logs)
    text = " ".join(card_of(folder, record).text.split())
    assert sentences in text
    assert "summed over the run, is 1.25." in text
    assert " 99 " not in text


def test_settings_are_listed_by_part_where_they_differ_from_the_defaults(folder):
    @dataclass
    class Views:
        crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
        horizontal_flip: bool = True

    card = card_of(folder, settings={"Views": Views(crop_scale=[0.5, 1.0])})
    table = tables_of(card.text)["Training"]
    assert {name: (row["Value"], row["Default"]) for name, row in table.items()} == {
        "Both levels `damping`": ("0.3333", "10.0"), "Both levels `seed`": ("7", "42"),
        "Upper level `learning_rate`": ("0.1", "0.015"), "Views `crop_scale`": ("0.5, 1.0", "0.08, 1.0"),
    }  # fmt: skip
    assert "differ from the defaults of `BiSSLTrainingArguments`" in card.text
    assert "All settings are the defaults of" in card_of(folder, make_record(settings={})).text
    rows = tables_of(settings_table({"A": Settings({"o": {"num": 1}, "seed": 1}, {})}, skip=["seed"]))[""]
    assert {name: row["Value"] for name, row in rows.items()} == {"A `o`": '`{"num": 1}`'}
    assert settings_of(Views()) == Settings(
        {"crop_scale": [0.08, 1.0], "horizontal_flip": True}, {"crop_scale": [0.08, 1.0], "horizontal_flip": True}
    )


def test_data_sets_are_named_with_their_sizes_and_linked_where_they_are_on_the_hub(folder):
    card = card_of(folder, dataset="digits", lower_dataset="stl10")
    rows = list(tables_of(card.text)["Training data"].values())
    assert [(row["Data"], row["Examples"]) for row in rows] == [
        ("the digits of scikit-learn", "12"),
        ("[STL-10](https://huggingface.co/datasets/jxie/stl10)", "24"),
    ]
    assert card.data.datasets == ["jxie/stl10"]
    assert card.data.eval_results[0].dataset_type == "digits"


def test_arguments_take_the_place_of_facts():
    facts = ModelFacts(dataset="digits", license="mit", tags=["mine"])
    changed = facts.with_card_arguments(
        "en", "apache-2.0", "more", "microsoft/resnet-18", "image-to-image", ["user/a", "user/b"], "small"
    )
    assert changed == ModelFacts(
        dataset="user/a", lower_dataset="user/b", base_model="microsoft/resnet-18", license="apache-2.0",
        language="en", tags=["mine", "more"], task="image-to-image", dataset_config="small",
    )  # fmt: skip
    assert facts == ModelFacts(dataset="digits", license="mit", tags=["mine"])


def test_facts_are_in_text_and_metadata(folder):
    card = card_of(
        folder, dataset="user/a", lower_dataset="user/b", base_model="microsoft/resnet-18", license="apache-2.0",
        language="en", tags=["mine"], task="image-to-image", dataset_config="small", model_name="renamed",
    )  # fmt: skip
    assert_the_hub_takes(card)
    data = card.data
    assert (data.language, data.license, data.base_model) == ("en", "apache-2.0", "microsoft/resnet-18")
    assert data.datasets == ["user/a", "user/b"]
    assert {"bissl", "mine"} <= set(data.tags)
    assert (data.eval_results[0].task_type, data.eval_results[0].dataset_config) == ("image-to-image", "small")
    assert "\n# renamed\n" in card.text
    assert "Training started from [microsoft/resnet-18](https://huggingface.co/microsoft/resnet-18)." in card.text


def test_a_split_is_called_what_it_is_called_on_the_hub(folder):
    card = card_of(folder, dataset="food101", evaluations=[Evaluation("This model", "test", {"accuracy": 0.5})])
    assert_the_hub_takes(card)
    (result,) = card.data.eval_results  # validation images were taken from the training split
    assert len(tables_of(card.text)["Evaluation"]) == 3
    assert (result.dataset_type, result.dataset_name) == ("ethz/food101", "Food-101")
    assert (result.dataset_split, len(result.dataset_revision)) == ("validation", 40)


def test_further_evaluations_stand_first_and_only_those_of_the_model_are_metadata(folder):
    card = card_of(
        folder,
        dataset="digits",
        evaluations=[
            Evaluation("Another | model", "test", {"accuracy": 0.25}, described=False),
            Evaluation("This model", "test", {"accuracy": 2 / 3, "loss": math.nan}, 1234),
        ],
    )
    assert_the_hub_takes(card)
    test = [result for result in card.data.eval_results if result.dataset_split == "test"]
    assert [(result.metric_type, result.metric_value) for result in test] == [("accuracy", 2 / 3)]
    rows = list(tables_of(card.text)["Evaluation"].values())
    assert rows[0]["Model"] == "Another \\| model"
    assert (rows[1]["Split"], rows[1]["Accuracy"], rows[1]["Loss"]) == ("test (1,234)", "0.6667", "nan")


def test_what_is_not_known_is_left_out(folder):
    card = card_of(folder)
    assert_the_hub_takes(card)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "Data" not in next(iter(tables_of(card.text)["Training data"].values()))
    for word in ("None", "![", "Training started from", 'bilevel")', "[More Information"):
        assert word not in card.text
    assert 'pipeline("image-classification", model="path/to/this/folder")' in card.text


def test_no_path_of_this_machine_is_told(tmp_path, folder, monkeypatch):
    images = tmp_path / "patients" / "ward-7"
    images.mkdir(parents=True)
    monkeypatch.chdir(images.parent)
    record = make_record(settings={"Views": Settings({"blur": [str(images)], "optim_args": "ward-7"}, {})})
    card = card_of(folder, record, dataset=str(images), lower_dataset=str(tmp_path / "gone"), base_model=str(images))
    assert_the_hub_takes(card)
    assert not re.search(r"patients|ward-7|gone|/tmp|/home|/root", str(card))
    assert card.data.eval_results[0].dataset_type == "imagefolder"
    assert {"datasets", "base_model"}.isdisjoint(card.data.to_dict())


def test_figures_and_both_levels_are_shown_where_they_are(folder):
    (folder / "figures").mkdir()
    for name in ("tsne.png", "training.png", "class_sizes.png", "a [b](c).png", "notes.txt"):
        (folder / "figures" / name).touch()
    (folder / "figures" / "linked.png").symlink_to(folder / "figures" / "tsne.png")
    (folder / "bilevel").mkdir()
    (folder / "bilevel" / "config.json").touch()
    text = card_of(folder).text
    assert re.findall(r"!\[.+\]\((.+)\)", text) == [
        "figures/a%20%5Bb%5D%28c%29.png", "figures/class_sizes.png", "figures/tsne.png", "figures/training.png",
    ]  # fmt: skip
    assert text.index("tsne.png") < text.index("## Training\n") < text.index("training.png")
    assert 'BiSSLModel.from_pretrained("path/to/this/folder", subfolder="bilevel")' in text


def test_the_repository_is_named_where_there_is_one(folder):
    text = card_of(folder, make_record(repository="user/aligned")).text
    assert 'pipeline("image-classification", model="user/aligned")' in text
    assert "\n# aligned\n" in text
    assert "path/to" not in text


def test_the_same_run_gives_the_same_card(folder):
    first = (card_of(folder), (folder / "README.md").read_bytes())[1]
    card_of(folder)
    assert (folder / "README.md").read_bytes() == first


HOSTILE = "\x1b[2J\u202e<img src=x onerror=alert(1)> [a](http://e.example) `|` ![b](c)\n---\nlicense: mit\n# T"


def test_hostile_names_are_shown_as_text_and_leave_the_metadata_valid(folder):
    model = replace(CLASSIFIER, class_names=(HOSTILE, "dog"))
    logs = [{"step": 1, "eval_loss": 1.0, f"eval_{HOSTILE}": 0.5}]
    record = make_record(
        models={"upper": model, "lower": SIMCLR}, log_history=logs, repository=None,
        settings={HOSTILE: Settings({HOSTILE: HOSTILE}, {})},
    )  # fmt: skip
    card = card_of(
        folder, record, model_name=HOSTILE, dataset=HOSTILE.replace("/", ""), tags=[HOSTILE],
        evaluations=[Evaluation(HOSTILE, HOSTILE, {"accuracy": 0.5})],
    )  # fmt: skip
    assert_the_hub_takes(card)
    assert "license" not in card.data.to_dict()
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", card.text, flags=re.S)
    for harm in ("<img", "[a](", "![b]", "http://e"):
        assert harm not in outside_code
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", (folder / "README.md").read_text())
    assert "\n# T" not in card.text


# Kinds of models


def test_a_pretext_model_has_a_card_of_its_own(folder):
    record = make_record(
        kind="pretext", models={"model": SIMCLR}, settings={}, arguments_class="PretextTrainingArguments",
        log_history=[{"step": 1, "loss": 1.0}],
    )  # fmt: skip
    card = card_of(folder, record, dataset="jxie/stl10")
    assert_the_hub_takes(card)
    assert (card.data.library_name, card.data.pipeline_tag) == ("bissl_hf", "image-feature-extraction")
    assert card.data.datasets == ["jxie/stl10"]
    assert "model-index" not in card.data.to_dict()
    assert "A `SimCLRForPreTraining` with 2.5 million parameters. It was pre-trained by [SimCLR]" in card.text
    assert "--lower_model path/to/this/folder" in card.text


def test_joint_and_single_models_have_cards(folder):
    joint = card_of(folder, make_record(kind="joint"))
    assert joint.data.library_name == "transformers"
    assert 'from_pretrained("path/to/this/folder")' in joint.text
    assert [row["Examples"] for row in tables_of(joint.text)["Training data"].values()] == ["12", "24"]
    tuned = card_of(folder, make_record(kind="classifier", models={"model": CLASSIFIER}))
    assert "for 2 classes: `cat`, `dog`. It was trained on labelled examples" in tuned.text
    with pytest.raises(ValueError, match="kind is 'other'; a record of a run is one of aligned, joint, pretext"):
        describe(make_record(kind="other"))


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ([0.5], "found the class of 50.0% of the validation images."),
        ([0.5, 0.1, 0.75], "of 50.0% of the validation images at the first check and of 75.0% at the last."),
    ],
)
def test_a_running_check_is_told(folder, checks, told):
    logs = [{"knn_accuracy": value, "step": 1} for value in checks]
    assert told in card_of(folder, make_record(kind="pretext", models={"model": SIMCLR}, log_history=logs)).text


def test_a_converted_model_has_a_card(folder):
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=1))
    text = str(build_converted_card(model, ModelFacts(license="mit"), folder=folder))
    assert "Its weights were converted" in text
    assert "## Training" not in text


@pytest.mark.parametrize(
    ("model", "task", "loader"),
    [
        (ViTForImageClassification, "image-classification", "AutoModelForImageClassification"),
        (BertForSequenceClassification, "text-classification", "AutoModelForSequenceClassification"),
    ],
)
def test_the_pipeline_and_the_loader_follow_the_class(model, task, loader):
    config = {ViTForImageClassification: ViTConfig, BertForSequenceClassification: BertConfig}[model]
    with torch.device("meta"):
        instance = model(config(num_hidden_layers=1))
    record = record_model(instance)
    assert (record.task, record.class_names) == (task, ("LABEL_0", "LABEL_1"))
    assert record.num_parameters == sum(parameter.numel() for parameter in instance.parameters())
    codes = [snippet.code for snippet in native_usage(record)]
    assert f'pipeline("{task}", model="{{model}}")' in codes[0]
    assert f'{loader}.from_pretrained("{{model}}")' in codes[1]


def test_models_from_the_hub_are_recognised_by_their_commit():
    hub, local = ViTConfig(name_or_path="user/vit"), ViTConfig(name_or_path="user/local")
    hub._commit_hash = "0" * 40
    folder = ViTConfig(name_or_path=str(Path(__file__).parent))
    folder._commit_hash = "0" * 40
    assert loaded_from_hub(hub, None, local, folder, hub) == ["user/vit"]


# Licences and metrics


@pytest.mark.parametrize("name", ["apache", "Apache-2.0", ""])
def test_a_licence_that_the_hub_would_refuse_is_refused(folder, name):
    with pytest.raises(ValueError, match=f"license is '{name}'; it must be an identifier that the Hub knows"):
        check_license(name)
    with pytest.raises(ValueError, match="license is"):
        card_of(folder, license=name)
    assert not (folder / "README.md").exists()


def test_metrics_are_told_from_what_an_evaluation_says_of_itself():
    report = {
        "eval_loss": 1, "eval_accuracy": np.float64(0.5), "eval_runtime": 3.0, "eval_samples_per_second": 2.0,
        "eval_upper_loss": 4.0, "test_loss": 5.0, "epoch": 2.0, "eval_note": "fine",
    }  # fmt: skip
    assert metrics_under(report, "eval") == {"loss": 1.0, "accuracy": 0.5}
    assert metrics_under(report, "eval_upper") == {"loss": 4.0}


def test_a_table_has_a_cell_for_each_column():
    table = markdown_table([{"a": 1, "b": "x|y"}, {"b": "two\nlines", "c": 0.123456}])
    assert table.splitlines() == [
        "| a | b | c |", "| --: | --- | --: |", "| 1 | x\\|y |  |", "|  | two lines | 0.1235 |",
    ]  # fmt: skip


# Cards that somebody has edited


def plain_card(text: str) -> ModelCard:
    return ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {text}\n")


def test_an_untouched_card_is_renewed(tmp_path):
    assert write_model_card(plain_card("One"), tmp_path) == tmp_path / "README.md"
    assert write_model_card(plain_card("Two"), tmp_path) == tmp_path / "README.md"
    assert "# Two" in (tmp_path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("# One", "# My model"),
        lambda text: text.replace("library_name", "license: mit\nlibrary_name"),
        lambda text: text + "My words at the end.\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "# Only mine\n",
        lambda text: "\xff" + text,
    ],
    ids=["text", "metadata", "end", "line ends", "not ours", "another encoding"],
)
def test_an_edited_card_is_left_to_the_byte(tmp_path, edit):
    path = write_model_card(plain_card("One"), tmp_path)
    edited = edit(path.read_text()).encode("latin-1")
    path.write_bytes(edited)
    other = write_model_card(plain_card("Two"), tmp_path)
    assert path.read_bytes() == edited
    assert other == tmp_path / "README.new-1.md"
    assert "# Two" in other.read_text()
    other.write_text("My notes")
    assert write_model_card(plain_card("Three"), tmp_path) == tmp_path / "README.new-2.md"
    assert other.read_text() == "My notes"


def test_the_user_is_told_where_the_new_card_lies(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("bissl_hf.cards.writing.logger.warning", told.append)
    (tmp_path / "README.md").write_text("# Mine\n")
    write_model_card(plain_card("Two"), tmp_path)
    assert told == [
        f"{tmp_path / 'README.md'} was written or edited by hand and is left as it is; the card of this run is in "
        "README.new-1.md."
    ]


def test_metadata_survive_json(folder):
    """The Hub turns the metadata into JSON, which has no dates, sets or numbers that are not finite."""
    json.dumps(card_of(folder, dataset="digits").data.to_dict(), allow_nan=False)
