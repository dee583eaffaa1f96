import pytest
import torch
from accelerate import Accelerator
from torch import nn

from bissl_hf.optim.optimizers import LARS, build_optimizer, parse_optimizer_options, takes_momentum, torch_optimizers
from bissl_hf.optim.pull import step_length
from bissl_hf.optim.two_level import TwoLevelOptimizer


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def set_gradients(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("exclude", [False, True])
def test_lars_follows_its_formula(exclude):
    weights = parameters((3, 4), (5,))
    expected, momenta = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]
    optimizer = LARS(
        weights, lr=0.7, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02, exclude_bias_and_norm=exclude
    )
    for step in range(4):
        set_gradients(weights, seed=step)
        for index, weight in enumerate(weights):
            update = weight.grad.clone()
            if not (exclude and weight.ndim == 1):
                update += 0.1 * expected[index]
                update *= 0.02 * float(expected[index].norm()) / float(update.norm())
            momenta[index] = 0.8 * momenta[index] + update
            expected[index] = expected[index] - 0.7 * momenta[index]
        optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        assert torch.allclose(weight, value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_the_trust_ratio_is_one_where_a_norm_is_zero(zero):
    (weight,) = parameters((3,))
    weight.grad = torch.ones_like(weight)
    if zero == "weight":
        weight.data.zero_()
    else:
        weight.grad.zero_()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    LARS([weight], lr=0.5).step()
    assert torch.equal(weight, before - 0.5 * gradient)


def test_lars_leaves_parameters_without_a_gradient_alone():
    first, second = parameters((3,), (3,))
    optimizer = LARS([first, second], lr=0.5, weight_decay=0.1)
    set_gradients([first], seed=0)
    before = second.detach().clone()
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_lars_refuses_negative_values(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        LARS(parameters((2,)), **{"lr": 1.0, name: -1.0})


def two_levels(name="sgd"):
    lower, upper = parameters((3, 2), (2,)), parameters((3, 2), (2,), seed=1)
    options = {"momentum": 0.9} if name == "sgd" else {}
    build = [
        build_optimizer(name, tensors, learning_rate=0.1, weight_decay=0.01, options=options, field="optim")
        for tensors in (upper, lower)
    ]
    return lower, upper, TwoLevelOptimizer(*build)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_step_moves_one_level_only(name):
    lower, upper, optimizer = two_levels(name)
    for level, other in ((lower, upper), (upper, lower), (lower, upper)):
        set_gradients(level, seed=3)
        before = [tensor.detach().clone() for tensor in level + other]
        state = {id(t): str(optimizer.upper.state.get(t)) + str(optimizer.lower.state.get(t)) for t in other}
        optimizer.step()
        assert not any(torch.equal(t, old) for t, old in zip(level, before, strict=False))
        assert all(torch.equal(t, old) for t, old in zip(other, before[len(level) :], strict=True))
        assert state == {id(t): str(optimizer.upper.state.get(t)) + str(optimizer.lower.state.get(t)) for t in other}
        for tensor in level:
            tensor.grad = None


def test_its_state_survives_a_file_to_the_bit(tmp_path):
    results = []
    for restart in (False, True):
        lower, upper, optimizer = two_levels()
        for step in range(6):
            if step == 3 and restart:
                torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
                kept = [t.detach().clone() for t in lower + upper]
                lower, upper, optimizer = two_levels()
                for tensor, value in zip(lower + upper, kept, strict=True):
                    tensor.data.copy_(value)
                optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)  # what a schedule does
            level = lower if step % 2 else upper
            set_gradients(level, seed=step)
            optimizer.step()
            for tensor in level:
                tensor.grad = None
        results.append([t.detach().clone() for t in lower + upper])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_groups_are_shared_with_the_owners_also_after_a_load_and_under_accelerate():
    _, _, optimizer = two_levels()
    assert [group["level"] for group in optimizer.param_groups] == ["upper", "lower"]
    prepared = Accelerator(cpu=True).prepare(optimizer)
    for rate in (123.0, 321.0):
        assert [group["level"] for group in prepared.param_groups] == ["upper", "lower"]
        for group, owner in zip(prepared.param_groups, (optimizer.upper, optimizer.lower), strict=True):
            group["lr"] = rate
            assert owner.param_groups[0]["lr"] == rate
        prepared.load_state_dict(prepared.state_dict())


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure is not supported"):
        two_levels()[2].step(lambda: 0.0)


@pytest.mark.parametrize("name", sorted(torch_optimizers()))
def test_every_named_optimizer_takes_a_step(name):
    weights = parameters((3, 4))
    decay = 0.0 if name in ("rprop",) else 0.01
    optimizer = build_optimizer(name, weights, learning_rate=0.1, weight_decay=decay, options={}, field="optim")
    set_gradients(weights, seed=0)
    before = weights[0].detach().clone()
    optimizer.step()
    assert not torch.equal(weights[0], before)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_weight_decay_applies_to_every_parameter():
    weights = parameters((3, 4), (4,))
    optimizer = build_optimizer(
        "sgd", weights, learning_rate=1.0, weight_decay=0.5, options={"momentum": 0.0}, field="optim"
    )
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.allclose(w, 0.5 * old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "magic"}, "lower_optim is 'magic'; it must be one of"),
        ({"options": {"nonsense": 1}}, "SGD .* does not take nonsense"),
        ({"options": {"lr": 0.5}}, "SGD .* does not take lr as options"),
        ({"options": {"weight_decay": 0.5}}, "SGD .* does not take weight_decay as options"),
        ({"name": "rprop"}, "takes no weight decay"),
    ],
)
def test_bad_optimizers_are_refused(changed, message):
    arguments = {"name": "sgd", "options": {}, **changed}
    with pytest.raises(ValueError, match=message):
        build_optimizer(
            arguments["name"], parameters((2,)), learning_rate=0.1, weight_decay=0.1, options=arguments["options"],
            field="lower_optim",
        )  # fmt: skip


def test_which_optimizers_take_momentum():
    taken = {name: takes_momentum(name, field="optim") for name in ("sgd", "lars", "rmsprop", "adamw", "AdamW_Torch")}
    assert taken == {"sgd": True, "lars": True, "rmsprop": True, "adamw": False, "AdamW_Torch": False}
    with pytest.raises(ValueError, match="lower_optim is 'lbfgs'; it must be one of"):
        takes_momentum("lbfgs", field="lower_optim")


@pytest.mark.parametrize("name", ["adamw_torch_fused", "AdamW_Torch_Fused"])
def test_the_fused_name_of_transformers_is_fused(name):
    optimizer = build_optimizer(name, parameters((2,)), learning_rate=0.1, weight_decay=0.0, options={}, field="optim")
    assert optimizer.defaults["fused"] is True


def test_lars_evaluates_a_closure_with_gradients():
    (weight,) = parameters((3,))
    before = weight.detach().clone()

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    loss = LARS([weight], lr=0.5, momentum=0.0, trust_coefficient=1.0).step(closure)
    assert loss.item() == pytest.approx(before.square().sum().item())
    # The gradient 2 w, scaled to the length of w, is w itself.
    assert torch.allclose(weight, 0.5 * before, rtol=1e-13)


def test_options_are_read_as_literals():
    assert parse_optimizer_options(None, field="optim_args") == {}
    assert parse_optimizer_options("nesterov=True, betas=(0.9, 0.95)", field="optim_args") == {
        "nesterov": True,
        "betas": (0.9, 0.95),
    }
    for text in ("nesterov", "a=b", "0.9", "a=1) + (2", "**{'a': 1}"):
        with pytest.raises(ValueError, match="optim_args is"):
            parse_optimizer_options(text, field="optim_args")
    for value in ("2", "1.0", "-0.1", "True", "'0.9'", "None"):
        with pytest.raises(ValueError, match=rf"optim_args has momentum={value}; it must be a number of at least 0"):
            parse_optimizer_options(f"momentum={value}", field="optim_args")


@pytest.mark.parametrize(
    "value", ["-" * 50_000 + "1", "-" * 3000 + "1", "(" * 5000, "[" * 3000 + "]" * 3000, "9" * 5000, "1+" * 5000 + "1"]
)
def test_options_that_are_too_deep_are_one_short_sentence(value):
    with pytest.raises(ValueError, match=r"characters.; it must read like") as info:
        parse_optimizer_options(f"x={value}", field="optim_args")
    assert len(str(info.value)) < 300


def test_the_effective_step_length_of_each_optimizer():
    weights = parameters((3, 4), (4,))
    gradients = [torch.full_like(w, 0.5) for w in weights]

    def length(name, **options):
        optimizer = build_optimizer(name, weights, learning_rate=9.0, weight_decay=0.0, options=options, field="optim")
        return float(step_length(optimizer, weights, gradients))

    assert length("sgd") == pytest.approx(1.0)
    assert length("sgd", momentum=0.9) == pytest.approx(10.0)
    ratios = [0.001 * float(w.detach().norm()) / float(g.norm()) for w, g in zip(weights, gradients, strict=True)]
    assert length("lars", momentum=0.9) == pytest.approx(10 * (ratios[0] ** 12 * ratios[1] ** 4) ** (1 / 16))
    assert length("lars", momentum=0.0, exclude_bias_and_norm=True) == pytest.approx(ratios[0] ** (12 / 16))
    assert length("adamw") == pytest.approx(2.0)  # 1 / sqrt(g^2)


def test_the_effective_step_length_uses_the_second_moments_collected_so_far():
    (weight,) = parameters((2,))
    optimizer = build_optimizer("adam", [weight], learning_rate=0.1, weight_decay=0.0, options={}, field="optim")
    moments = torch.zeros(2, dtype=torch.float64)
    for step in range(3):
        set_gradients([weight], seed=step)
        moments = 0.999 * moments + 0.001 * weight.grad**2
        optimizer.step()
    corrected = moments / (1 - 0.999**3)
    expected = float(1 / (corrected.sqrt() + 1e-8).mean())
    assert float(step_length(optimizer, [weight], [weight.grad])) == pytest.approx(expected)


def test_the_effective_step_length_of_other_optimizers_is_not_known():
    weights = parameters((2,))
    optimizer = build_optimizer("rmsprop", weights, learning_rate=0.1, weight_decay=0.0, options={}, field="optim")
    with pytest.raises(ValueError, match="step length of RMSprop is not known"):
        step_length(optimizer, weights, weights)


def test_tensors_of_zeros_do_not_count_for_lars():
    (weight,), zero = parameters((3,)), nn.Parameter(torch.zeros(5, dtype=torch.float64))
    gradients = [torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)]
    optimizer = build_optimizer(
        "lars", [weight, zero], learning_rate=1.0, weight_decay=0.0, options={"momentum": 0.0}, field="optim"
    )
    expected = 0.001 * float(weight.detach().norm()) / 3**0.5
    assert float(step_length(optimizer, [weight, zero], gradients)) == pytest.approx(expected)


def test_an_option_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"AdamW \(from optim='adamw'\) refuses \{'betas': 0.9\}"):
        build_optimizer(
            "adamw", parameters((2,)), learning_rate=0.1, weight_decay=0.0, options={"betas": 0.9}, field="optim"
        )
