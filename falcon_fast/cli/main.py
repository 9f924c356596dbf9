"""The entry point of `falcon-fast`: its commands, and its exit codes."""

from __future__ import annotations

import sys
import warnings

import click

from falcon_fast.cli.data import data
from falcon_fast.cli.evaluate import evaluate
from falcon_fast.cli.info import info
from falcon_fast.cli.plan import plan
from falcon_fast.cli.profile import profile
from falcon_fast.cli.replay import replay
from falcon_fast.cli.train import train
from falcon_fast.errors import DivergedError, RunStopped, TrainingError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="falcon_fast")
def cli() -> None:
    """Self-supervised learning that does not collapse: images without labels in, a trained backbone and its evaluation out."""


for command in (train, evaluate, replay, plan, profile, data, info):
    cli.add_command(command)


def main() -> None:
    """Run the console script.

    Exit codes: 2 after a UsageError; 4 after a DivergedError; 1 after another TrainingError or an OSError (a full disk, a file
    system that went away); 130 after a run that was asked to stop. torchrun itself exits with code 1 in all of these cases. Each
    error is one line on stderr.
    """
    # Pillow refuses images from twice its limit on, which protects enough; its warning below that is switched off.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        cli()
    except (UsageError, TrainingError, OSError, RunStopped) as error:
        from falcon_fast.training.distributed.stopping import leave, speaks

        if isinstance(error, RunStopped):
            code = 130
        else:
            code = 2 if isinstance(error, UsageError) else 4 if isinstance(error, DivergedError) else 1
            if speaks(error):
                click.echo(f"error: {error}", err=True)
        leave(error)
        sys.exit(code)
