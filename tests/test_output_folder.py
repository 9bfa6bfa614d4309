"""What is said about folders that hold something, and that following it works."""

import pytest

from tfopt.errors import InputError
from tfopt.output_folder import Contents

CONTENTS = Contents("logs", "state.json", state="state.json", marks=("state.json", "logs/a.log"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def message(folder):
    with pytest.raises(InputError, match="is not empty") as error:
        CONTENTS.check(folder, resume=False, overwrite=False)
    return str(error.value)


def test_another_folder_is_the_only_way_where_nothing_is_ours(folder):
    assert message(folder).endswith("is not empty; name another `output_dir`.")


def test_work_that_ended_before_its_state_cannot_be_resumed(folder):
    (folder / "logs").mkdir()
    (folder / "logs" / "a.log").touch()
    assert "`overwrite=True`" in message(folder)
    assert "resume" not in message(folder)
    CONTENTS.claim(folder, resume=False, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_work_with_a_state_can_be_resumed(folder):
    (folder / "state.json").touch()
    assert "`resume=True`" in message(folder)
    assert CONTENTS.claim(folder, resume=True, overwrite=False) == folder
