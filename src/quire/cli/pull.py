"""`quire pull`: download a model of the hub into its cache, and check it."""

import argparse

from quire.cli.list import size_of

EXAMPLES = """examples:
  quire pull smollm2-135m
  quire pull owner/name
  quire pull owner/name:v2
  quire pull owner/name:model-Q4_0.gguf

A download that was broken off goes on where it was. HF_TOKEN, HF_HUB_CACHE and HF_ENDPOINT are those of the hub's own
library. Short names stand in ~/.config/quire/models.toml too: docs/guide/models.md."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("name", metavar="NAME", help="an id of the hub, maybe with :revision or :FILE.gguf")


def run(options: argparse.Namespace) -> int:
    """Pull, and say what is there."""
    from quire.weights.loading_bar import LoadingBar
    from quire.weights.local_models import LocalModels

    with LoadingBar("Downloading") as bar:
        found = LocalModels().pull(options.name, bar.show)
    print(f"{found.id} {found.revision} ({found.commit[:12]}): {len(found.files)} files, {size_of(found.size_bytes)}")
    return 0
