"""Staged uploads on disk: ordered pieces, verified digests, bounds and expiry."""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import MIN_PIECE_BYTES, Upload
from lattice_remote.server.config import LimitSettings
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.project.uploads import EXPIRE_S, Staging

CONTENT = os.urandom(3 * MIN_PIECE_BYTES + 100)
DIGEST = hashlib.sha256(CONTENT).digest()
ID = "0" * 32
ANA, BEN = "tok_ana", "tok_ben"


@pytest.fixture
def paths(tmp_path: Path) -> ProjectPaths:
    return ProjectPaths(tmp_path)


def staging(paths: ProjectPaths, **limits: int) -> Staging:
    return Staging(paths, LimitSettings(**limits))


def piece(offset: int, data: bytes, *, digest: bytes = DIGEST, size: int = len(CONTENT), **fields: str) -> Upload:
    return Upload(ID, digest, size, offset, data, **fields)


def pieces(content: bytes = CONTENT) -> Iterator[Upload]:
    digest = hashlib.sha256(content).digest()
    for offset in range(0, len(content), MIN_PIECE_BYTES):
        yield piece(offset, content[offset : offset + MIN_PIECE_BYTES], digest=digest, size=len(content))


def fill(staging: Staging, content: bytes, token: str = ANA) -> None:
    assert [staging.take(one, token) for one in pieces(content)][-1] == len(content)


def expire(paths: ProjectPaths) -> None:
    for file in paths.uploads.iterdir():
        os.utime(file, (time.time() - EXPIRE_S - 60,) * 2)


def test_pieces_in_order_make_the_content(paths: ProjectPaths) -> None:
    place = staging(paths)
    assert place.take(piece(0, b""), ANA) == 0
    assert [place.take(one, ANA) for one in pieces()] == [4096, 8192, 12288, len(CONTENT)]
    assert paths.upload(ANA, DIGEST).read_bytes() == CONTENT
    assert place.take(piece(0, b""), ANA) == len(CONTENT), "whoever asks again need not send it"
    assert [file.name for file in paths.uploads.iterdir()] == [paths.upload(ANA, DIGEST).name]


def test_empty_content_can_be_uploaded(paths: ProjectPaths) -> None:
    digest = hashlib.sha256(b"").digest()
    assert staging(paths).take(piece(0, b"", digest=digest, size=0), ANA) == 0
    assert paths.upload(ANA, digest).read_bytes() == b""


def test_a_piece_anywhere_else_changes_nothing_and_says_where_to_go_on(paths: ProjectPaths) -> None:
    place = staging(paths)
    first, second, third, fourth = pieces()
    assert place.take(second, ANA) == 0
    assert place.take(first, ANA) == place.take(first, ANA) == place.take(third, ANA) == 4096
    assert place.take(piece(len(CONTENT) + 9, b"x"), ANA) == 4096
    assert [place.take(one, ANA) for one in (second, third, fourth)][-1] == len(CONTENT)
    assert paths.upload(ANA, DIGEST).read_bytes() == CONTENT


def test_an_upload_continues_after_a_restart(paths: ProjectPaths) -> None:
    first, second, *rest = pieces()
    before = staging(paths)
    before.take(first, ANA)
    before.take(second, ANA)
    after = staging(paths)
    assert after.take(piece(0, b""), ANA) == 8192
    assert [after.take(one, ANA) for one in rest][-1] == len(CONTENT)
    assert paths.upload(ANA, DIGEST).read_bytes() == CONTENT
    assert staging(paths).take(piece(0, b""), ANA) == len(CONTENT)


def test_content_with_another_digest_is_forgotten(paths: ProjectPaths) -> None:
    place = staging(paths)
    *most, last = pieces()
    for one in most:
        place.take(one, ANA)
    with pytest.raises(Rejected, match="does not match its digest"):
        place.take(piece(last.offset, bytes(len(last.data))), ANA)
    assert list(paths.uploads.iterdir()) == []
    fill(place, CONTENT)


def test_damage_by_a_crash_is_detected_at_the_end(paths: ProjectPaths) -> None:
    first, *rest = pieces()
    staging(paths).take(first, ANA)
    paths.upload(ANA, DIGEST).with_suffix(".part").write_bytes(bytes(4096))
    after = staging(paths)
    with pytest.raises(Rejected, match="does not match its digest"):
        for one in rest:
            after.take(one, ANA)
    fill(after, CONTENT)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (piece(0, CONTENT + b"x"), "REMOTE_PROTOCOL"),
        (piece(0, b"tiny"), "REMOTE_PROTOCOL"),
        (piece(0, b"", size=100 * 1024 * 1024 + 1), "REMOTE_TOO_LARGE"),
        (piece(0, b"", size=2**62), "REMOTE_TOO_LARGE"),
        (piece(0, b"", purpose="project", size=2**62), "REMOTE_TOO_LARGE"),
        (piece(0, b"", purpose="../x"), "REMOTE_UNSUPPORTED"),
    ],
)
def test_an_upload_that_does_not_fit_is_refused_and_leaves_nothing(
    paths: ProjectPaths, frame: Upload, code: str
) -> None:
    with pytest.raises(Rejected) as refusal:
        staging(paths).take(frame, ANA)
    assert refusal.value.code == code
    assert list(paths.uploads.iterdir()) == []


def test_the_bound_depends_on_the_purpose(paths: ProjectPaths) -> None:
    place = staging(paths, attachment_bytes=len(CONTENT) - 1)
    with pytest.raises(Rejected, match="attachment_bytes"):
        place.take(piece(0, b""), ANA)
    assert place.take(piece(0, b"", purpose="project"), ANA) == 0


def test_content_may_not_grow_afterwards_nor_after_a_restart(paths: ProjectPaths) -> None:
    place = staging(paths, attachment_bytes=1 << 20)
    place.take(next(pieces()), ANA)
    with pytest.raises(Rejected, match="was announced with"):
        place.take(piece(0, b"", size=1 << 19), ANA)
    with pytest.raises(Rejected, match="attachment_bytes"):
        staging(paths, attachment_bytes=1 << 20).take(piece(0, b"", size=1 << 30), ANA)


def test_uploads_of_each_token_are_separate(paths: ProjectPaths) -> None:
    place = staging(paths)
    fill(place, CONTENT)
    assert place.take(piece(0, b""), BEN) == 0, "nobody learns what others have uploaded"
    assert not paths.upload(BEN, DIGEST).exists()


def test_the_bound_of_one_token_does_not_affect_others(paths: ProjectPaths) -> None:
    place = staging(paths, upload_bytes_per_token=2 * len(CONTENT))
    fill(place, os.urandom(len(CONTENT)))
    fill(place, os.urandom(len(CONTENT)))
    with pytest.raises(Rejected, match="not used yet") as refusal:
        place.take(piece(0, b""), ANA)
    assert refusal.value.code == "REMOTE_BUSY"
    fill(place, CONTENT, BEN)
    with pytest.raises(Rejected, match="not used yet"):
        staging(paths, upload_bytes_per_token=2 * len(CONTENT)).take(piece(0, b""), ANA)


def test_all_tokens_together_are_bounded(paths: ProjectPaths) -> None:
    place = staging(paths, upload_bytes=2 * len(CONTENT))
    fill(place, CONTENT, "tok_1")
    fill(place, CONTENT, "tok_2")
    with pytest.raises(Rejected, match="too many uploads of this project"):
        place.take(piece(0, b""), ANA)


def test_many_uploads_of_one_token_are_bounded(paths: ProjectPaths) -> None:
    place = staging(paths, uploads_per_token=3)
    for number in range(3):
        place.take(piece(0, b"", digest=bytes([number]) * 32), ANA)
    with pytest.raises(Rejected, match="3 uploads"):
        place.take(piece(0, b""), ANA)
    assert list(paths.uploads.iterdir()) == [], "one that only asks leaves nothing on the disk"


def test_an_abandoned_upload_makes_room(paths: ProjectPaths) -> None:
    staging(paths).take(next(pieces()), ANA)
    [part] = paths.uploads.iterdir()
    os.utime(part, (time.time() - 3600,) * 2)
    place = staging(paths, uploads_per_token=1)
    other = os.urandom(5000)
    fill(place, other)
    assert not part.exists()
    with pytest.raises(Rejected, match="not used yet"):  # what is whole does not make room
        place.take(piece(0, b""), ANA)


def test_an_upload_expires_after_a_day_at_a_start_and_while_the_server_runs(paths: ProjectPaths) -> None:
    place = staging(paths)
    fill(place, CONTENT)
    place.take(piece(0, bytes(5000), digest=bytes(32), size=6000), BEN)
    expire(paths)
    place.sweep()
    assert len(list(paths.uploads.iterdir())) == 2, "it goes by when it was written, as it knows"
    assert staging(paths).take(piece(0, b""), ANA) == 0
    assert list(paths.uploads.iterdir()) == []


def test_a_used_upload_is_removed(paths: ProjectPaths) -> None:
    place = staging(paths)
    fill(place, CONTENT)
    place.used(BEN, DIGEST)
    assert paths.upload(ANA, DIGEST).exists()
    place.used(ANA, DIGEST)
    place.used(ANA, DIGEST)
    assert not paths.upload(ANA, DIGEST).exists()
    assert place.take(piece(0, b""), ANA) == 0


def test_links_are_not_followed(paths: ProjectPaths, tmp_path: Path) -> None:
    """I9."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    paths.uploads.mkdir()
    part = paths.upload(ANA, DIGEST).with_suffix(".part")
    part.symlink_to(outside)
    place = staging(paths)
    assert place.take(piece(0, b""), ANA) == 0 and not part.is_symlink(), "a link is none of ours: it is removed"
    part.symlink_to(outside)
    with pytest.raises(OSError):
        place.take(next(pieces()), ANA)
    assert outside.read_bytes() == b"mine"


def test_a_link_that_replaces_the_directory_is_not_followed(paths: ProjectPaths, tmp_path: Path) -> None:
    """I9."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_bytes(b"mine")
    paths.uploads.symlink_to(elsewhere)
    with pytest.raises(OSError):
        staging(paths).take(next(pieces()), ANA)
    assert [file.name for file in elsewhere.iterdir()] == ["keep"]


def test_strange_token_ids_stay_inside(paths: ProjectPaths) -> None:
    place = staging(paths)
    for token in ("../../x", "", "a/b", "\udc80"):
        fill(place, CONTENT, token)
        assert paths.upload(token, DIGEST).parent == paths.uploads


def test_a_full_disk_leaves_nothing_behind(paths: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    place = staging(paths)
    first, second, *_ = pieces()
    place.take(first, ANA)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        place.take(second, ANA)
    assert list(paths.uploads.iterdir()) == []
    monkeypatch.undo()
    fill(place, CONTENT)
