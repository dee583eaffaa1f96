"""The names that the package offers."""

import bissl_hf


def test_only_public_names_are_listed_and_each_is_there():
    assert dir(bissl_hf) == sorted(bissl_hf.__all__) == sorted(bissl_hf._EXPORTS)
    assert not [name for name in dir(bissl_hf) if name.startswith("_") or not hasattr(bissl_hf, name)]


def test_trainers_and_their_arguments_are_at_the_top():
    for name in ("BiSSL", "Joint", "Pretext"):
        assert {f"{name}Trainer", f"{name}TrainingArguments"} <= set(dir(bissl_hf))
    assert {"FineTuneTrainer", "FineTuningArguments", "load_image_task", "ImageTask"} <= set(dir(bissl_hf))
