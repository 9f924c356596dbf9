"""Checksums: every file of a checkpoint, changed in every way, is noticed."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path

import pytest

from falcon_fast.errors import UsageError
from falcon_fast.training.checkpoints import checkpoint
from falcon_fast.training.checkpoints.integrity import SEAL, check_seal, checksum, sealed

from .parts import save, trained

FILES = ("run.json", "index.json", "shard-00000.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one network, at steps 3 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    return save(folder, trained(), 3), save(folder, trained(steps=4), 4)


@pytest.fixture
def copy(whole: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[1], tmp_path / "checkpoints" / whole[1].name))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        checkpoint.verify(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line


def test_a_checksum_is_the_crc_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(100_003)
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr("falcon_fast.training.checkpoints.integrity.BLOCK", 4096)
    assert checksum(tmp_path / "x") == f"{zlib.crc32(data):08x}"


def test_a_whole_checkpoint_passes(whole: tuple[Path, Path]) -> None:
    assert [checkpoint.verify(path)["step"] for path in whole] == [3, 4]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert name in refused(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_noticed_at_every_length(name: str, copy: Path) -> None:
    data = (copy / name).read_bytes()
    for length in {0, 1, 7, 8, len(data) // 3, len(data) // 2, len(data) - 8, len(data) - 1}:
        (copy / name).write_bytes(data[:length])
        assert name in refused(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_wherever_it_is(name: str, copy: Path) -> None:
    """At 100 places of each file. White space of JSON is no content, and the facts about the format number come first."""
    data, draw = (copy / name).read_bytes(), random.Random(0)
    for _ in range(100):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        (copy / name).write_bytes(changed)
        try:
            facts = checkpoint.verify(copy)
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert name == "run.json" and facts == json.loads(data)  # the same numbers, with other white space


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_noticed(name: str, whole: tuple[Path, Path], copy: Path) -> None:
    shutil.copy(whole[0] / name, copy)
    refused(copy)


def test_a_longer_file_is_noticed(copy: Path) -> None:
    with (copy / FILES[2]).open("ab") as file:
        file.write(b"\0")
    assert "bytes, not" in refused(copy)


def test_a_seal_covers_every_fact(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    facts = json.loads(sealed({"step": 3, "mean": (0.1, 0.2), "settings": {"a": 1e-8}}, tmp_path / "index.json"))
    check_seal(facts)
    assert facts["index.json"] == f"{zlib.crc32(b'{}'):08x}"
    for key in facts:
        with pytest.raises(ValueError, match="checksum"):
            check_seal({**facts, key: 7})
    with pytest.raises(ValueError, match="checksum"):
        check_seal({key: value for key, value in facts.items() if key != SEAL})


def test_a_checkpoint_from_before_there_were_checksums_is_read(copy: Path) -> None:
    facts = json.loads((copy / "run.json").read_text())
    del facts[SEAL], facts["index.json"]
    (copy / "run.json").write_text(json.dumps(facts))
    assert "damaged" in refused(copy)  # format 3 has them
    (copy / "run.json").write_text(json.dumps({**facts, "format": 2}))
    assert checkpoint.verify(copy)["step"] == 4
