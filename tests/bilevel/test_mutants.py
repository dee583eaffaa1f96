"""Each test breaks the hypergradient in one way, by another function in the place of one of its own, and shows that
the comparison with the restated algorithm (`test_the_trainer_follows_the_algorithm`) notices."""

from dataclasses import replace

import pytest
import torch

from bissl_hf import BiSSLTrainingArguments
from bissl_hf.bilevel import upper_phase
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.hypergradient import implicit_gradient
from bissl_hf.bilevel.level_losses import LevelLosses
from bissl_hf.bilevel.recycling import Directions
from bissl_hf.bilevel.upper_phase import Solve, UpperPhase
from bissl_hf.tensors import add_scaled, cosine

from ..trainer.restatement import Settings
from ..trainer.test_restatement import check_against_restatement

upper_gradient = LevelLosses.upper_gradient
level = BiSSLTrainingArguments.level


def identity_for_the_inverse(patch):
    def solve(curvature, rhs, **settings):
        return rhs, implicit_gradient(curvature, rhs, **settings)[1]

    patch.setattr(upper_phase, "implicit_gradient", solve)


def damping_dropped(patch):
    def solve(curvature, rhs, **settings):
        return implicit_gradient(curvature, rhs, **{**settings, "damping": 0.0})

    patch.setattr(upper_phase, "implicit_gradient", solve)


def gamma_dropped(patch):
    def gradient(losses, model, inputs, parameters, **settings):
        loss, found = upper_gradient(losses, model, inputs, parameters, **settings)
        is_direct = model is losses.model.upper and len(parameters) > len(losses.model.head_parameters("upper"))
        return loss, tuple(torch.zeros_like(part) for part in found) if is_direct else found

    patch.setattr(LevelLosses, "upper_gradient", gradient)


def theta_d_for_theta_p_in_the_right_hand_side(patch):
    def gradient(losses, model, inputs, parameters, **settings):
        if model is not losses.model.upper:
            own = losses.model
            model = own.without_side_effects("upper")
            parameters = (*own.backbone_parameters("upper"), *own.head_parameters("upper"))
        return upper_gradient(losses, model, inputs, parameters, **settings)

    patch.setattr(LevelLosses, "upper_gradient", gradient)


def a_stale_curvature(patch):
    build = UpperPhase.curvature

    def curvature(phase, alternation):
        return phase._curvature or build(phase, alternation)

    patch.setattr(UpperPhase, "curvature", curvature)
    patch.setattr(UpperPhase, "leave", lambda phase: None)
    patch.setattr(Curvature, "check_unchanged", lambda curvature: None)


def directions_of_another_phase(patch):
    def forget(phase):
        phase._curvature = None

    patch.setattr(UpperPhase, "_forget", forget)
    patch.setattr(Directions, "bind", lambda directions, curvature, shift: None)


def phi_p_live_in_the_derivative(patch):
    def solve(phase, alternation, rhs, proximal_weight, damping):
        curvature, heads = phase.curvature(alternation), phase.losses.model.head_parameters("lower")
        joint = Curvature(curvature._terms, (*curvature.parameters, *heads), mode="recompute")
        solution, info = implicit_gradient(
            joint,
            (*rhs, *(torch.zeros_like(head) for head in heads)),
            proximal_weight=proximal_weight,
            damping=damping,
            max_iterations=phase.settings.max_iterations,
            tolerance=phase.settings.tolerance,
        )
        return Solve(solution[: len(rhs)], info, cosine(curvature.gradient, rhs))

    patch.setattr(UpperPhase, "_solve", solve)


def proximal_term_counted_in_h(patch):
    def solve(curvature, rhs, **settings):
        def with_proximal_term(vector):
            return add_scaled(curvature(vector), vector, settings["proximal_weight"])

        return implicit_gradient(with_proximal_term, rhs, **settings)

    patch.setattr(upper_phase, "implicit_gradient", solve)


def learning_rates_of_the_levels_swapped(patch):
    def swapped(args, name, **settings):
        other = level(args, "upper" if name == "lower" else "lower")
        return replace(level(args, name, **settings), learning_rate=other.learning_rate)

    patch.setattr(BiSSLTrainingArguments, "level", swapped)


MUTANTS = [
    identity_for_the_inverse,
    damping_dropped,
    gamma_dropped,
    theta_d_for_theta_p_in_the_right_hand_side,
    a_stale_curvature,
    directions_of_another_phase,
    phi_p_live_in_the_derivative,
    proximal_term_counted_in_h,
    learning_rates_of_the_levels_swapped,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_restatement_notices(mutate, monkeypatch, tmp_path):
    mutate(monkeypatch)
    # A stale graph of cached products would be refused by torch itself, so this runs with rebuilt ones.
    mode = "cached" if mutate is not a_stale_curvature else "recompute"
    solver = "recycled" if mutate is directions_of_another_phase else "cg"
    with pytest.raises(AssertionError, match="largest_difference"):
        check_against_restatement(Settings(), tmp_path, curvature_mode=mode, solver=solver)


def test_the_code_itself_passes(tmp_path):
    check_against_restatement(Settings(), tmp_path)
