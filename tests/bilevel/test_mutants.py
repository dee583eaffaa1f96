"""Each test breaks the hypergradient in one way, by changing the text of a function, and shows that the comparison
with the restated algorithm (`test_the_trainer_follows_the_algorithm`) notices."""

import inspect
import sys
import textwrap
from dataclasses import replace

import pytest

from bissl_hf.bilevel import hypergradient, recycling
from bissl_hf.trainer.bissl_trainer import BiSSLTrainer

from ..trainer.restatement import Settings
from ..trainer.test_restatement import check_against_restatement

MUTANTS = {
    "gamma dropped": [(BiSSLTrainer, "_upper_step", "if at_theta_d:", "if False:")],
    "theta_D for theta_P in the right-hand side": [
        (
            BiSSLTrainer,
            "_upper_step",
            'self.model.without_side_effects("aligned"), inputs, (*theta_p, *phi_d)',
            'self.model.without_side_effects("upper"), inputs, (*theta_d, *phi_d)',
        )
    ],
    "a stale curvature": [
        (BiSSLTrainer, "leave_upper_phase", "self._curvature = self._directions = None", "pass"),
        (
            BiSSLTrainer,
            "_curvature_of",
            "self._curvature is None or self._curvature[0] != key.alternation",
            "self._curvature is None",
        ),
        (hypergradient.Curvature, "check_unchanged", "if self._current_versions() != self._versions:", "if False:"),
    ],
    "directions of another phase": [
        (BiSSLTrainer, "leave_upper_phase", "self._curvature = self._directions = None", "self._curvature = None"),
        (
            BiSSLTrainer,
            "_directions_of",
            "self._directions is None or self._directions[0] != key.alternation",
            "self._directions is None",
        ),
        (recycling.Directions, "bind", "if self._matrix is None:", "if True:"),
    ],
    "phi_P live in the derivative": [
        (
            BiSSLTrainer,
            "_build_curvature",
            "self.model.lower_shared_parameters()",
            "(*self.model.lower_shared_parameters(), *self.model.lower_head_parameters())",
        ),
        (
            BiSSLTrainer,
            "_solve",
            "        curvature,\n        rhs,\n",
            "        curvature,\n        (*rhs, *[torch.zeros_like(p) for p in "
            "self.model.lower_head_parameters()]),\n",
        ),
        (BiSSLTrainer, "_upper_step", "(*solution,", "(*solution[: len(theta_p)],"),
        (BiSSLTrainer, "_solve", "cosine(curvature.gradient, rhs)", "rhs[0].sum()"),
        (BiSSLTrainer, "solve", "cosine(solution, rhs)", "rhs[0].sum()"),
    ],
    "proximal term counted in H": [
        (
            BiSSLTrainer,
            "_build_curvature",
            "self.lower_loss_terms(model, inputs, key)",
            "[*self.lower_loss_terms(model, inputs, key), lambda: 0.5 * self.args.proximal_weight * sum((p**2).sum()"
            " for p in self.model.lower_shared_parameters())]",
        )
    ],
    "learning rates of the levels swapped": [
        (
            BiSSLTrainer,
            "create_optimizer",
            "learning_rate=self.args.lower_learning_rate",
            "learning_rate=self.args.learning_rate",
        ),
        (
            BiSSLTrainer,
            "_build_upper_optimizer",
            "learning_rate=self.args.learning_rate",
            "learning_rate=self.args.lower_learning_rate",
        ),
    ],
}


def identity_for_the_inverse(monkeypatch):
    monkeypatch.setitem(hypergradient.SOLVERS, "cg", hypergradient.SOLVERS["identity"])


def damping_dropped(monkeypatch):
    solver = hypergradient.SOLVERS["cg"]

    def without_damping(system):
        return solver.solve(replace(system, shift=Settings().proximal_weight))

    monkeypatch.setitem(hypergradient.SOLVERS, "cg", replace(solver, solve=without_damping))


SOLVER_MUTANTS = [identity_for_the_inverse, damping_dropped]


def mutate(monkeypatch, owner, name: str, old: str, new: str, sources: dict) -> None:
    """Replaces `old` by `new` in the text of a function or method and puts the result in its place."""
    function = getattr(owner, name)
    source = sources.get((owner, name)) or textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} must stand once in {name}"
    sources[owner, name] = source = source.replace(old, new)
    namespace = dict(vars(sys.modules[function.__module__]))
    # A method that says super() needs the cell of its class.
    body = f"def _make(__class__):\n{textwrap.indent(source, '    ')}    return {name}\n"
    exec(compile(body, f"<mutant of {name}>", "exec"), namespace)
    mutant = namespace["_make"](owner)
    monkeypatch.setattr(owner, name, mutant)
    if inspect.ismodule(owner):
        for module in list(sys.modules.values()):
            if vars(module).get(name) is function:  # `getattr` would have lazy modules import more
                monkeypatch.setattr(module, name, mutant)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_restatement_notices(name, monkeypatch, tmp_path):
    sources: dict = {}
    for owner, function, old, new in MUTANTS[name]:
        mutate(monkeypatch, owner, function, old, new, sources)
    # A stale graph of cached products would be refused by torch itself, so this runs with rebuilt ones.
    mode = "cached" if name != "a stale curvature" else "recompute"
    solver = "recycled" if name == "directions of another phase" else "cg"
    with pytest.raises(AssertionError, match="largest_difference"):
        check_against_restatement(Settings(), tmp_path, curvature_mode=mode, solver=solver)


@pytest.mark.parametrize("mutant", SOLVER_MUTANTS)
def test_the_restatement_notices_another_solver(mutant, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="largest_difference"):
        check_against_restatement(Settings(), tmp_path)


def test_the_code_itself_passes(tmp_path):
    check_against_restatement(Settings(), tmp_path)
