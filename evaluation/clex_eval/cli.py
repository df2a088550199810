"""``clex-eval``: what long context is worth to a model."""

from __future__ import annotations

import click

from clex_eval import longbench, passkey, ppl, ruler
from clex_local.commands.command import SETTINGS, Group


@click.group("clex-eval", cls=Group, no_args_is_help=False, context_settings=SETTINGS)
@click.version_option(package_name="clex-local")
def main() -> None:
    """Measure what long context is worth to models: GGUF files, or Hugging Face folders."""


for module in (ppl, passkey, ruler, longbench):
    main.add_command(module.command)

if __name__ == "__main__":
    main()
