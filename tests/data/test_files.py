"""Atomic writes: a file is complete or absent, whatever happens while it is written."""

import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError


def test_the_result_appears_under_its_name_without_leftovers(tmp_path):
    with atomic_write(tmp_path / "new" / "a.bin") as part:
        part.write_bytes(b"whole")
        assert not (tmp_path / "new" / "a.bin").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"whole"


def test_an_exception_leaves_the_old_file_and_no_leftovers(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")

    def fail_half_way():
        with atomic_write(tmp_path / "a.bin") as part:
            part.write_bytes(b"ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize("there", [False, True])
def test_a_file_written_meanwhile_can_be_kept(tmp_path, there):
    with atomic_write(tmp_path / "a.bin", keep=True) as part:
        part.write_bytes(b"own")
        if there:
            (tmp_path / "a.bin").write_bytes(b"another's")
    assert (tmp_path / "a.bin").read_bytes() == (b"another's" if there else b"own")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_keep_works_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with atomic_write(tmp_path / "a.bin", keep=True) as part:
        part.write_bytes(b"own")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.bin", b"own")]


def test_sigkill_half_way_leaves_the_old_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    script = f"""
        import os, signal
        from cat_fast.data.files import atomic_write
        with atomic_write({str(tmp_path / "a.bin")!r}) as part:
            part.write_bytes(b"ne")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=60)
    assert finished.returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "a.bin") as part:
        part.chmod(0o600)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("use", [require_writable, lambda path: atomic_write(path).__enter__()])
def test_an_unwritable_path_is_reported(tmp_path, use):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.bin: cannot be written"):
        use(tmp_path / "file" / "a.bin")
    with pytest.raises(UserError, match="is a folder"):
        use(tmp_path)


def test_a_name_that_the_file_system_refuses_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"x: cannot be written \(File name too long\)"):
        require_writable(tmp_path / ("x" * 300))


def test_a_pipe_or_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a device or pipe; expected a file name"):
        atomic_write(tmp_path / "pipe").__enter__()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_require_writable_writes_nothing(tmp_path):
    require_writable(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []
