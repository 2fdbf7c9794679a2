"""Files are whole or not there: a write is cut at every one of its steps, by an error and by a kill."""

import itertools
import os
import shutil

import pytest

from distilvlm.models import files
from distilvlm.models.files import directory_whole, manifest, sweep, verify, write_whole

STEPS = ("fsync", "replace", "rename", "open", "rmdir", "unlink")


def cut_at(step, act):
    """Patch the system calls of STEPS so that `act` runs instead of the call number `step` of this process."""
    counter = itertools.count()

    def cut(real):
        def call(*args, **kwargs):
            if next(counter) == step:
                act()
            return real(*args, **kwargs)

        return call

    patch = pytest.MonkeyPatch()
    for name in STEPS:
        patch.setattr(os, name, cut(getattr(os, name)))
    return patch


def killed_at(step, work):
    """Run `work` in a child that dies without any clean-up before its system call number `step`; True if it died."""
    child = os.fork()
    if child == 0:
        try:
            cut_at(step, lambda: os._exit(9))
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def fail():
    raise OSError("disk full")


def write_new(place):
    with directory_whole(place, replace=True) as building:
        write_whole(building / "weights.bin", b"new" * 100)
        (building / "sub").mkdir()
        (building / "sub" / "config.json").write_bytes(b"{}")


def state(place):
    assert verify(place) == []
    return (place / "weights.bin").read_bytes()[:3]


def test_a_finished_directory_verifies_and_leaves_nothing_beside(tmp_path):
    write_new(tmp_path / "deep" / "er" / "model")
    assert state(tmp_path / "deep" / "er" / "model") == b"new"
    assert names(tmp_path / "deep" / "er") == ["model"]


def test_killed_at_any_step_the_old_or_the_new_directory_is_there_after_sweeping(tmp_path):
    seen = []
    for step in itertools.count():
        root = tmp_path / str(step)
        place = root / "model"
        with directory_whole(place) as building:
            write_whole(building / "weights.bin", b"old" * 90)
        died = killed_at(step, lambda place=place: write_new(place))
        sweep(root)
        seen.append(state(place))
        assert names(root) == ["model"]
        if not died:
            break
    assert step > 10 and seen[0] == b"old" and seen[-1] == b"new"
    assert seen == sorted(seen, reverse=True)  # once the new one is in, it stays: never back to the old


def test_a_first_directory_killed_at_any_step_is_absent_or_whole(tmp_path):
    for step in itertools.count():
        place = tmp_path / str(step) / "model"
        died = killed_at(step, lambda place=place: write_new(place))
        assert not place.exists() or state(place) == b"new"
        sweep(place.parent)
        write_new(place)  # the same command goes on
        assert state(place) == b"new" and names(place.parent) == ["model"]
        if not died:
            break


def test_an_error_at_any_step_keeps_the_old_or_the_new_directory(tmp_path):
    for step in itertools.count():
        place = tmp_path / str(step) / "model"
        with directory_whole(place) as building:
            write_whole(building / "weights.bin", b"old" * 90)
        patch = cut_at(step, fail)
        try:
            write_new(place)
            failed = False
        except OSError:
            failed = True
        finally:
            patch.undo()
        sweep(place.parent)
        assert state(place) in (b"old", b"new")
        if not failed and step > 10:
            break


def test_a_file_killed_at_any_step_is_the_old_or_the_new(tmp_path):
    for step in itertools.count():
        place = tmp_path / str(step) / "state.json"
        write_whole(place, b"old")
        died = killed_at(step, lambda place=place: write_whole(place, lambda path: path.write_bytes(b"new")))
        assert place.read_bytes() in (b"old", b"new")
        sweep(place.parent)
        assert names(place.parent) == ["state.json"]
        if not died:
            break
    assert place.read_bytes() == b"new"


def test_a_writer_that_raises_leaves_the_old_file_and_no_other(tmp_path):
    write_whole(tmp_path / "x.json", b"old")
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "x.json", lambda path: fail())
    assert (tmp_path / "x.json").read_bytes() == b"old" and names(tmp_path) == ["x.json"]


def test_the_block_that_raises_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), directory_whole(tmp_path / "model") as building:
        (building / "half").write_bytes(b"1")
        _ = 1 / 0
    assert names(tmp_path) == []


def test_an_existing_directory_is_refused_unless_replaced(tmp_path):
    write_new(tmp_path / "model")
    with pytest.raises(FileExistsError, match="there already"), directory_whole(tmp_path / "model"):
        pass
    assert state(tmp_path / "model") == b"new"


def test_the_permissions_are_the_umask_s(tmp_path):
    def private(path):
        path.write_bytes(b"")
        path.chmod(0o600)

    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    with directory_whole(tmp_path / "model") as building:
        private(building / "file")
    write_whole(tmp_path / "file", private)
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for file in (tmp_path / "model" / "file", tmp_path / "model" / files.MANIFEST, tmp_path / "file"):
        assert file.stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode


@pytest.mark.parametrize("contents", [True, False])
def test_verify_names_each_file_that_is_missing_or_changed(tmp_path, contents):
    place = tmp_path / "model"
    write_new(place)
    (place / "sub" / "config.json").unlink()
    (place / "weights.bin").write_bytes(b"new" * 99)
    problems = verify(place, contents=contents)
    assert len(problems) == 2
    assert any("sub/config.json: missing" in line for line in problems)
    assert any("weights.bin: 297 bytes, the manifest says 300" in line for line in problems)


def test_verify_sees_a_changed_byte_only_when_it_reads_the_contents(tmp_path):
    write_new(tmp_path / "model")
    (tmp_path / "model" / "weights.bin").write_bytes(b"new" * 99 + b"neW")
    assert verify(tmp_path / "model", contents=False) == []
    assert "content" in verify(tmp_path / "model")[0]


def test_a_directory_without_a_readable_manifest_was_never_finished(tmp_path):
    assert "no such directory" in verify(tmp_path / "nothing")[0]
    assert "never finished" in verify(tmp_path)[0]
    (tmp_path / files.MANIFEST).write_bytes(b'{"files": [')
    assert "unreadable" in verify(tmp_path)[0]
    manifest(tmp_path)
    assert verify(tmp_path) == []


def test_files_added_later_do_not_make_a_directory_broken(tmp_path):
    write_new(tmp_path / "model")
    (tmp_path / "model" / "NOTES.md").write_text("mine")
    assert verify(tmp_path / "model") == []


def test_sweep_removes_only_what_carries_the_mark(tmp_path):
    write_new(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / ".partial-0123-model")
    (tmp_path / ".partial-4567-x.json").write_bytes(b"")
    (tmp_path / "notes").write_bytes(b"")
    assert sweep(tmp_path) == [".partial-0123-model", ".partial-4567-x.json"]
    assert names(tmp_path) == ["model", "notes"]
    assert sweep(tmp_path / "nothing") == []
