"""`falcon-fast data`: how its commands are called; tests/data/test_tools.py holds what they do."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "nowhere"], "no such path"),
        (["verify", "file.txt"], "not a folder"),
        (["pack", "empty", "out"], "no image in it"),
        (["preview", "-o", "sheet.jpg"], "give a name that ends in .png"),
        (["preview", "-o", "sheet.png", "--recipe", "digit"], "did you mean 'digits'"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, said, tmp_path, monkeypatch, falcon_fast):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    code, _, err = falcon_fast("data", *arguments)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_images_that_cannot_be_decoded_are_an_exit_code_of_1(image_folder, falcon_fast):
    assert falcon_fast("data", "verify", image_folder) == (0, "", "")
    (image_folder / "dark" / "bad.png").write_bytes(b"not an image")
    code, out, _ = falcon_fast("data", "verify", image_folder)
    (line,) = out.splitlines()
    assert code == 1 and line.startswith(str(image_folder / "dark" / "bad.png"))
