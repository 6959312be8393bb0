"""`quire verify`: whether an engine directory is still what was built."""

import argparse
from pathlib import Path

from quire.cli.build import answer, open_engine
from quire.cli.target import instruction_set_of
from quire.errors import ConfigurationError

EXAMPLES = """example:
  quire verify ENGINE

Reads every byte of the engine's files and holds their SHA-256 against the manifest; then asks the golden prompts, whose
tokens must be those of the build, where this machine takes the instruction set that they were recorded on. Exit codes:
0 all is as built, 1 something differs."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("engine", metavar="DIR", type=Path, help="an engine directory")


def run(options: argparse.Namespace) -> int:
    """Check; 1 where something differs."""
    from quire.build.verify import wrong_answers, wrong_files
    from quire.weights.formats.engine_dir import Golden, read_manifest
    from quire.weights.formats.engine_names import is_engine

    directory: Path = options.engine
    if not is_engine(directory):
        raise ConfigurationError(f"{directory} is no engine directory: it has no engine.json", field="engine")
    manifest = read_manifest(directory)
    wrong = list(wrong_files(directory, manifest))
    for name in wrong:
        print(
            f"differs   {name}: its SHA-256 is not that of the manifest; build the engine again from {manifest.model}"
        )
    if wrong:
        return 1
    print(f"as built  {len(manifest.files)} files, {sum(one.size for one in manifest.files.values()):,} bytes")
    with open_engine(directory) as llm:
        here = instruction_set_of(llm.decisions)

        def ask(golden: Golden) -> list[int]:
            return answer(llm, golden.prompt_token_ids, len(golden.token_ids))

        differing, num_tried = wrong_answers(manifest, here, ask)
    for golden in differing:
        print(f"differs   the answer to the golden prompt {golden.prompt_token_ids[:12]}")
    if not num_tried:
        recorded = ", ".join(sorted({one.instruction_set for one in manifest.golden})) or "no machine yet"
        print(f"not asked {len(manifest.golden)} golden prompts: recorded on {recorded}, this is {here}")
    elif not differing:
        print(f"as built  the answers to {num_tried} golden prompts ({here})")
    return 1 if differing else 0
