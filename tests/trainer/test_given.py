"""What a trainer is given is looked at before training: one sentence each, with the way out."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import TrainingArguments

from bissl_hf import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments
from bissl_hf.checkpoints import find_defect
from bissl_hf.data.alternation import Stream
from bissl_hf.data.augment import EvalTransform, TrainTransform, TwoViewTransform
from bissl_hf.data.balanced import BalancedRows
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.run_lock import holding_folder
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer
from bissl_hf.trainer.joint_trainer import JointTrainer
from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import FineTuningArguments, JointTrainingArguments, PretextTrainingArguments

from ..conftest import TinyImages, flip_a_bit, tiny_model, vit_model
from .trainers import make_args, make_trainer

BASIC = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}


def rows(count=12, **changes):
    return [{**TinyImages(count)[index], **changes} for index in range(count)]


def pictures(count=12, column="image", label="label"):
    generator = np.random.default_rng(0)
    images = [PIL.Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features(
        {column: datasets.Image(), **({label: datasets.ClassLabel(names=["a", "b", "c"])} if label else {})}
    )
    labels = {label: [index % 3 for index in range(count)]} if label else {}
    return datasets.Dataset.from_dict({column: images, **labels}, features=features)


def build(tmp_path, *, keywords=None, train=None, lower=None, model=None, cls=BiSSLTrainer, **overrides):
    return cls(
        model or tiny_model(),
        make_args(tmp_path, **overrides),
        train_dataset=TinyImages(12) if train is None else train,
        lower_dataset=TinyImages(24, pairs=True) if lower is None else lower,
        **(keywords or {}),
    )


def test_hooks_of_trainer_are_refused_with_ours(tmp_path):
    class Own(BiSSLTrainer):
        def compute_loss(self, *args, **kwargs):
            return None

    with pytest.raises(TypeError, match=r"compute_loss_func is not used by BiSSLTrainer; override compute_upper_loss"):
        build(tmp_path, keywords={"compute_loss_func": print})
    with pytest.raises(
        TypeError, match=r"Own overrides compute_loss, .*override compute_upper_loss.*compute_lower_loss"
    ):
        build(tmp_path, cls=Own)
    with pytest.raises(TypeError, match=r"model_init is not used by BiSSLTrainer; pass a model"):
        BiSSLTrainer(args=make_args(tmp_path), model_init=tiny_model)
    with pytest.raises(NotImplementedError, match=r"hyperparameter_search is not offered.*bissl-hf study"):
        build(tmp_path).hyperparameter_search()


def test_joint_training_refuses_them_too(tmp_path):
    args = JointTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **BASIC)
    data = {"train_dataset": TinyImages(12), "lower_dataset": TinyImages(24, pairs=True)}
    with pytest.raises(TypeError, match=r"compute_loss_func is not used by JointTrainer; override joint_loss"):
        JointTrainer(tiny_model(), args, compute_loss_func=print, **data)


@pytest.mark.parametrize("cls", [BiSSLTrainer, FineTuneTrainer, PretextTrainer, JointTrainer])
def test_plain_arguments_are_refused(tmp_path, cls):
    data = {"train_dataset": TinyImages(12)}
    if cls in (BiSSLTrainer, JointTrainer):
        data["lower_dataset"] = TinyImages(24, pairs=True)
    with pytest.raises(TypeError, match=rf"args is a TrainingArguments; {cls.__name__} takes \w+Arguments"):
        cls(model=tiny_model(), args=TrainingArguments(str(tmp_path), use_cpu=True), **data)


def test_streams_are_refused(tmp_path):
    stream = datasets.Dataset.from_list([{"x": 1}]).to_iterable_dataset()
    for name, given in (("train_dataset", {"train": stream}), ("lower_dataset", {"lower": stream})):
        with pytest.raises(TypeError, match=rf"{name} is a IterableDataset, .*leave out streaming=True"):
            build(tmp_path, **given)


def test_rows_that_do_not_fit_are_refused(tmp_path):
    image = PIL.Image.new("RGB", (8, 8))
    with pytest.raises(TypeError, match=r"A row of train_dataset has a PIL image in 'image'; .*train_transform="):
        build(tmp_path, train=[{"image": image, "labels": 0}] * 12)
    with pytest.raises(TypeError, match=r"A row of lower_dataset has a PIL image in 'image'; .*lower_transform="):
        build(tmp_path, lower=pictures(24, label=None))
    with pytest.raises(TypeError, match=r"A row of train_dataset is a tuple; it must be a dictionary"):
        build(tmp_path, train=[(1, 2)] * 12)
    with pytest.raises(ValueError, match=r"A row of train_dataset has no labels, only pixel_values, labels; .*Rename"):
        build(tmp_path, train=rows(labels=None))
    with pytest.raises(ValueError, match=r"train_dataset has the label 9, .* has 3 outputs, for the classes 0 to 2"):
        build(tmp_path, train=rows(labels=9))
    wrong = datasets.Dataset.from_dict({"pixel_values": [[0.0]] * 12, "labels": [0, 1, 2] * 3 + [1, 2, 7]})
    with pytest.raises(ValueError, match=r"train_dataset has the label 7, .*num_labels=8"):
        build(tmp_path, train=wrong)
    decoded = DecodedImages(np.zeros((12, 3, 8, 8), dtype=np.uint8), np.array([0, 1, 2] * 3 + [1, 2, 7]))
    for known in (decoded, BalancedRows(decoded)):
        with pytest.raises(ValueError, match=r"train_dataset has the label 7, .*num_labels=8"):
            build(tmp_path, train=known)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (BiSSLTrainer, BiSSLTrainingArguments),
        (FineTuneTrainer, FineTuningArguments),
        (PretextTrainer, PretextTrainingArguments),
        (JointTrainer, JointTrainingArguments),
    ],
)
def test_workers_without_room_in_shared_memory_are_refused(tmp_path, cls, arguments):
    room = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 10**12}
    lower = {"per_device_lower_batch_size": 8} if cls is BiSSLTrainer else {}
    args = arguments(str(tmp_path), per_device_train_batch_size=8, **lower, **BASIC, **room)
    pairs, both = TinyImages(24, pairs=True), tiny_model()
    model = {FineTuneTrainer: both.upper, PretextTrainer: both.lower}.get(cls, both)
    data = {"train_dataset": pairs if cls is PretextTrainer else TinyImages(12)}
    if model is both:
        data["lower_dataset"] = pairs
    with pytest.raises(ValueError, match=r"dataloader_num_workers is 2: .* bytes of shared memory, .*_workers to 0"):
        cls(model=model, args=args, **data)


def test_a_frozen_backbone_is_refused(tmp_path):
    model = tiny_model()
    model.lower.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters of the backbone are frozen, such as lower\..*requires_grad_"):
        build(tmp_path, model=model)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    trainer = make_trainer(tmp_path, num_alternations=1, save_strategy="epoch")
    trainer.train()
    again = make_trainer(tmp_path, num_alternations=1, save_strategy="epoch")
    with pytest.raises(
        ValueError, match=r"holds a run \(checkpoint-5\).*resume_from_checkpoint=True.*another output_dir"
    ):
        again.train()
    longer = make_trainer(tmp_path, num_alternations=2, save_strategy="epoch")
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 10


def test_a_run_of_which_nothing_whole_is_left_starts_from_its_beginning(tmp_path):
    settings = {"num_alternations": 1, "save_strategy": "epoch"}
    make_trainer(tmp_path, **settings).train()
    flip_a_bit(tmp_path / "checkpoint-5" / "model.safetensors")
    make_trainer(tmp_path, **settings).train()
    assert find_defect(tmp_path / "checkpoint-5") is None


def test_who_holds_a_folder_has_looked_into_it(tmp_path):
    """As a command that was killed while it wrote its model, and goes on without a checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    with holding_folder(tmp_path):
        make_trainer(tmp_path, num_alternations=1).train()
    with pytest.raises(ValueError, match=r"holds a run \(config.json\)"):
        make_trainer(tmp_path, num_alternations=1).train()


def test_the_reported_loss_is_the_one_that_is_trained(tmp_path):
    """In evaluation as in training the loss is that of the hook: here 100 times the cross entropy."""

    class Scaled(BiSSLTrainer):
        def compute_upper_loss(self, model, inputs):
            return 100 * model(**inputs).loss

    plain = make_trainer(tmp_path, eval_rows=6).evaluate()
    scaled = make_trainer(tmp_path, eval_rows=6, cls=Scaled).evaluate()
    for name in ("eval_loss", "eval_upper_loss"):
        assert scaled[name] == pytest.approx(100 * plain[name], rel=1e-5)


def test_label_smoothing_is_that_of_the_formula(tmp_path):
    """(1 - e) CE + e * mean over classes of -log p, in the upper loss and in the evaluation of it."""
    trainer = make_trainer(tmp_path, eval_rows=6, label_smoothing_factor=0.2)
    batch = {
        "pixel_values": torch.stack([row["pixel_values"] for row in TinyImages(6)]),
        "labels": torch.tensor([row["labels"] for row in TinyImages(6)]),
    }
    model = trainer.model.upper.eval()
    log_p = model(**batch).logits.double().log_softmax(-1)
    expected = -(0.8 * log_p[range(6), batch["labels"]] + 0.2 * log_p.mean(-1)).mean()
    assert trainer.compute_upper_loss(model, batch).detach().item() == pytest.approx(expected.item(), rel=1e-5)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.detach().item() == pytest.approx(expected.item(), rel=1e-5)
    assert outputs.logits.shape == (6, 3)


def test_label_smoothing_needs_one_class_per_row(tmp_path):
    model = tiny_model()
    model.upper.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"label_smoothing_factor smooths labels of one class each"):
        build(tmp_path, model=model, label_smoothing_factor=0.1)


def test_unused_columns_are_dropped_alike(tmp_path):
    """A column of text, which no collator could stack, is dropped in training and in evaluation."""

    def stack(batch):
        return {key: torch.stack([torch.as_tensor(row[key]) for row in batch]) for key in batch[0]}

    trainer = build(
        tmp_path, train=rows(text="a"), keywords={"eval_dataset": rows(6, text="b"), "data_collator": stack}
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_joint_training_drops_the_columns_of_each_task(tmp_path):
    """A row of either task keeps what its own model takes, in training and in evaluation."""
    args = JointTrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=8, **BASIC)
    trainer = JointTrainer(
        tiny_model(),
        args,
        train_dataset=rows(other=1),
        lower_dataset=[{**TinyImages(16, pairs=True)[index], "other": index} for index in range(16)],
        eval_dataset=rows(6, other=2),
    )
    assert trainer.streams.read(trainer.streams.key(Stream.LOWER)).keys() == {"pixel_values"}
    assert trainer.streams.read(trainer.streams.key(Stream.UPPER)).keys() == {"pixel_values", "labels"}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def colour_model() -> BiSSLModel:
    from transformers import ResNetForImageClassification

    from bissl_hf import SimCLRConfig, SimCLRForPreTraining

    from ..conftest import tiny_resnet_config

    config = tiny_resnet_config()
    config.num_channels = 3
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(6, 5)))
    return BiSSLModel.from_models(lower, ResNetForImageClassification(config))


@pytest.mark.parametrize("column", ["image", "img"])
def test_a_plain_dataset_with_a_column_of_images_works(tmp_path, column):
    trainer = build(
        tmp_path,
        model=colour_model(),
        train=pictures(12, column),
        lower=pictures(24, column, label=None),
        keywords={
            "eval_dataset": pictures(6, column, "labels"),
            "train_transform": TrainTransform(8),
            "lower_transform": TwoViewTransform(8),
            "eval_transform": EvalTransform(8),
        },
    )
    assert isinstance(trainer.train_dataset, DecodedImages)
    trainer.train()
    assert trainer.evaluate(pictures(6, column))["eval_loss"] > 0
    assert trainer.predict(pictures(6, column)).predictions.shape == (6, 3)


def test_a_data_set_with_a_transform_of_its_own_works(tmp_path):
    """`with_transform`, as in every tutorial, with the defaults of the arguments."""

    def tensors(batch):
        values = [torch.as_tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1) for image in batch["image"]]
        return {"pixel_values": values, "labels": batch["label"]}

    def views(batch):
        return {
            "pixel_values": [torch.stack([values] * 2) for values in tensors({**batch, "label": None})["pixel_values"]]
        }

    trainer = build(
        tmp_path,
        model=colour_model(),
        train=pictures().with_transform(tensors),
        lower=pictures(24, label=None).with_transform(views),
        keywords={"eval_dataset": pictures(6).with_transform(tensors)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_fine_tuning_and_pretraining_take_plain_data_sets(tmp_path):
    model = colour_model()
    tuned = FineTuneTrainer(
        model=model.upper,
        args=FineTuningArguments(str(tmp_path / "f"), num_train_epochs=1, label_smoothing_factor=0.1, **BASIC),
        train_dataset=pictures(),
        eval_dataset=pictures(6),
        train_transform=TrainTransform(8),
        eval_transform=EvalTransform(8),
    )
    tuned.train()
    args = PretextTrainingArguments(str(tmp_path / "p"), max_steps=1, per_device_train_batch_size=8, **BASIC)
    PretextTrainer(model.lower, args, train_dataset=pictures(), train_transform=TwoViewTransform(8)).train()


def test_columns_of_labels_are_not_dropped():
    images = DecodedImages.from_dataset(pictures(6, label="labels"), image_size=8)
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    numbers = pictures(6).cast_column("label", datasets.Value("int64"))
    assert DecodedImages.from_dataset(numbers, image_size=8).labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match=r"class_encode_column"):
        DecodedImages.from_dataset(pictures(6).cast_column("label", datasets.Value("string")), image_size=8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_kernel_in_first_order(tmp_path, attention):
    model = vit_model()
    model.set_attn_implementation(attention)
    make_trainer(tmp_path, model=model, solver="identity", num_alternations=1).train()


@pytest.mark.slow
# torch 2.13, 2026-11: the compiler looks at the gradient of a view.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_lower_level_trains_in_first_order(tmp_path):
    """The compiled run is the run that is not compiled, up to rounding."""
    plain = make_trainer(tmp_path / "a", solver="identity", num_alternations=1)
    plain.train()
    compiled = make_trainer(tmp_path / "b", solver="identity", num_alternations=1, torch_compile_backend="eager")
    compiled.train()
    for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["identity", "none", "mfac"])
def test_gradient_checkpointing_changes_no_number_in_first_order(tmp_path, solver):
    """Also in the aligned pass, whose backbone is another than that of the modules that are computed again."""
    settings = {"solver": solver, "num_alternations": 2, "lower_optim": "sgd"}
    plain = make_trainer(tmp_path / "a", model=vit_model(dropout=0.0), **settings)
    plain.train()
    saving = make_trainer(tmp_path / "b", model=vit_model(dropout=0.0), activation_checkpointing=True, **settings)
    saving.train()
    assert saving.model.is_activation_checkpointing
    for one, other in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_is_refused_where_the_model_has_none(tmp_path):
    trainer = make_trainer(tmp_path, solver="identity", activation_checkpointing=True)
    with pytest.raises(ValueError, match=r"BiSSLModel does not support activation checkpointing"):
        trainer.train()
