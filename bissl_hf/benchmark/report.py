"""A benchmark's report as text."""

from typing import Any

from ..text import format_table
from .claims import Claim
from .measuring import spread
from .parts import BASELINE_UNIT, UNIT

# Largest spread of the unit over the rounds at which ratios are held against their bounds.
STEADY = 0.1
_NO_VERDICT = (
    "No verdict: the unit took up to {:.0f} % longer in some rounds than in others, so the machine is too busy to "
    "hold ratios against bounds."
)


def format_report(report: dict[str, Any]) -> str:
    """Lays a report out as three tables: parts, alternations, claims."""
    machine, workload = report["machine"], report["workload"]
    heading = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; {workload['name']}: "
        f"{workload['lower_batch']} pairs and {workload['upper_batch']} labelled images of {workload['image_size']} "
        f"pixels, {workload['lower_steps']} lower and {workload['upper_steps']} upper steps of {workload['products']} "
        "products"
    )
    parts = [_part_row(part) for part in report["parts"]]
    alternations = [_alternation_row(name, phases) for name, phases in report["alternations"].items()]
    unit = next(part for part in report["parts"] if part["part"] == UNIT)
    # On one thread the parts are in process time, and the unit between alternations is by the clock on the wall: it
    # takes longer there where other work holds the processor.
    alone = next(part for part in report["parts"] if part["part"] == BASELINE_UNIT)["seconds"]
    slowdown = max(unit["spread"], spread([alone, *report["alternations"]["baseline"]["unit"]["all"]]))
    steady = slowdown <= STEADY
    claims = [_claim_row(Claim(**claim), steady=steady) for claim in report["claims"]]
    bandwidth = report["memory_bandwidth"] / 1e9
    waits = ", ".join(f"{count} in the {phase} phase" for phase, count in report["synchronisations"].items())
    return "\n".join(
        [
            heading,
            "",
            "Parts (medians). The unit of equivalents is one forward and backward pass of the pretext model. What a",
            "part should cost is its floating-point operations at the unit's speed and its traffic in memory at "
            f"{bandwidth:.1f} GB/s,",
            f"which is {100 * report['traffic_share']:.0f} % of the unit.",
            "",
            format_table(parts),
            "",
            "Alternations, in turn in one process (medians, seconds)",
            "",
            format_table(alternations),
            "",
            f"Reads of device values in one alternation of the trainer: {waits}. Peak memory: "
            f"{report['peak_bytes'] / 2**20:.0f} MiB.",
            "",
            format_table(claims),
            *([] if steady else ["", _NO_VERDICT.format(100 * slowdown)]),
        ]
    )


def _part_row(part: dict[str, Any]) -> dict[str, str]:
    speed, expected = part["images_per_second"], part["expected_equivalents"]
    return {
        "part": part["part"],
        "ms": f"{1000 * part['seconds']:.1f}",
        "images/s": f"{speed:.0f}" if speed else "",
        "equivalents": f"{part['equivalents']:.2f}",
        "should be": f"{expected:.2f}" if expected else "",
        "ratio": f"{part['equivalents'] / expected:.2f}" if expected else "",
        "device reads": str(part["synchronisations"]),
        "peak MiB": f"{part['peak_bytes'] / 2**20:.0f}",
        "MB moved": f"{part['bytes_moved'] / 1e6:.0f}" if part["bytes_moved"] else "",
        "at least": f"{part['least_bytes'] / 1e6:.0f}" if part["bytes_moved"] else "",
    }


def _alternation_row(name: str, phases: dict[str, Any]) -> dict[str, str]:
    columns = ("lower", "upper", "waiting", "log")
    row = {phase: f"{phases[phase]['median']:.3f}" if phase in phases else "" for phase in columns}
    return {"": name, "both": f"{phases['lower']['median'] + phases['upper']['median']:.3f}", **row}


def _claim_row(claim: Claim, *, steady: bool) -> dict[str, str]:
    verdict = "" if not claim.bounds else "no verdict" if not steady else "holds" if claim.holds else "MISSED"
    return {
        "claim": claim.name,
        "measured": f"{claim.value:.3g}",
        "bound": claim.bounds,
        "": verdict,
    }
