"""The entry point of `falcon-fast`: its commands, and its exit codes."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress

import click

from falcon_fast.cli.data import data
from falcon_fast.cli.evaluate import evaluate
from falcon_fast.cli.info import info
from falcon_fast.cli.plan import plan
from falcon_fast.cli.profile import profile
from falcon_fast.cli.replay import replay
from falcon_fast.cli.train import train
from falcon_fast.data.loaders.signals import lost_workers
from falcon_fast.errors import FinalError, RunStopped
from falcon_fast.training.distributed import signals


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="falcon_fast")
def cli() -> None:
    """Self-supervised learning that does not collapse: images without labels in, a trained backbone and its evaluation out."""


for command in (train, evaluate, replay, plan, profile, data, info):
    cli.add_command(command)


def main() -> None:
    """Run the console script.

    Each error is one line on stderr. The exit code is that of the error (errors.py), and 1 after an OSError that no code turned
    into an error of its own. torchrun itself exits with code 1 in all of these cases. A signal raises `signals.Stop` here, which
    `entry.main` turns into a line and exit code 130.
    """
    # Pillow refuses images from twice its limit on, which protects enough; its warning below that is switched off.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    with signals.immediate_stops():
        try:
            with lost_workers():
                cli()
        except (FinalError, OSError) as error:
            from falcon_fast.training.distributed.stopping import leave, speaks

            if not isinstance(error, RunStopped) and speaks(error):
                with suppress(OSError):  # nobody reads any more, or the disk is full
                    click.echo(f"error: {error}", err=True)
            leave(error)
            sys.exit(error.exit_code if isinstance(error, FinalError) else 1)
