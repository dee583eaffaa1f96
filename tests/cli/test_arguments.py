"""Arguments from YAML and the command line, and refusals."""

import contextlib
import errno
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from bissl_hf.checkpoints import DamagedFileError
from bissl_hf.cli import arguments as cli_arguments
from bissl_hf.cli.arguments import parse_arguments, refusing_bad_input
from bissl_hf.cli.refusal import refuse


@dataclass
class First:
    name: str = field(default="digits", metadata={"help": "A name."})
    steps: int = 10
    rate: float = 0.1
    momentum: float | None = None
    use_cpu: bool = False
    cache: bool = True
    scale: list[float] = field(default_factory=lambda: [0.1, 1.0])
    options: dict | str | None = None


@dataclass
class Second:
    output_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed};\n  it must be at least 0.")


def parse(arguments: list[str], content: str | None = None, folder: Path | None = None) -> tuple[First, Second]:
    """Parses arguments after those of a YAML file with this content."""
    if content is not None and folder is not None:
        (folder / "run.yaml").write_text(content)
        arguments = ["--config", str(folder / "run.yaml"), *arguments]
    first, second = parse_arguments((First, Second), arguments, description="Tests.")
    return first, second


def refusal(capsys: pytest.CaptureFixture[str], *args: Any, **kwargs: Any) -> str:
    """Parses what must be refused; returns the sentence without `error: `."""
    with pytest.raises(SystemExit) as stop:
        parse(*args, **kwargs)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("error: ").removesuffix("\n")


# Arguments


def test_defaults_and_command_line() -> None:
    assert parse([]) == (First(), Second())
    first, second = parse(["--steps", "3", "--scale", "0.5", "0.75", "--seed=7", "--use_cpu"])
    assert first == First(steps=3, scale=[0.5, 0.75], use_cpu=True)
    assert second.seed == 7


def test_arguments_of_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--steps", "4"])
    first, _ = parse_arguments((First, Second), description="Tests.")
    assert first.steps == 4


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("steps: 3", "steps", 3),
        ("rate: 1e-3", "rate", 0.001),
        ("rate: 1.0e-3", "rate", 0.001),
        ("rate: 2", "rate", 2.0),
        ("rate: -0.5", "rate", -0.5),
        ("rate: -1e-3", "rate", -0.001),
        ("momentum: null", "momentum", None),
        ("momentum: 0.9", "momentum", 0.9),
        ("steps:", "steps", 10),
        ("use_cpu: true", "use_cpu", True),
        ("use_cpu: false", "use_cpu", False),
        ("cache: false", "cache", False),
        ("cache: no", "cache", False),
        ("scale: [0.25, 0.5]", "scale", [0.25, 0.5]),
        ("scale:\n  - 1e-3\n  - -2", "scale", [0.001, -2.0]),
        ("name: a b = c", "name", "a b = c"),
        ("name: '--steps'", "name", "--steps"),
        ("name: 007", "name", "007"),
        ("name: 2026_01_15", "name", "2026_01_15"),
        ("name: 1:30", "name", "1:30"),
        ("name: 2020-01-01", "name", "2020-01-01"),
        ("name: 1e3", "name", "1e3"),
        ("name: true", "name", "true"),
        ("name: 'null'", "name", "null"),
        ("name: |\n  a\n  b", "name", "a\nb"),
        ("steps: 1_000", "steps", 1000),
        ("use_cpu: on", "use_cpu", True),
        ("cache: OFF", "cache", False),
        (
            "options: {a: 1e-3, b: 010, c: '5', d: 7, e: [1, x], f: 1_0, g: ~}",
            "options",
            '{"a": 0.001, "b": "010", "c": "5", "d": 7, "e": [1, "x"], "f": "1_0", "g": null}',
        ),
        ("name: no", "name", "no"),
        ("name: Off", "name", "Off"),
        ("use_cpu: Yes", "use_cpu", True),
        ("options: {save: no, push: false}", "options", '{"save": "no", "push": false}'),
        ("name: grüße", "name", "grüße"),
        ("options: {min_lr_rate: 0.01}", "options", '{"min_lr_rate": 0.01}'),
    ],
)
def test_types_of_yaml(content: str, name: str, value: Any, tmp_path: Path) -> None:
    first, second = parse([], content, tmp_path)
    found = getattr(first, name)
    assert (found, type(found)) == (value, type(value))
    assert (first, second) == (First(**{name: value}), Second())


def test_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 3\nscale: [1, 2, 3]\nuse_cpu: true\nseed: 5\nname: here")
    config = f"--config={tmp_path}/run.yaml"
    for arguments in (["--steps", "4", config, "--scale", "9"], [config, "--scale", "9", "--steps=4"]):
        first, second = parse([*arguments, "--use_cpu", "false"])
        assert first == First(name="here", steps=4, scale=[9.0], use_cpu=False)
        assert second.seed == 5


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("--config", "--steps", "--options", "--seed", "Tests."):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "Unknown argument --stepz; did you mean steps?"),
        (["--stepz=3"], "Unknown argument --stepz; did you mean steps?"),
        (["--hub_tokn=SECRET"], "Unknown argument --hub_tokn; see --help for those that exist."),
        (["hf_abcdefgh"], "Unknown argument (a word like a token); see --help for those that exist."),
        (["--qqqq"], "Unknown argument --qqqq; see --help for those that exist."),
        (["stray"], "Unknown argument stray; see --help for those that exist."),
        (["--seed", "-1"], "seed is -1; it must be at least 0."),
        (["--config"], "--config needs a YAML file."),
        (
            ["--config", "a.yaml", "--config=b.yaml"],
            "--config names a.yaml and b.yaml; give one file, and what differs on the command line.",
        ),
    ],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, arguments) == message


def test_refuses_a_value_of_the_wrong_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid int value: 'abc'; see --help." in refusal(capsys, ["--steps", "abc"])
    assert "expected one argument; see --help." in refusal(capsys, ["--steps"])
    # No abbreviations: they would change their meaning with every new argument.
    assert refusal(capsys, ["--step", "3"]) == "Unknown argument --step; did you mean steps?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 3", "Unknown field 'stepz' in {path}; did you mean steps?"),
        ("help: true", "Unknown field 'help' in {path}; see --help for those that exist."),
        ("config: other.yaml", "Unknown field 'config' in {path}; see --help for those that exist."),
        ("- steps", "The configuration {path} must hold `field: value` lines; it holds list."),
        ("", "The configuration {path} is empty; it must hold `field: value` lines."),
        ("# steps: 3", "The configuration {path} is empty; it must hold `field: value` lines."),
        (
            "steps: 3\nrate: 1\nsteps: 4",
            "The configuration {path} is not valid YAML: the field 'steps' stands there",
        ),
        ("options: {a: 1, a: 2}", "The configuration {path} is not valid YAML: the field 'a' stands there 2 times"),
        ("steps: [3, 4]", "steps in {path} is the list [3, 4]; it must be a single value."),
        ("options: [3]", "options in {path} is the list [3]; it must be a single value."),
        ("steps: 3\nsteps: [", "The configuration {path} is not valid YAML: "),
    ],
)
def test_refuses_yaml(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = refusal(capsys, [], content, tmp_path)
    assert found.startswith(message.format(path=tmp_path / "run.yaml"))


def test_refuses_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.yaml"
    expected = f"The configuration {missing} cannot be read: No such file or directory."
    assert refusal(capsys, ["--config", str(missing)]) == expected


# Refusals


def test_any_process_says_why_the_first_of_a_machine_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli_arguments.time, "sleep", waits.append)
    for number in ("0", "1", "2"):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("LOCAL_RANK", number)
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as stop:
            refuse("two\n  lines")
        assert stop.value.code == 2
        assert capsys.readouterr() == ("", "error: two lines\n")
    assert waits == [2.0, 2.5], "by then the launcher has ended the others"


def test_a_process_that_has_lost_another_speaks_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli_arguments.time, "sleep", waits.append)
    for error in (RuntimeError("[gloo] Connection closed by peer"), ValueError("of its own")):
        with pytest.raises(SystemExit), cli_arguments.refusing_bad_input():
            raise error
    assert waits == [5.0]
    assert capsys.readouterr().err.splitlines()[1] == "error: of its own"


def test_a_damaged_file_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli_arguments.stopping_at_divergence():
        raise DamagedFileError("result.json is damaged.")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: result.json is damaged.\n"


def test_a_lost_worker_is_one_sentence_with_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli_arguments.stopping_at_divergence():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert stop.value.code == 4
    assert capsys.readouterr().err.startswith("error: The run has stopped: a loader worker has ended")


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EDQUOT, "", "out/model"), r"Disk quota exceeded \(out/model\)"),
        (OSError(errno.EROFS, ""), "Read-only file system"),
        (FULL, "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "could not be written"),
    ],
)
def test_a_disk_that_fails_is_one_sentence(error: Exception, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli_arguments.stopping_at_divergence():
        raise error
    assert stop.value.code == 1
    assert re.match(f"error: A disk .* fails: .*{reason}.*make room or mend", capsys.readouterr().err)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), RuntimeError("a bug"), SafetensorError("header")])
def test_other_errors_of_a_run_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), cli_arguments.stopping_at_divergence():
        raise error


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, RuntimeError])
def test_errors_about_input_become_one_sentence(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), refusing_bad_input():
        raise kind("steps is 0")
    assert capsys.readouterr().err == "error: steps is 0\n"
    with pytest.raises(SystemExit), refusing_bad_input():
        raise kind
    assert capsys.readouterr().err == f"error: {kind.__name__}\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), refusing_bad_input():
        raise ZeroDivisionError


# Values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", ""], "name is empty, as a variable of a script is that was not set: give a value, or leave name"),
        (["--name="], "name is empty"),
        (["--name", "  "], "name is empty"),
        (["--scale", "0.5", ""], "scale is empty"),
        (["--steps="], "steps is empty"),
        (["--seed", "010"], "seed is '010', which can be read in more than one way; write it in decimal digits"),
        (["--seed", "2026_01_15"], "seed is '2026_01_15', which can be read in more than one way"),
        (["--rate", "00.5"], "rate is '00.5', which can be read in more than one way"),
        (["--seed", "\uff11"], "seed is '\uff11', which can be read in more than one way"),
        (["--seed", "9" * 5000], "seed is a text of 5000 characters (99999999999999999999...); it must be a number."),
        (["--seed", str(2**63)], f"seed is {2**63}; it must be below 2^63."),
        (["--rate", "NaN"], "rate is 'NaN'; it must be a number."),
        (["--rate", "1:30"], "argument --rate: invalid float value: '1:30'"),
        (["--name=--"], "name is '--', which is no value."),
        (["--output_dir", "$NOT_SET/x"], "output_dir is '$NOT_SET/x'; the environment variable $NOT_SET is not set"),
        (["--output_dir", "x/${NOT_SET}"], "output_dir is 'x/${NOT_SET}'; the environment variable ${NOT_SET} is not"),
        (["--output_dir", "~nobody-here/x"], "output_dir is '~nobody-here/x'; there is no user '~nobody-here'"),
    ],
)
def test_refuses_values(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, arguments).startswith(message)


def test_long_values_are_cut_in_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(refusal(capsys, ["--use_cpu", "x" * 100_000])) < 600


def test_home_and_variables_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/runs")
    for text, expected in (("~/out", f"{tmp_path}/out"), ("$RUNS/a", "/runs/a"), ("cost$5", "cost$5")):
        assert parse(["--output_dir", text])[1].output_dir == expected
        assert parse([], f"output_dir: {text}", tmp_path)[1].output_dir == expected
    # Only paths: a name is a name.
    assert parse(["--name", "~/$RUNS"])[0].name == "~/$RUNS"
    (tmp_path / "c.yaml").write_text("steps: 4")
    assert parse(["--config", "~/c.yaml"])[0].steps == 4


def test_an_existing_path_with_a_dollar_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    assert parse(["--output_dir", "$HOME"])[1].output_dir == "$HOME"


_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"options:\n  k: 1\n{''.join('  ' + line + chr(10) for line in _LAUGHS.splitlines())}", "more than 10,000"),
        ("options: &a {b: *a}", "more than 50 inside one another (line 1)"),
        ("scale: &a [*a]", "more than 50 inside one another (line 1)"),
        ("options: " + "{a: " * 60 + "1" + "}" * 60, "more than 50 inside one another"),
        ("options: " + "[" * 5000 + "]" * 5000, "it is nested too deeply."),
        ("name: !!binary aGk=", "the tag 'tag:yaml.org,2002:binary' is not supported (line 1)."),
        ("options: {a: !!set {b}}", "the tag 'tag:yaml.org,2002:set' is not supported"),
        ("name: !!python/object/apply:os.system [ls]", "is not supported (line 1)."),
        ("[1, 2]: 4", "a field must have a name; there is a sequence (line 1)."),
        ("~: 4", "Unknown field '~'"),
        ("3: 4", "Unknown field '3'"),
        ("&a\n<<: *a", "is not valid YAML"),
        ("name: ''", "name is empty"),
        ("seed: 010", "seed is '010', which can be read in more than one way"),
        ("steps: " + "9" * 5000, "steps is a text of 5000 characters"),
        ('scale: [0.5, "--use_cpu"]', "holds '--use_cpu'; an item must not start with a dash."),
    ],
    ids=lambda value: value[:20],
)
def test_refuses_hostile_yaml(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, [], content, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip))
def test_text_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    """Whatever the text means in YAML 1.1, quoted or, where YAML takes it for one scalar, plain."""
    quoted = yaml.safe_dump({"name": text}, allow_unicode=True)
    assert parse([], quoted, tmp_path)[0].name == text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.from_regex(r"[0-9a-z_:.+-]{1,12}", fullmatch=True).filter(lambda text: text not in ("null", "--")))
def test_plain_words_and_numbers_are_text(tmp_path: Path, text: str) -> None:
    try:
        node = yaml.compose(f"name: {text}")
    except yaml.YAMLError:
        return
    value = node.value[0][1]
    if isinstance(value, yaml.ScalarNode) and value.value == text:
        assert parse([], f"name: {text}", tmp_path)[0].name == text


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_whole_numbers_are_read_exactly(number: int) -> None:
    assert parse([f"--steps={number}"])[0].steps == number


@settings(max_examples=60, deadline=None)
@given(st.floats(allow_nan=False))
def test_numbers_are_read_exactly(number: float) -> None:
    assert parse([f"--rate={number!r}"])[0].rate == number


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=60), st.text("&*!|>-[]{}:,#'\"? \n~<a1", max_size=60)))
def test_any_configuration_is_read_or_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(SystemExit):
        parse(["--config", str(tmp_path / "run.yaml")])
