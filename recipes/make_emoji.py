"""Makes a set of small colour pictures with few labels: emoji by four designers, from packages of npm.

    python recipes/make_emoji.py --output_dir outputs/emoji

Any recipe then takes the folder as its data set.
"""

from dataclasses import dataclass, field
from pathlib import Path

from bissl_hf.cli.arguments import parse_arguments, refusing_bad_input
from bissl_hf.data.emoji import make_emoji


@dataclass
class EmojiArguments:
    """Where the set is made."""

    output_dir: str = field(metadata={"help": "New folder of the set."})
    archives_dir: str | None = field(
        default=None, metadata={"help": "Keeps the fetched packages, 246 MB; OUTPUT_DIR-packages if not given."}
    )


def main(arguments: list[str] | None = None) -> None:
    (settings,) = parse_arguments((EmojiArguments,), arguments, description=str(__doc__).split("\n\n")[0])
    with refusing_bad_input():
        output = Path(settings.output_dir)
        archives = Path(settings.archives_dir or f"{output}-packages")
        splits = make_emoji(output, archives)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    print(f"{output} holds {sizes} pictures; README.md in it states how they were made, and their licences.")


if __name__ == "__main__":
    main()
