"""Compares BiSSL with the conventional pipeline, and with variants of itself.

    accelerate launch recipes/study.py --config recipes/configs/study_quick.yaml --output_dir DIR [--any_field value]

It runs what is missing: each part (a pre-training, an arm on a set with a seed) has a folder; one that is finished is
never run again, one that was interrupted goes on. At the end it writes a table with paired differences, the raw
results and a figure.
"""

from pathlib import Path

from ..checkpoints import read_mapping
from ..run_lock import hold_for_run
from ..study.plan import Plan, StudyArguments
from ..study.report import STUDY_RESULTS, build_results, write_report
from ..study.running import Study
from .arguments import parse_arguments, refusing_bad_input
from .console import prepare_console
from .images import ViewArguments
from .outputs import open_output_dir
from .running import as_a_run


def print_summary(report: str, output: Path) -> None:
    print(f"\n{report}\n")
    print(
        f"The table is in {output}/table.md, raw results in {output}/{STUDY_RESULTS}, the figure in {output}/figures."
    )


def report_anew(output: Path) -> str:
    file = output / STUDY_RESULTS
    if not file.is_file():
        raise ValueError(f"{output} has no {STUDY_RESULTS}; run the study first, without report_only.")
    results = read_mapping(file)
    try:
        return write_report(results, output)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not hold the results of a study with runs of its baseline ({type(error).__name__}: "
            f"{error}). Start the study without report_only: it finds its finished parts, and writes the file anew."
        ) from error


@as_a_run()
def main(arguments: list[str] | None = None) -> None:
    settings, views = parse_arguments(
        (StudyArguments, ViewArguments), arguments, description=str(__doc__).split("\n\n")[-1]
    )
    prepare_console()
    output = Path(settings.output_dir)
    with refusing_bad_input():
        if settings.report_only:
            print_summary(report_anew(output), output)
            return
        plan = Plan(settings, views)
        open_output_dir(settings.output_dir, True)
        study = Study(plan)
        hold_for_run(settings.output_dir, writes=study.writes)
        study.try_out()
    runs = study.run()
    if study.writes:
        print_summary(write_report(build_results(plan, runs, study.choices()), output), output)


if __name__ == "__main__":
    main()
