"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from falcon_fast.config import Config, load_config
from falcon_fast.errors import UsageError


def one_line(call: Any, *arguments: Any) -> str:
    """The message of the UsageError that the call must raise: a single line that does not trail off."""
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message and not message.rstrip().endswith(":")
    return message


def load_text(tmp_path: Path, text: str) -> Config:
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "config.toml")
