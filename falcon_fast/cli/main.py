"""`falcon-fast`: each command a thin call into the package. What the user got wrong is one line and exit code 2."""

from __future__ import annotations

import sys
import warnings

import click

from falcon_fast.cli.data import data
from falcon_fast.cli.evaluate import evaluate
from falcon_fast.cli.info import info
from falcon_fast.cli.plan import plan
from falcon_fast.cli.profile import profile
from falcon_fast.cli.train import train
from falcon_fast.errors import TrainingError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="falcon_fast")
def cli() -> None:
    """Self-supervised learning that does not collapse: images without labels in, a backbone out, and the figures."""


for command in (train, evaluate, plan, profile, data, info):
    cli.add_command(command)


def main() -> None:
    """The console script: UsageError is one line and exit code 2; what stops a run, one line and exit code 1."""
    # Pillow refuses an image from twice its limit on, which is enough; before, it warns of a bomb.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        cli()
    except SystemExit as stop:
        if getattr(stop, "agreed", False):
            from falcon_fast.training.distributed.processes import leave

            leave(stop)
        raise
    except (UsageError, TrainingError, OSError) as error:  # OSError: a full disk, a file system that went away
        from falcon_fast.training.distributed.processes import leave, speaks

        if speaks(error):
            click.echo(f"error: {error}", err=True)
        leave(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
