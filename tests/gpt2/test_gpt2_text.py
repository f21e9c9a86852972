"""Sources of text: what is read, once or again, what is left out and said, what is refused."""

import gzip
import lzma
import os
import socket

import pytest

from dispersion_kernels.gpt2.text import TextError, find_documents, read_text

posix = pytest.mark.skipif(os.name == "nt", reason="pipes and links of POSIX")


def texts(*sources) -> list[str]:
    return [document.read() for document in find_documents([str(source) for source in sources])]


@posix
@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_an_open_pipe_is_read_once_and_kept(name):
    """As the shell's `<(command)` gives it."""
    if not os.path.exists(os.path.dirname(name)):
        pytest.skip(f"this system has no {os.path.dirname(name)}")
    reader, writer = os.pipe()
    os.write(writer, b"one\r\n\n\0\ntwo\n")
    os.close(writer)
    documents = find_documents([name.format(reader)])
    os.close(reader)
    for _ in range(2):
        assert [document.read() for document in documents] == ["one\n", "two\n"]


@pytest.fixture
def standard_input():
    """Puts another open file in place of the process's standard input."""
    own = os.dup(0)
    yield lambda descriptor: os.dup2(descriptor, 0)
    os.dup2(own, 0)
    os.close(own)


@posix
def test_standard_input_is_read_whatever_it_is(tmp_path, standard_input):
    (tmp_path / "a.txt").write_text("of a file\n")
    with open(tmp_path / "a.txt") as file:
        standard_input(file.fileno())
        documents = find_documents(["/dev/stdin"])
        assert [document.read() for document in documents * 2] == ["of a file\n"] * 2
    ours, theirs = socket.socketpair()
    ours.sendall(b"of a socket\n")
    ours.close()
    with theirs:
        standard_input(theirs.fileno())
        assert texts("/dev/stdin") == ["of a socket\n"]


@posix
def test_pipes_and_devices_by_name_are_refused(tmp_path):
    """They would block, or never end."""
    os.mkfifo(tmp_path / "pipe.txt")
    for source in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(TextError, match=rf"^{source}: neither a file nor a folder; .* by < {source}"):
            texts(source)
    (tmp_path / "link").symlink_to(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="link: neither a file nor a folder"):
        texts(tmp_path / "link")


@posix
def test_what_a_folder_has_beside_files_is_skipped_and_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nothing.txt")
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts(tmp_path) == ["text", "text"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    for line, name in zip(sorted(said), ("dangling.txt", "itself.txt", "loop", "pipe.txt"), strict=True):
        assert line.startswith(f"{tmp_path / name}: skipped, ")
    with pytest.raises(TextError, match=r"dangling\.txt: there is no such file"):
        texts(tmp_path / "dangling.txt")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("text")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TextError, match=r"/deep: cannot be read \(Permission denied\)"):
        texts(tmp_path)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"^got an empty name"):
        texts("")


PACKED = {".gz": gzip.compress(b"text ", mtime=0), ".xz": lzma.compress(b"text ")}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files_are_read_to_their_end(tmp_path, suffix):
    file, packed = tmp_path / f"a.txt{suffix}", PACKED[suffix]
    for content, expected in (
        (packed, "text "),
        (packed + packed, "text text "),
        (packed + bytes(8), "text "),
        (packed + bytes(4) + packed + bytes(4), "text text "),
        (b"", ""),
    ):
        if suffix == ".gz" and bytes(4) + packed in content:
            continue  # padding between members is not gzip's
        file.write_bytes(content)
        assert read_text(file) == expected
    broken = [packed + b"garbage", packed + bytes(8) + b"garbage", packed[:-1], packed + packed[:-5], b"text"]
    for content in broken + [packed + bytes(3)] * (suffix == ".xz"):
        file.write_bytes(content)
        with pytest.raises(TextError, match=rf"/a\.txt\{suffix}: cannot be read"):
            read_text(file)
