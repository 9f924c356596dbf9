"""Every command and every Python block of README.md, CONTRIBUTING.md and docs/ is run, or the table below says why not.

The blocks of a page are run in order, in one directory, and its Python blocks share their names, as a reader would have it.
`falcon-fast` commands get the arguments of SHORTER appended, and small image folders in place of PATH, OTHER, RUN and OUT.
What needs several processes, a cluster, a compiler or an installation is checked as far as it can be: options and settings by
the command line's own parser, files by their existence. A command of a kind that is not known here fails.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from falcon_fast.cli.main import cli
from falcon_fast.cli.options import configured, overrides_of
from falcon_fast.config import SECTIONS, parse_assignment
from falcon_fast.errors import UsageError
from falcon_fast.hardware.cuda import TORCH_12

from .pages import PAGES, ROOT, Block, blocks, commands, name_of, prose, spans

SMALL = (
    "--num-codes 64 --embedding-dim 16 --temperature-batch 1 "
    "--set model.name=resnet8 --set model.width=4 --set model.stem=auto --set model.initialisation=timm"
)
# What is appended to a command so that it takes a second or two.
SHORTER = {
    "train": f"--epochs 1 --batch-size 8 --device cpu {SMALL} --set data.workers=0",
    "resume": "--device cpu --set data.workers=0",
    "profile": f"--steps 2 --batch-size 8 --device cpu {SMALL} --set data.workers=0",
    "evaluate": "--device cpu",
}
DIGITS = "--batch-size 128"  # the digits are 1,437 images
PURE = ("plan", "info", "profile")  # leave nothing behind: the same command is run once

# Commands that are checked but not run here, and why. A program that is neither here nor `falcon-fast` fails the test.
NOT_RUN = {
    "pip": ".ci/run installs the package; here the extras must exist",
    "python": "scripts of examples/ are run by tests/examples, generated pages by test_reference.py",
    "pytest": "these tests would run themselves; here files and options must exist",
    "torchrun": "several processes: tests/training/distributed and tests/examples run torchrun; here the options are parsed",
    "sbatch": "needs Slurm: tests/runs/test_restart.py runs the script with stand-ins; here the options are parsed",
    "examples/torchrun.sh": "several machines: tests/runs/test_restart.py runs it; here the options are parsed",
    "mkdocs": ".ci/run and test_reference.py build the site",
    "docker": "needs a Docker engine; here the Dockerfile must exist",
    "python3": "makes an environment",
    ".": "activates an environment",
    "ruff": ".ci/run runs it",
    "mypy": ".ci/run runs it",
    "pre-commit": "runs ruff and mypy, as .ci/run does",
    "cmake": ".ci/run builds and runs the C++ tests; the Arm build needs a cross compiler",
    "ctest": ".ci/run builds and runs the C++ tests; the Arm build needs a cross compiler",
    ".ci/run": "it runs these tests",
}


# ---- stand-ins for what readers have ----


def make_images(root: Path, classes: int, side: tuple[int, int], count: int) -> None:
    random = np.random.RandomState(0)
    for split in ("train", "test"):
        for number in range(classes):
            folder = root / split / f"class{number:03d}"
            folder.mkdir(parents=True)
            for i in range(count):
                level = 40 + 170 * number / max(1, classes - 1)
                pixels = np.clip(random.normal(level, 25, (*side, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PATH, OTHER, and folders for the recipes of CIFAR and SVHN; RUN, a finished run of PATH."""
    root = tmp_path_factory.mktemp("material")
    make_images(root / "PATH", 2, (20, 24), 10)
    make_images(root / "OTHER", 3, (30, 26), 8)
    make_images(root / "ten", 10, (32, 32), 2)
    make_images(root / "hundred", 100, (32, 32), 1)
    invoke(["train", "--data", str(root / "PATH"), "--run-dir", str(root / "RUN"), *shlex.split(SHORTER["train"])])
    return root


def invoke(arguments: list[str]) -> str:
    """Run `falcon-fast` with these arguments in this process; its output. Fails where it fails."""
    result = CliRunner().invoke(cli, arguments)
    said = f"falcon-fast {shlex.join(arguments)}\n{result.output}"
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{said}\n{result.exception!r}"
    assert result.exit_code == 0, said
    return result.output


# ---- parsing, which every falcon-fast command goes through ----


def parsed(words: list[str]) -> None:
    """Check a command after `falcon-fast` by the real parser and, for train and profile, the real checks of the settings."""
    command: click.Command = cli
    context = None
    while isinstance(command, click.Group):
        assert words and words[0] in command.commands, f"falcon-fast has no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    if command.name in ("train", "profile"):
        given = dict(context.params)
        if given.get("resume") is None:
            recipe, settings = given.pop("recipe"), given.pop("settings")
            name = configured(recipe, overrides_of(given, settings)).model.name
            if name != "resnet8":
                import timm

                assert timm.is_model(name), name


# ---- one command ----

_run_before: set[str] = set()
_fresh = itertools.count()


def run_falcon(words: list[str], material: Path) -> None:
    """A `falcon-fast` command as a page has it, shortened, with stand-ins for its placeholders."""
    parsed([{"PATH": "images", "RUN": "run", "OTHER": "other", "OUT": "out"}.get(word, word) for word in words])
    kind = words[0]
    if kind in PURE or words[1:] == ["--amp"]:
        if shlex.join(words) in _run_before:
            return
        _run_before.add(shlex.join(words))
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    path = "hundred" if recipe == "cifar100" else "ten" if recipe.startswith(("cifar10", "svhn")) else "PATH"
    known: dict[str, str] = {"OTHER": str(material / "OTHER"), "PATH": str(material / path), "OUT": "out"}
    if kind in ("train", "profile"):
        known["cifar10"] = str(material / path)
    if "RUN" in words:
        new = f"RUN-{next(_fresh)}"
        if "--run-dir" not in words:
            shutil.copytree(material / "RUN", new)
        known["RUN"] = new
    arguments = [word if word == recipe else known.get(word, word) for word in words]
    if "--predict" in words:
        invoke(arguments)
        return
    resumes = "--resume" in words
    extra = shlex.split(SHORTER.get("resume" if resumes else kind, ""))
    if kind == "train" and not resumes and "--data" not in words:
        extra += shlex.split(DIGITS)
    for option in ("--embedding-dim", "--num-codes", "--temperature-batch"):  # of the pages that are about them
        if option in words and option in extra:
            at = extra.index(option)
            del extra[at : at + 2]
    if "model.stem=cifar-padded" in words:  # the page is about the recipe's own ResNet-18
        extra = [word for word in extra if not word.startswith("model.")]
        extra = [word for word, after in zip(extra, [*extra[1:], ""], strict=True) if word != "--set" or "=" in after]
    invoke([*arguments, *extra])


def check_options(words: list[str]) -> None:
    """The words of a `falcon-fast train` that something else starts."""
    parsed([{"PATH": "images", "RUN": "run"}.get(word, word) for word in words])


def check_other(words: list[str]) -> None:
    """A command that is not run here: what of it can be checked."""
    program = words[0]
    if program == "pip":
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        extras = {x for word in words for group in re.findall(r"\[([\w,]+)\]", word) for x in group.split(",")}
        assert extras <= set(pyproject["project"]["optional-dependencies"]), words
        assert words[1] == "install"
        if not any(word.startswith(".") for word in words):  # a package of somebody else
            torch_12 = ["torch", "torchvision", "--index-url", TORCH_12.split()[-1]]
            assert words[2:] in (["lightning"], ["pre-commit"], torch_12, ["--force-reinstall", *torch_12]), words
    elif program == "python":
        check_python(words[1:])
    elif program == "pytest":
        conftest = (ROOT / "conftest.py").read_text(encoding="utf-8")
        for word in words[1:]:
            if word.startswith(("tests/", "benchmarks/")):
                assert (ROOT / word).exists(), word
            elif word.startswith("--"):
                assert f'"{word}"' in conftest, word
            else:
                assert word in ("-m", "slow", "-n", "auto", "-k", "-x", "-q"), word
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        known = get_args_parser().parse_args(words[1:])
        if known.training_script == "falcon-fast":
            check_options(known.training_script_args)
        else:
            check_python([known.training_script, *known.training_script_args])
    elif program == "sbatch" or program == "examples/torchrun.sh":
        script = words[1] if program == "sbatch" else program
        assert (ROOT / script).is_file(), script
        check_options(["train", *words[words.index(script) + 1 :]])
    elif program == "docker":
        assert (ROOT / "Dockerfile").is_file()
    elif program == ".ci/run":
        assert (ROOT / program).is_file()
    elif program in ("ruff", "mypy", "mkdocs"):
        assert shlex.join(words) in (ROOT / ".ci" / "run").read_text(encoding="utf-8"), shlex.join(words)


def check_python(words: list[str]) -> None:
    """`python WORDS`: a module of the package, or a script of the repository whose options exist."""
    if words[0] == "-m":
        import importlib.util

        assert importlib.util.find_spec(words[1]) is not None, words[1]
        return
    script = ROOT / words[0]
    assert script.is_file(), words[0]
    source = script.read_text(encoding="utf-8")
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, f"{words[0]} has no option {word}"


# ---- whole pages ----


def run_page(page: Path, found: list[Block], material: Path) -> None:
    names: dict[str, object] = {"__name__": name_of(page)}
    for block in found:
        where = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        elif block.language == "sh":
            for words in commands(block.text):
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables before a command
                    words = words[1:]
                if not words:
                    continue
                if words[0] == "falcon-fast":
                    run_falcon(words[1:], material)
                else:
                    assert words[0] in NOT_RUN, f"{where}: no test knows how to check {shlex.join(words)}"
                    check_other(words)
        elif block.language == "toml":
            tomllib.loads(block.text)
        else:
            assert block.language == "text", (
                f"{where}: a block of language {block.language!r}; name sh, python, toml or text"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run(
    page: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, blocks(page), material)


PROGRAMS = re.compile(r"^\s*(?:\$ |falcon-fast |pip |pytest\b|torchrun |sbatch |python3? |mkdocs |docker )")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_hides_from_the_tests(page: Path) -> None:
    """Commands stand in blocks of language sh: not in text blocks, nor in indented ones, which Markdown shows as code too."""
    for block in blocks(page):
        if block.language == "text":
            for line in block.text.splitlines():
                assert not PROGRAMS.match(line) or "[OPTIONS]" in line, f"{name_of(page)}: {line}"
    for line in prose(page).splitlines():
        assert not (line.startswith("    ") and PROGRAMS.match(line)), f"{name_of(page)}: {line}"


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Block("sh", "rm -rf everything", 1), "no test knows how"),
        (Block("sh", "falcon-fast train --epoch 3", 1), "No such option"),
        (Block("sh", "falcon-fast train --set loss.gamma=1", 1), "unknown setting"),
        (Block("sh", "torchrun --no-python falcon-fast train --recipe imagenet", 1), "unknown recipe"),
        (Block("sh", "python examples/pytorch_loop.py --stepz 3", 1), "no option --stepz"),
        (Block("sh", "pip install '.[tests]'", 1), "tests"),
        (Block("python", "raise ValueError('as it stands')", 1), "as it stands"),
        (Block("", "falcon-fast info", 1), "name sh, python"),
    ],
)
def test_a_wrong_block_is_found(block: Block, why: str, material: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=re.escape(why)):
        run_page(PAGES[0], [block], material)


# ---- commands, options and settings in running text ----


def all_options() -> set[str]:
    def walk(command: click.Command) -> Iterator[str]:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield from (*parameter.opts, *parameter.secondary_opts)
        if isinstance(command, click.Group):
            for sub in command.commands.values():
                yield from walk(sub)

    return set(walk(cli)) | {"--help"}


# Options of other programs, which the text names.
OTHERS_OPTIONS = {"--signals-to-handle", "--nproc-per-node", "--no-python", "--benchmark", "--benchmark-write"}
VALUES = {
    "S": "0",
    "KIND": "hadamard",
    "PATH": "images",
    "RUN": "run",
    "FILE": "x",
    "OUT": "out",
    "N": "1",
    "NAME": "resnet18",
}
KEY = re.compile(rf"(?:{'|'.join(SECTIONS)})\.([a-z_]+)")


def check_span(span: str) -> None:
    """A code span: where it is a command, an option or a setting, it exists."""
    words = [VALUES.get(word, word) for word in span.split()]
    if span.startswith("falcon-fast ") and "COMMAND" not in span and "..." not in span:
        if all(re.fullmatch(r"[a-z][a-z-]*", word) for word in span.split()):  # a name, no whole command
            command: click.Command = cli
            for word in words[1:]:
                assert isinstance(command, click.Group) and word in command.commands, span
                command = command.commands[word]
        else:
            parsed([re.sub(r"=KIND$", "=hadamard", word) for word in words[1:]])
    elif span.startswith("pytest "):
        check_other(words)
    elif span.startswith("--set "):
        for assignment in words[1::2]:
            if not assignment.endswith("=") and assignment != "section.key=value":
                parse_assignment(assignment)
    elif span.startswith("--"):
        option = re.split(r"[ =]", span)[0]
        assert option in all_options() | OTHERS_OPTIONS, f"no command has an option {option}"
    elif found := KEY.fullmatch(span):
        section = span.partition(".")[0]
        assert found[1] in SECTIONS[section].__dataclass_fields__, f"no setting {span}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_options_and_settings_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        check_span(span)


@pytest.mark.parametrize(
    "span",
    [
        "falcon-fast trains",
        "falcon-fast train --epoch 1",
        "--set loss.gamma=1",
        "--epoch",
        "loss.gamma",
        "pytest --bench",
    ],
)
def test_a_wrong_span_is_found(span: str) -> None:
    with pytest.raises((AssertionError, click.ClickException, UsageError)):
        check_span(span)


def test_the_table_has_nothing_stale() -> None:
    """Every program of NOT_RUN stands in some page."""
    used = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                for words in commands(block.text):
                    used |= set(words[:3])
    assert set(NOT_RUN) <= used, set(NOT_RUN) - used
