"""Model cards: what they say is what the run was, and an edited card is never lost."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from bissl_hf.cards.facts import LICENSES, ModelFacts, check_license
from bissl_hf.cards.tables import Evaluation, markdown_table, metrics_under, settings_table, statistics_table
from bissl_hf.cards.text import loaded_from_hub, native_usage, task_of
from bissl_hf.cards.writing import write_model_card
from bissl_hf.cli.images import ViewArguments
from bissl_hf.evaluation.metrics import classification_metrics

from ..trainer.test_bissl_trainer import make_args
from ..trainer.test_bissl_trainer import make_trainer as make_bissl_trainer
from ..trainer.test_pretext_trainer import make_trainer as make_pretext_trainer

# From the Hub's own messages about cards that it refuses.
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny trainer after two alternations, with an evaluation in each."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-run"
    trainer = make_bissl_trainer(
        folder, eval_rows=9, direct_weight=0.25, lower_optim_args="nesterov=True", bf16=False,
        keywords={"compute_metrics": classification_metrics()},
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture
def trainer(trained, tmp_path):
    """The trained trainer, with an output folder and facts of its own."""
    clone = copy.copy(trained)
    clone.args = copy.copy(trained.args)
    clone.args.output_dir = str(tmp_path / "tiny-run")
    clone.facts = ModelFacts()
    return clone


def card_of(trainer, **arguments) -> ModelCard:
    trainer.create_model_card(**arguments)
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


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


def test_the_last_evaluation_is_in_the_table_and_in_the_metadata(trainer):
    card = card_of(trainer, dataset="uoft-cs/cifar10")
    assert_the_hub_takes(card)
    last = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    results = {result.metric_type: result for result in card.data.eval_results}
    logged = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    expected = {name: value for name, value in logged.items() if not re.search("upper|runtime|per_second", name)}
    assert {"loss", "accuracy"} <= set(expected)
    assert {name: result.metric_value for name, result in results.items()} == expected
    assert results["accuracy"].dataset_type == "uoft-cs/cifar10"
    assert results["accuracy"].dataset_split == "validation"
    assert results["accuracy"].task_type == card.data.pipeline_tag == "image-classification"
    assert card.data.metrics == sorted(set(expected) - {"loss"})
    table = tables_of(card.text)["Evaluation"]
    assert table["**This model** validation (9)"]["Loss"] == f"{last['eval_loss']:.4f}"
    assert table["The upper level's model validation (9)"]["Accuracy"] == f"{last['eval_upper_accuracy']:.4f}"


def test_solver_statistics_are_those_of_the_logs(trainer):
    logs = [log for log in trainer.state.log_history if "solver/residual" in log]
    assert len(logs) == 2
    residuals = [log["solver/residual"] for log in logs]
    table = tables_of(card_of(trainer).text)["Linear solves"]
    row = next(row for title, row in table.items() if title.startswith("Relative residual"))
    assert row["Mean"] == f"{np.mean(residuals):.4g}"
    assert (row["First log"], row["Last log"]) == (f"{residuals[0]:.4g}", f"{residuals[1]:.4g}")
    cosines = next(row for title, row in table.items() if title.startswith("Cosine of solution"))
    assert cosines["Last log"] == f"{logs[-1]['solver/cosine']:.4g}"
    shares = next(row for title, row in table.items() if "negative curvature" in title)
    assert shares["Last log"] == f"{logs[-1]['solver/negative_curvature']:.4g}"
    assert f"summed over the run, is {logs[-1]['levels/pull']:.3g}" in " ".join(card_of(trainer).text.split())


def test_a_mean_over_logs_counts_each_solve_once():
    """Three steps of which the first is a lower one; logs after steps 1 and 3 cover no and two solves, then one."""
    history = [{"step": 2, "residual": 1.0}, {"step": 3, "residual": 4.0}, {"step": 6, "residual": 7.0}]
    upper = [False, True, True, False, True, True]
    table = statistics_table(history, {"residual": "Residual"}, lambda before, now: sum(upper[before:now]))
    assert tables_of(table)[""]["Residual 4.75"] == {
        "": "Residual", "Mean": f"{(1 * 1 + 1 * 4 + 2 * 7) / 4:.4g}", "First log": "1", "Last log": "7",
    }  # fmt: skip


def test_settings_that_differ_from_the_defaults_are_all_listed(trainer):
    from dataclasses import fields

    table = tables_of(card_of(trainer).text)["Training"]
    listed = {row["Setting"].strip("`"): row for row in table.values()}
    given = {
        "num_alternations": "2", "lower_steps": "3", "upper_steps": "2", "head_warmup_epochs": "1", "seed": "7",
        "per_device_lower_batch_size": "8", "per_device_train_batch_size": "5", "lower_optim": "sgd",
        "per_device_eval_batch_size": "4",
        "lower_learning_rate": "0.05", "learning_rate": "0.02", "proximal_weight": "20.0", "damping": "600.0",
        "lower_warmup_steps": "0", "direct_weight": "0.25", "solver_max_iterations": "2",
        "lower_optim_args": "nesterov=True",
    }  # fmt: skip
    assert {name: row["Value"] for name, row in listed.items()} == given
    defaults = {field.name: field.default for field in fields(trainer.args)}
    assert {name: row["Default"] for name, row in listed.items()} == {
        name: "none" if defaults[name] is None else str(defaults[name]) for name in given
    }
    assert listed["lower_learning_rate"]["Part"] == "Lower level"
    assert listed["learning_rate"]["Part"] == "Upper level"
    assert listed["lower_steps"]["Part"] == "Both levels"


def test_settings_of_a_recipe_are_listed_by_part():
    args = make_args(
        "somewhere", damping=1 / 3, lr_scheduler_type="cosine", lr_scheduler_kwargs='{"num_cycles": 0.25}'
    )
    rows = tables_of(settings_table(args, {"Views": ViewArguments(crop_scale=[0.5, 1.0])}, skip=["seed"]))[""]
    assert rows["Both levels `damping`"]["Value"] == "0.3333"
    assert rows["Views `crop_scale`"]["Value"] == "0.5, 1.0"
    assert rows["Views `crop_scale`"]["Default"] == "0.08, 1.0"
    assert rows["Upper level `lr_scheduler_type`"]["Value"] == "cosine"
    assert rows["Upper level `lr_scheduler_kwargs`"]["Value"] == '`{"num_cycles": 0.25}`'
    assert not any("seed" in name or "horizontal_flip" in name for name in rows)


def test_data_sets_are_named_with_their_sizes_and_linked_where_they_are_on_the_hub(trainer):
    trainer.facts = ModelFacts(dataset="digits", lower_dataset="stl10")
    card = card_of(trainer)
    rows = list(tables_of(card.text)["Training data"].values())
    assert [(row["Data"], row["Examples"]) for row in rows] == [
        ("the digits of scikit-learn", "12"),
        ("[STL-10](https://huggingface.co/datasets/jxie/stl10)", "24"),
    ]
    assert card.data.datasets == ["jxie/stl10"]
    assert card.data.eval_results[0].dataset_type == "digits"


def test_arguments_take_the_place_of_facts(trainer):
    trainer.facts = ModelFacts(dataset="digits", license="mit", tags=["mine"])
    card = card_of(
        trainer, language="en", license="apache-2.0", tags="more", model_name="renamed", tasks="image-to-image",
        finetuned_from="microsoft/resnet-18", dataset_tags=["user/labelled", "user/unlabelled"], dataset_args="small",
    )  # fmt: skip
    assert_the_hub_takes(card)
    data = card.data
    assert (data.language, data.license, data.base_model) == ("en", "apache-2.0", "microsoft/resnet-18")
    assert data.datasets == ["user/labelled", "user/unlabelled"]
    assert {"bissl", "mine", "more"} <= set(data.tags)
    assert (data.eval_results[0].task_type, data.eval_results[0].dataset_config) == ("image-to-image", "small")
    assert "\n# renamed\n" in card.text
    assert "Training started from [microsoft/resnet-18](https://huggingface.co/microsoft/resnet-18)." in card.text
    assert trainer.facts == ModelFacts(dataset="digits", license="mit", tags=["mine"])


def test_a_split_is_called_what_it_is_called_on_the_hub(trainer):
    trainer.facts = ModelFacts(dataset="food101", evaluations=[Evaluation("This model", "test", {"accuracy": 0.5})])
    card = card_of(trainer)
    assert_the_hub_takes(card)
    (result,) = card.data.eval_results  # validation images were taken from the training split
    assert len(tables_of(card.text)["Evaluation"]) == 3
    assert (result.dataset_type, result.dataset_name) == ("ethz/food101", "Food-101")
    assert (result.dataset_split, len(result.dataset_revision)) == ("validation", 40)
    assert card.data.datasets == ["ethz/food101"]


def test_further_evaluations_stand_first_and_only_those_of_the_model_are_metadata(trainer):
    trainer.facts = ModelFacts(
        dataset="digits",
        evaluations=[
            Evaluation("Another | model", "test", {"accuracy": 0.25}, described=False),
            Evaluation("This model", "test", {"accuracy": 2 / 3, "loss": float("nan")}, 1234),
        ],
    )
    card = card_of(trainer)
    assert_the_hub_takes(card)
    test = [result for result in card.data.eval_results if result.dataset_split == "test"]
    assert [(result.metric_type, result.metric_value) for result in test] == [("accuracy", 2 / 3)]
    rows = list(tables_of(card.text)["Evaluation"].values())
    assert rows[0]["Model"] == "Another \\| model"
    assert (rows[1]["Split"], rows[1]["Accuracy"], rows[1]["Loss"]) == ("test (1,234)", "0.6667", "nan")


def test_what_is_not_known_is_left_out(trainer):
    card = card_of(trainer)
    assert_the_hub_takes(card)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "Data" not in next(iter(tables_of(card.text)["Training data"].values()))
    for word in ("None", "![", "Training started from", 'bilevel")', "[More Information"):
        assert word not in card.text
    assert 'pipeline("image-classification", model="path/to/this/folder")' in card.text


def test_a_trainer_that_has_not_trained_has_a_card(tmp_path):
    card = card_of(make_bissl_trainer(tmp_path / "untrained"))
    assert set(tables_of(card.text)) == {"Training data", "Training"}
    assert "0 steps were taken" in card.text


def test_no_path_of_this_machine_is_told(trainer, tmp_path, monkeypatch):
    images = tmp_path / "patients" / "ward-7"
    images.mkdir(parents=True)
    monkeypatch.chdir(images.parent)
    trainer.args.lower_optim_args = "ward-7"
    trainer.facts = ModelFacts(
        dataset=str(images), lower_dataset=str(tmp_path / "gone"), base_model=str(images),
        settings={"Views": ViewArguments(blur=[str(images)])},
    )  # fmt: skip
    card = card_of(trainer)
    assert_the_hub_takes(card)
    for part in ("/", "patients", "ward-7", "gone"):
        assert part not in re.sub(
            r"https://\S+|</?\w+|figures/|path/to/this/folder", "", yaml.dump(card.data.to_dict())
        )
    assert not re.search(r"patients|ward-7|gone|/tmp|/home|/root", str(card))
    assert card.data.eval_results[0].dataset_type == "imagefolder"
    assert "datasets" not in card.data.to_dict()
    assert "base_model" not in card.data.to_dict()


def test_figures_and_both_levels_are_shown_where_they_are(trainer):
    folder = Path(trainer.args.output_dir)
    (folder / "figures").mkdir(parents=True)
    for name in ("tsne.png", "training.png", "class_sizes.png", "notes.txt"):
        (folder / "figures" / name).touch()
    trainer.model.save_pretrained(folder / "bilevel")
    text = card_of(trainer).text
    links = re.findall(r"!\[(.+)\]\((.+)\)", text)
    assert [path for _, path in links] == ["figures/class_sizes.png", "figures/tsne.png", "figures/training.png"]
    assert all((folder / path).is_file() for _, path in links)
    assert text.index("tsne.png") < text.index("## Training\n") < text.index("training.png")
    assert 'BiSSLModel.from_pretrained("path/to/this/folder", subfolder="bilevel")' in text


def test_the_repository_is_named_where_there_is_one(trainer):
    trainer.args.hub_model_id = "user/aligned"
    text = card_of(trainer).text
    assert 'pipeline("image-classification", model="user/aligned")' in text
    assert "\n# aligned\n" in text
    assert "path/to" not in text


def test_code_in_the_card_loads_the_model(trainer, monkeypatch):
    folder = Path(trainer.args.output_dir)
    trainer.model.export(folder, recalibrate_on=trainer.recalibration_batches())
    trainer.model.save_pretrained(folder / "bilevel")
    text = card_of(trainer).text
    monkeypatch.chdir(folder.parent)
    pieces = [
        code.replace("path/to/this/folder", "tiny-run") for code in re.findall(r"```python\n(.*?)```", text, re.S)
    ]
    found = []
    for code in pieces:
        if "pipeline" not in code:
            names: dict = {}
            exec(code, names)
            found.append(type(names["model"]).__name__)
    assert found == ["ResNetForImageClassification", "BiSSLModel"]


def test_the_same_run_gives_the_same_card(trainer):
    trainer.facts = ModelFacts(dataset="digits", license="mit")
    first = (card_of(trainer), (Path(trainer.args.output_dir) / "README.md").read_bytes())[1]
    card_of(trainer)
    assert (Path(trainer.args.output_dir) / "README.md").read_bytes() == first


def test_the_best_checkpoint_is_the_one_that_counts(trainer):
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    trainer.state = copy.copy(trainer.state)
    trainer.state.best_global_step = logs[0]["step"]
    trainer.args.load_best_model_at_end = True
    values = {
        result.metric_type: result.metric_value for result in card_of(trainer, dataset="digits").data.eval_results
    }
    assert values["loss"] == logs[0]["eval_loss"] != logs[1]["eval_loss"]


def test_a_solver_without_a_system_has_no_solver_statistics(tmp_path):
    trainer = make_bissl_trainer(tmp_path / "identity", solver="identity", num_alternations=1)
    trainer.train()
    text = card_of(trainer).text
    assert "Linear solves" not in text
    assert "residual" not in text
    assert list(tables_of(text)["Levels"])
    assert "| `solver` | identity | cg |" in text


# Other kinds of models


def test_a_pretext_model_has_a_card_of_its_own(tmp_path):
    trainer = make_pretext_trainer(tmp_path / "simclr", num_train_epochs=2)
    trainer.train()
    trainer.facts = ModelFacts(dataset="jxie/stl10")
    card = card_of(trainer)
    assert_the_hub_takes(card)
    assert (card.data.library_name, card.data.pipeline_tag) == ("bissl_hf", "image-feature-extraction")
    assert card.data.datasets == ["jxie/stl10"]
    assert "model-index" not in card.data.to_dict()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    row = next(iter(tables_of(card.text)["Loss"].values()))
    assert row["Mean"] == f"{np.mean(losses):.4g}"
    assert "--lower_model path/to/this/folder" in card.text
    assert tables_of(card.text)["Training"]["Training `per_device_train_batch_size`"]["Value"] == "8"


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ([0.5], "found the class of 50.0% of the validation images."),
        ([0.5, 0.1, 0.75], "of 50.0% of the validation images at the first check and of 75.0% at the last."),
    ],
)
def test_a_running_check_is_told(tmp_path, checks, told):
    trainer = make_pretext_trainer(tmp_path / "simclr")
    trainer.state.log_history = [{"knn_accuracy": value, "step": 1} for value in checks]
    assert told in card_of(trainer).text


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
    assert task_of(instance) == task
    codes = [snippet.code for snippet in native_usage(instance, None)]
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
def test_a_licence_that_the_hub_would_refuse_is_refused(trainer, name):
    with pytest.raises(ValueError, match=f"license is '{name}'; it must be an identifier that the Hub knows"):
        check_license(name)
    trainer.facts = ModelFacts(license=name)
    with pytest.raises(ValueError, match="license is"):
        trainer.create_model_card()
    assert not (Path(trainer.args.output_dir) / "README.md").exists()


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


def test_only_the_first_process_writes(trainer, monkeypatch):
    monkeypatch.setattr(type(trainer), "is_world_process_zero", lambda self: False)
    trainer.create_model_card()
    assert not Path(trainer.args.output_dir).exists()


def test_metadata_survive_json(trainer):
    """The Hub turns the metadata into JSON, which has no dates, sets or numbers that are not finite."""
    json.dumps(card_of(trainer, dataset="digits").data.to_dict(), allow_nan=False)
