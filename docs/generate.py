"""Write the reference pages that follow from the code: command line, settings and recipes.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit with code 1 if a page does not agree with the code

The pages are committed, so that they can be read without building the site; tests/docs/test_reference.py checks them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import click

from falcon_fast import config
from falcon_fast.cli.main import cli
from falcon_fast.cli.options import OPTION_KEYS
from falcon_fast.config import settings
from falcon_fast.config.toml import toml_value
from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.objective.loss import PLANS, PRIORS
from falcon_fast.objective.projector import ACTIVATIONS

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code. Do not edit this page; edit the code and run it again. -->\n"

# The valid values of the settings that are names.
CHOICES = {
    "data.source": config.SOURCES,
    "data.augmentation": tuple(AUGMENTATIONS),
    "data.loader": config.LOADERS,
    "data.photometric": config.PHOTOMETRIC,
    "model.stem": config.STEMS,
    "model.initialisation": config.INITIALISATIONS,
    "loss.codes": config.DICTIONARIES,
    "loss.activation": ACTIVATIONS,
    "loss.prior": PRIORS,
    "loss.prior_scope": config.PRIOR_SCOPES,
    "loss.implementation": config.IMPLEMENTATIONS,
    "loss.plan": PLANS,
    "optimizer.name": config.OPTIMIZERS,
    "training.precision": config.PRECISIONS,
    "training.strategy": config.STRATEGIES,
    "fsdp.param_dtype": config.PARAM_DTYPES,
}

# Where config/settings.py has no comment, or one that leads to another place of that file.
MEANINGS = {
    "data.augmentation": "which random views are made; see the [table](recipes.md#augmentations)",
    "loss.codes": "kind of dictionary",
    "loss.num_codes": "number of codes in the dictionary, c",
    "loss.embedding_dim": "width of an embedding and of a code, f",
    "loss.activation": "last layer of the projector",
    "loss.epsilon": "probability that an embedding on its code leaves to each other code; sets the temperature",
    "loss.beta": "weight of the invariance term",
    "loss.prior": "divergence of the mean assignment from uniform: `reverse` as in the published code, `forward` as in "
    "the first paper",
    "loss.implementation": "how the loss is computed; `falcon-fast info` lists what runs here",
    "optimizer.name": "optimiser of the network and of the online probe",
    "optimizer.lr": "peak learning rate",
    "optimizer.weight_decay": "decoupled for adamw, L2 for adam, sgd and lars",
    "optimizer.warmup_epochs": "epochs of linear warm-up; then half a cosine to 0",
    "probe.lr": "peak learning rate of the online probe",
    "training.precision": "how products are computed, see [precision](../how-to/precision.md)",
    "training.epochs": "passes over the training images",
    "training.seed": "of weights, dictionary, order and views",
    "training.device": "where to train: `auto`, `cpu`, `cuda` or `cuda:N`",
}


def _cell(text: str) -> str:
    """Text for a cell of a table: on one line, without bars, and without anything that looks like an HTML tag outside of code."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _comments() -> dict[str, str]:
    """`section.key` to what config/settings.py says of it: the comment on the field's lines, or the string below the field."""
    source = Path(settings.__file__).read_text(encoding="utf-8")
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    sections = {cls.__name__: section for section, cls in config.SECTIONS.items()}
    found = {}
    for cls in ast.parse(source).body:
        if not isinstance(cls, ast.ClassDef) or cls.name not in sections:
            continue
        for node, below in zip(cls.body, [*cls.body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            lines = [comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and not lines:
                lines = [str(below.value.value)]
            above = []  # whole lines of comment directly above
            number = node.lineno - 1
            while not lines and number in comments and source.splitlines()[number - 1].lstrip().startswith("#"):
                above.insert(0, comments[number])
                number -= 1
            if lines or above:
                found[f"{sections[cls.name]}.{node.target.id}"] = " ".join(lines or above)
    return found


def settings_page() -> str:
    """Every `section.key` with its type, default, valid values and meaning."""
    comments = _comments()
    options = {key: "--" + option.replace("_", "-") for option, key in OPTION_KEYS.items()}
    lines = [
        "# Settings\n",
        NOTE,
        "Every setting has a name `section.key`. A [recipe](recipes.md) sets what differs from the defaults below; an option of "
        "`falcon-fast train`, or `--set section.key=value`, overrides it. The resolved settings of a run are in its "
        "`config.toml`.\n",
    ]
    for section, cls in config.SECTIONS.items():
        lines.append(f"## {section}\n")
        if section in ("probe", "fsdp") and cls.__doc__:
            lines.append(f"{' '.join(cls.__doc__.split())}\n")
        rows = []
        for f in dataclasses.fields(cls):
            name = f"{section}.{f.name}"
            meaning = MEANINGS.get(name) or comments.get(name)
            meaning = re.sub(r":? ?\bone of [A-Z_]+", "", meaning) if meaning and name in CHOICES else meaning
            if meaning is None:
                raise SystemExit(
                    f"{name} has no comment in falcon_fast/config/settings.py and no text in docs/generate.py"
                )
            if name in CHOICES:
                meaning += f" ({', '.join(f'`{choice}`' for choice in CHOICES[name])})"
            default = f"`{toml_value(f.default)}`"  # type: ignore[arg-type]
            kind = getattr(f.type, "__name__", str(f.type))
            rows.append((f"`{name}`", kind, default, f"`{options[name]}`" if name in options else "", meaning))
        lines.append(_table(("setting", "type", "default", "option", "meaning"), rows))
    return "\n".join(lines)


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from _commands(command.commands[name], (*path, name))


def _option_row(option: click.Option, context: click.Context) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f"`{option.make_metavar(context)}`"
    default = ""
    if option.required:
        default = "required"
    elif isinstance(option.default, str | int | float) and not option.is_flag:
        default = f"`{option.default}`"
    elif isinstance(option.show_default, str):
        default = option.show_default
    elif option.name in OPTION_KEYS:
        default = "from the recipe"
    return names, value, default, option.help or MEANINGS.get(OPTION_KEYS.get(option.name or "", ""), "")


def command_line_page() -> str:
    """Every command with every option, from the commands themselves."""
    lines = [
        "# Command line\n",
        NOTE,
        "Errors of usage are one line and exit code 2; what stops a run is one line and exit code 1; a run that was stopped by a "
        "signal exits with 130. `falcon-fast COMMAND --help` prints the same texts.\n",
    ]
    for path, command in _commands(cli, ("falcon-fast",)):
        context = click.Context(command, info_name=" ".join(path))
        lines.append(f"## {' '.join(path)}\n")
        usage = " ".join([" ".join(path), *command.collect_usage_pieces(context)])
        lines.append(f"```text\n{usage}\n```\n")
        lines.append(inspect.cleandoc(command.help or "") + "\n")
        if isinstance(command, click.Group):
            rows = [(f"`{' '.join((*path, n))}`", sub.get_short_help_str(300)) for n, sub in command.commands.items()]
            lines.append(_table(("command", "what it does"), rows))
            continue
        options = [p for p in command.params if isinstance(p, click.Option)]
        if options:
            rows4 = [_option_row(option, context) for option in options]
            lines.append(_table(("option", "value", "default", "what it does"), rows4))
    return "\n".join(lines)


def _views(a: Augmentation) -> tuple[str, ...]:
    def pair(values: tuple[float, float]) -> str:
        return f"{values[0]:g} / {values[1]:g}"

    if a.crop is not None:
        geometry = f"crop {a.crop.scale[0]:g} to {a.crop.scale[1]:g} of the area"
    else:
        assert a.affine is not None
        geometry = (
            f"rotation ±{a.affine.degrees:g}°, scale {a.affine.scale[0]:g} to {a.affine.scale[1]:g}, "
            f"shift ±{a.affine.shift:g}, shear ±{a.affine.shear:g}°"
        )
    jitter = f"{a.brightness:g} {a.contrast:g} {a.saturation:g} {a.hue:g}, p {a.jitter_probability:g}"
    blur, solarize = pair(a.blur_probability), pair(a.solarize_probability)
    return f"`{a.name}`", geometry, f"{a.flip_probability:g}", jitter, f"{a.gray_probability:g}", blur, solarize


def recipes_page() -> str:
    """What each recipe sets, its file, and the augmentations."""
    rows, files = [], []
    for name in config.recipe_names():
        c = config.load_recipe(name)
        rows.append(
            (
                f"[`{name}`](#{name})",
                f"`{c.model.name}`",
                f"{c.loss.embedding_dim:,}",
                f"{c.loss.num_codes:,}",
                f"{c.loss.temperature_batch}, {c.tau:.3f}",
                f"{c.training.batch_size}",
                f"{c.training.epochs}",
                f"{c.optimizer.name}, {c.optimizer.lr:g}",
                f"`{c.data.augmentation}`",
            )
        )
        text = (resources.files("falcon_fast.recipes") / f"{name}.toml").read_text(encoding="utf-8").strip()
        files.append(f"### {name}\n\n{config.recipe_description(name)}.\n\n```toml\n{text}\n```\n")
    header = ("recipe", "backbone", "f", "c", "n, τ", "batch", "epochs", "optimiser, rate", "augmentation")
    views = ("augmentation", "geometry", "flip", "brightness contrast saturation hue", "gray")
    views += ("blur p, view 1 / 2", "solarise p, view 1 / 2")
    return "\n".join(
        [
            "# Recipes\n",
            NOTE,
            "A recipe is a TOML file in `falcon_fast/recipes/` that names what differs from the [defaults](settings.md). Without "
            "`--recipe`, `falcon-fast train` takes `digits`, or `folder` with `--data`.\n",
            _table(header, rows),
            "## Augmentations\n",
            "`data.augmentation` names one of these. Operations come in the order of the columns, the flip last; probabilities "
            "given in pairs are those of view 1 and view 2.\n",
            _table(views, [_views(a) for a in AUGMENTATIONS.values()]),
            "## The files\n",
            *files,
        ]
    )


PAGES = {"command-line.md": command_line_page, "settings.md": settings_page, "recipes.md": recipes_page}


def main() -> None:
    """Write the pages, or with --check compare them."""
    differing = []
    for name, page in PAGES.items():
        path, text = REFERENCE / name, page()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            differing.append(name)
    if differing:
        sys.exit(f"docs/reference: {', '.join(differing)} do not agree with the code: run `python docs/generate.py`")


if __name__ == "__main__":
    main()
