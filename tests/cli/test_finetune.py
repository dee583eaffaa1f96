"""What a search of the command finetune draws from."""

import pytest

from bissl_hf.cli.finetune import RepetitionArguments
from bissl_hf.trainer.search import SearchSpace


def test_ranges_are_those_of_the_optimizer_where_none_are_given() -> None:
    assert RepetitionArguments().space("sgd") == SearchSpace()
    assert RepetitionArguments().space("adamw") == SearchSpace.usual("adamw") != SearchSpace()
    given = RepetitionArguments(search_learning_rate=[1e-4, 1e-2]).space("adamw")
    assert given == SearchSpace((1e-4, 1e-2), SearchSpace.usual("adamw").weight_decay)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"search_weight_decay": [1.0, 0.1]}, "The range of weight_decay is .*; it must be two numbers above 0"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"search_trials": -1}, "search_trials is -1; it must be at least 0"),
    ],
)
def test_what_is_not_allowed_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepetitionArguments(**arguments)
