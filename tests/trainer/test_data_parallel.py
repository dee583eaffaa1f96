"""What is refused of a start on several processes, wherever it was asked for; rows that only fill up a batch."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from bissl_hf.trainer.data_parallel import (
    check_whole_model,
    num_own_rows,
    pad_rows,
    reduce_gradients_of,
    refuse_missing_devices,
)

from ..conftest import tiny_model
from .trainers import make_args, make_trainer

VARIABLES = [
    ("ACCELERATE_USE_FSDP", "true", "use plain data parallelism.*Leave `distributed_type: FSDP` out"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "use plain data parallelism.*Leave `distributed_type: DEEPSPEED` out"),
    ("ACCELERATE_USE_MEGATRON_LM", "true", "use plain data parallelism.*`distributed_type: MEGATRON_LM` out"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "use plain data parallelism.*Leave `parallelism_config` out"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", ".* no second derivative. Leave `dynamo_config` out"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "which is not supported.*Set `mixed_precision: bf16`"),
]


@pytest.mark.parametrize(("name", "value", "message"), VARIABLES, ids=[name for name, _, _ in VARIABLES])
def test_what_the_launcher_asks_for_is_refused(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is .*{message}"):
        make_args(tmp_path)


@pytest.mark.parametrize("value", ["no", "NO", "false", "False"])
def test_variables_that_turn_things_off_are_allowed(tmp_path, monkeypatch, value):
    for name, _, _ in VARIABLES[:5]:
        monkeypatch.setenv(name, value)
    make_args(tmp_path)


@pytest.mark.parametrize(("devices", "found"), [(0, "no GPU"), (1, "1 GPU")])
def test_more_processes_than_gpus_are_refused_with_the_file_of_accelerate(tmp_path, monkeypatch, devices, found):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    message = rf"started 2 processes .* finds {found} here\. Start one .*use_cpu .*default_config\.yaml, make that"
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, use_cpu=False)
    make_args(tmp_path, use_cpu=True)


def test_as_many_processes_as_gpus_are_allowed(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    refuse_missing_devices(uses_cpu=False, backend=None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    refuse_missing_devices(uses_cpu=False, backend="gloo")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    refuse_missing_devices(uses_cpu=False, backend=None)


@pytest.mark.parametrize("field", ["torch_compile_backend", "torch_compile_mode"])
def test_a_compiler_that_is_only_named_is_refused(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} is 'eager', which is not supported: a compiled graph"):
        make_args(tmp_path, **{field: "eager"})


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    model = tiny_model()
    model.upper.classifier.to("meta")
    with pytest.raises(ValueError, match=r"The parameters are on cpu, meta.*Load the models without device_map"):
        check_whole_model(model, second_order=True)


def test_a_model_under_tensor_parallelism_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.lower), "tp_size", 2)
    with pytest.raises(ValueError, match=r"lower is split by tensor parallelism over 2 processes.*without tp_plan"):
        check_whole_model(model, second_order=True)


def test_a_compiled_part_is_refused(tmp_path):
    model = tiny_model()
    model.lower.backbone.compile(backend="eager")
    with pytest.raises(ValueError, match=r"lower.backbone is compiled, and a compiled graph has no second derivative"):
        make_trainer(tmp_path, model=model)


def test_ddp_leaves_the_other_part_and_buffers_alone():
    model = tiny_model()
    reduce_gradients_of(model, model.lower)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert {name for name, _ in model.upper.named_parameters(prefix="upper")} <= ignored
    assert {name for name, _ in model.named_buffers()} <= ignored
    assert not {name for name, _ in model.lower.named_parameters(prefix="lower")} & ignored
    assert hasattr(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")


@pytest.mark.parametrize(
    ("end", "remainder", "process", "own"),
    [(False, 2, 1, 4), (True, -1, 1, 4), (True, 0, 1, 4), (True, 2, 0, 2), (True, 2, 1, 0), (True, 7, 1, 3)],
)
def test_num_own_rows(end, remainder, process, own):
    """With 4 rows for each process, of which `remainder` in all are no repetition."""
    state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    assert num_own_rows(SimpleNamespace(gradient_state=state, process_index=process), 4) == own


def test_rows_are_padded_in_nested_results():
    logits = (torch.arange(4.0).reshape(2, 2), {"labels": torch.tensor([1, 2])})
    padded = pad_rows(logits, 4)
    assert padded[0].tolist() == [[0, 1], [2, 3], [2, 3], [2, 3]]
    assert padded[1]["labels"].tolist() == [1, 2, 2, 2]
    assert pad_rows(None, 4) is None
    assert torch.equal(pad_rows(logits[0], 2), logits[0])
